import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.segments import Segments, plan_attention


@st.composite
def forests(draw: st.DrawFn) -> Segments:
    """Trees as the collator makes them: roots with a first child, then other children."""
    trees = draw(st.integers(1, 4))
    lengths = st.integers(1, 5)
    parents: list[int | None] = []
    for tree in range(trees):
        parents += [None, 2 * tree]
    parents += [2 * draw(st.integers(0, trees - 1)) for _ in range(draw(st.integers(0, 5)))]
    if len(parents) > 2 * trees and draw(st.booleans()):
        parents.append(len(parents) - 1)  # a grandchild in the same run
    return Segments(tuple(draw(lengths) for _ in parents), tuple(parents))


def test_mask_of_a_pair_by_hand() -> None:
    mask = Segments((2, 1, 2), (None, 0, 0)).attention_mask()
    by_hand = torch.tensor(
        [
            [1, 0, 0, 0, 0],  # prompt
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],  # chosen
            [1, 1, 0, 1, 0],  # rejected sees the prompt, not chosen
            [1, 1, 0, 1, 1],
        ]
    ).bool()
    assert torch.equal(mask, by_hand)


def test_positions_go_on_from_the_parent() -> None:
    assert Segments((2, 1, 2), (None, 0, 0)).positions().tolist() == [0, 1, 2, 2, 3]


@given(forests())
def test_plan_shows_each_token_exactly_what_the_mask_allows(segments: Segments) -> None:
    plan = plan_attention(segments)
    seen = torch.zeros(sum(segments.lengths), sum(segments.lengths), dtype=torch.bool)
    row = 0
    for length in plan.root_lengths:
        for index in range(length):
            seen[row + index, row : row + index + 1] = True
        row += length
    runs = zip(
        plan.branch_lengths,
        plan.branch_keys.split(plan.branch_key_lengths),
        strict=True,
    )
    for length, keys in runs:
        for index in range(length):
            seen[row + index, keys[: len(keys) - length + index + 1]] = True
        row += length
    assert torch.equal(seen, segments.attention_mask())


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ((1, 2), (None,), "2 lengths but 1 parents"),
        ((1, 0), (None, 0), "segment 1 has 0 tokens"),
        ((1, 1), (None, 1), "segment 1 has parent 1"),
    ],
)
def test_impossible_forests_are_refused(
    lengths: tuple[int, ...], parents: tuple[int | None, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Segments(lengths, parents)


def test_root_behind_a_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="segment 3 is a root behind a branch"):
        plan_attention(Segments((1, 1, 1, 1), (None, 0, 0, None)))
