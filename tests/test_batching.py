from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.batching import collate, collate_answers, collate_forest, pack
from dpo.sampling import GroupSampler, StepSampler, permuted
from dpo.segments import Segments
from dpo.tokenization import TokenizedPair


def ids(*tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, np.int32)


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    return TokenizedPair(
        prompt_ids=ids(*prompt),
        chosen_ids=ids(*chosen),
        rejected_ids=ids(*rejected),
        weight=2.0,
        margin=0.5,
        label_prob=0.9,
        id="a",
        source=None,
    )


def test_worked_example_of_the_docstring() -> None:
    batch = collate([pair([5, 6, 7], [8, 2], [9])], multiple_of=1)
    texts = batch.texts
    assert texts.stream.input_ids.tolist() == [5, 6, 7, 8, 2, 9]
    assert texts.stream.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert texts.stream.plan.segments.lengths == (3, 2, 1)
    assert texts.stream.plan.segments.parents == (None, 0, 0)
    assert texts.predictors.tolist() == [2, 3, 2]
    assert texts.targets.tolist() == [8, 2, 9]
    assert texts.answers.tolist() == [0, 0, 1]
    assert batch.weight.tolist() == [2.0]


def test_two_pairs_stand_as_roots_with_first_answers_then_the_rest() -> None:
    batch = collate([pair([1], [2, 3], [4]), pair([5, 6], [7], [8, 9])], multiple_of=1)
    assert batch.texts.stream.input_ids.tolist() == [1, 2, 3, 5, 6, 7, 4, 8, 9]
    assert batch.texts.targets.tolist() == [2, 3, 4, 7, 8, 9]
    assert batch.texts.predictors.tolist() == [0, 1, 0, 4, 4, 7]
    assert batch.texts.answers.tolist() == [0, 0, 1, 2, 3, 3]


def test_filler_is_a_text_of_its_own_that_no_answer_sees() -> None:
    texts = collate([pair([1], [2, 3], [4])], multiple_of=8).texts
    assert texts.stream.input_ids.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    mask = texts.stream.plan.segments.attention_mask()
    assert not mask[4:, :4].any()
    assert texts.predictors.tolist() == [4, 5, 4]


def test_without_sharing_the_prompt_stands_before_each_answer() -> None:
    texts = collate([pair([1], [2, 3], [4])], share_prefix=False, multiple_of=1).texts
    assert texts.stream.input_ids.tolist() == [1, 2, 3, 1, 4]
    assert texts.targets.tolist() == [2, 3, 4]
    assert texts.predictors.tolist() == [0, 1, 3]


def test_reference_values_stand_beside_their_tokens() -> None:
    reference = [(np.array([-1, -2], np.float32), np.array([-3], np.float32))]
    batch = collate([pair([1], [2, 3], [4])], reference=reference)
    assert batch.reference is not None
    assert batch.reference.tolist() == [-1, -2, -3]


def test_three_answers_of_one_prompt_share_it() -> None:
    texts = collate_answers([(ids(1, 2), [ids(3), ids(4, 5), ids(6)])], multiple_of=1)
    assert texts.stream.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert texts.answers.tolist() == [0, 1, 1, 2]
    assert texts.predictors.tolist() == [1, 1, 3, 1]


def test_pairs_of_one_prompt_share_it_and_its_answers() -> None:
    """Three answers ranked: best against each other one, and those against each other."""
    pairs = [pair([1, 2], [3], [4, 5]), pair([1, 2], [3], [6]), pair([1, 2], [4, 5], [6])]
    texts = collate([*pairs, pair([7], [3], [8])], multiple_of=1).texts
    assert texts.stream.input_ids.tolist() == [1, 2, 3, 7, 3, 4, 5, 6, 8]
    assert texts.targets.tolist() == [3, 4, 5, 3, 6, 4, 5, 6, 3, 8]
    assert texts.answers.tolist() == [0, 1, 1, 2, 3, 4, 4, 5, 6, 7]
    assert texts.predictors.tolist() == [1, 1, 5, 1, 1, 1, 5, 1, 3, 3]


def test_worked_example_of_a_forest() -> None:
    texts = collate_forest(
        [ids(5, 6), ids(7), ids(8), ids(9, 2), ids(3)], [None, 0, 0, 1, 1], [2, 3, 4], multiple_of=1
    )
    assert texts.stream.input_ids.tolist() == [5, 6, 7, 9, 2, 8, 3]
    assert texts.stream.positions.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert texts.stream.plan.segments == Segments((2, 1, 2, 1, 1), (None, 0, 1, 0, 1))
    assert texts.predictors.tolist() == [1, 2, 3, 2]
    assert texts.targets.tolist() == [8, 9, 2, 3]
    assert texts.answers.tolist() == [0, 1, 1, 2]


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[int], list[int | None]]:
    """Lengths and parents, the second segment below the first."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=12))
    others = [draw(st.none() | st.integers(0, index - 1)) for index in range(2, len(lengths))]
    return lengths, [None, 0, *others]


@settings(max_examples=40)
@given(forests(), st.sampled_from([1, 8]), st.data())
def test_layout_of_a_forest_changes_no_text(
    forest: tuple[list[int], list[int | None]], multiple_of: int, data: st.DataObject
) -> None:
    """Every scored token keeps its target, its predictor and all that it sees, in order."""
    lengths, parents = forest
    given_order = Segments(tuple(lengths), tuple(parents))
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.int32)  # each token names itself
    segments = np.split(tokens, given_order.starts[1:])
    below = [index for index, parent in enumerate(parents) if parent is not None]
    scored = data.draw(st.permutations(below))
    texts = collate_forest(segments, parents, scored, multiple_of=multiple_of)
    stream, mask = texts.stream, texts.stream.plan.segments.attention_mask()
    assert len(stream.input_ids) % multiple_of == 0
    row = 0
    for answer, segment in enumerate(scored):
        text = [int(token) for s in given_order.path(segment) for token in segments[s]]
        for place in range(len(text) - lengths[segment], len(text)):
            predictor = int(texts.predictors[row])
            seen = stream.input_ids[mask[predictor]]
            in_order = seen[stream.positions[mask[predictor]].argsort()]
            assert in_order.tolist() == text[:place]
            assert int(texts.targets[row]) == text[place]
            assert int(texts.answers[row]) == answer
            row += 1
    assert row == len(texts.targets)


def test_a_forest_has_no_more_runs_than_leaves() -> None:
    parents = [None, 0, 0, 1, 1, 2, None, 6, 6]
    texts = collate_forest([ids(1)] * 9, parents, [3], multiple_of=1)
    assert len(texts.stream.plan.root_lengths + texts.stream.plan.branch_lengths) == 5


def test_a_forest_with_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no segment is to be scored"):
        collate_answers([(ids(1), [])])


def test_a_root_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="segment 1 is a root: nothing predicts its first token"):
        collate_forest([ids(1), ids(2)], [None, None], [1])


def test_a_parent_behind_its_child_is_refused() -> None:
    with pytest.raises(ValueError, match="segment 1 has parent 2, expected an earlier segment"):
        collate_forest([ids(1), ids(2), ids(3)], [None, 2, 0], [1])


def test_sums_per_answer() -> None:
    texts = collate([pair([1], [2, 3], [4])]).texts
    assert texts.sum_per_answer(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0, 4.0]


@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 5))
def test_permutation_hits_every_row_once(size: int, seed: int, epoch: int) -> None:
    order = [permuted(index, size, seed=(seed, epoch)) for index in range(size)]
    assert sorted(order) == list(range(size))


def test_permutation_is_not_the_identity_and_differs_by_epoch() -> None:
    first, second = (
        [permuted(index, 100, seed=(0, epoch)) for index in range(100)] for epoch in (0, 1)
    )
    assert first != second
    assert sum(index == row for index, row in enumerate(first)) < 10


def test_every_row_is_about_equally_likely_at_every_place() -> None:
    size, draws = 7, 3000
    counts = np.zeros((size, size))
    for seed in range(draws):
        for index in range(size):
            counts[index, permuted(index, size, seed=(seed,))] += 1
    expected = draws / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 36 degrees of freedom and a little network: 36 expected, 100 would be a biased shuffle
    assert chi_square < 100


@given(st.integers(1, 50), st.integers(1, 20))
def test_steps_of_an_epoch_cover_the_rows_once(pairs: int, batch_size: int) -> None:
    sampler = StepSampler(pairs, batch_size, seed=3)
    steps = [sampler.rows(step) for step in range(sampler.steps_per_epoch)]
    assert sorted(chain.from_iterable(steps)) == list(range(pairs))
    assert all(len(rows) == batch_size for rows in steps[:-1])
    assert set(sampler.rows(sampler.steps_per_epoch)) <= set(range(pairs))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50), st.integers(1, 20), st.integers(0, 3))
def test_grouped_steps_cover_the_rows_once_and_cut_few_groups(
    keys: list[int], batch_size: int, epoch: int
) -> None:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    groups = np.array([numbers[key] for key in keys])
    sampler = GroupSampler(groups, batch_size, seed=3)
    first = epoch * sampler.steps_per_epoch
    steps = [sampler.rows(step) for step in range(first, first + sampler.steps_per_epoch)]
    order = list(chain.from_iterable(steps))
    assert sorted(order) == list(range(len(keys)))
    assert all(len(rows) == batch_size for rows in steps[:-1])
    changes = sum(groups[one] != groups[other] for one, other in pairwise(order))
    assert changes == len(numbers) - 1  # the rows of a group follow each other
    again = GroupSampler(groups, batch_size, seed=3)
    assert again.rows(first + len(steps) - 1) == steps[-1]  # without replaying


def test_grouped_epochs_differ() -> None:
    sampler = GroupSampler(np.arange(30), 30, seed=0)
    assert sampler.rows(0) != sampler.rows(1)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 60))
def test_packing_keeps_every_item_and_the_capacity(sizes: list[int], capacity: int) -> None:
    bins = pack(sizes, capacity=capacity)
    assert sorted(chain.from_iterable(bins)) == list(range(len(sizes)))
    for items in bins:
        assert sum(sizes[item] for item in items) <= capacity or len(items) == 1


def test_packing_fills_gaps() -> None:
    assert pack([6, 5, 4, 3, 2], capacity=10) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("multiple_of", [1, 16])
def test_stream_is_filled_to_the_multiple(multiple_of: int) -> None:
    stream = collate([pair([1, 2], [3], [4, 5])], multiple_of=multiple_of).texts.stream
    assert len(stream.input_ids) % multiple_of == 0
