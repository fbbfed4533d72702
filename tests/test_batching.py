from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.batching import StepSampler, collate, collate_answers, pack, permuted
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
