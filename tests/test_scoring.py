"""How rows are divided over micro-batches: nothing lost, nothing too large, prompts together."""

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo.scoring import MicroBatches
from dpo.tokenization import TokenizedPair, TokenizedPairs, columns_of


def pairs_of(prompts: list[int]) -> TokenizedPairs:
    """Pairs whose prompts are named by numbers; the prompt n has n tokens, answers two and one."""
    return columns_of(
        [
            TokenizedPair(
                np.full(prompt, prompt, np.int32),
                np.array([row, 1], np.int32),
                np.array([2], np.int32),
                id=f"row-{row}",
            )
            for row, prompt in enumerate(prompts)
        ]
    )


PROMPTS = st.lists(st.integers(1, 9), min_size=1, max_size=40)


@given(PROMPTS, st.integers(1, 40), st.booleans(), st.booleans())
def test_every_row_is_in_one_micro_batch_that_fits(
    prompts: list[int], capacity: int, share_prefix: bool, is_sorted: bool
) -> None:
    pairs = pairs_of(prompts)
    batches = MicroBatches(pairs, tokens_per_micro_batch=capacity, share_prefix=share_prefix)
    rows = list(range(len(prompts)))
    found = batches.split_sorted(rows) if is_sorted else batches.split(rows)
    assert sorted(chain.from_iterable(found)) == rows
    for batch in found:
        stream = batches.collate(batch).texts.stream
        filler = 15  # of a stream that is filled to a multiple of 16
        assert len(stream.input_ids) <= capacity + filler or len(batch) == 1


@given(PROMPTS)
def test_rows_of_a_prompt_share_it_where_there_is_room(prompts: list[int]) -> None:
    batches = MicroBatches(pairs_of(prompts), tokens_per_micro_batch=10_000)
    for found in (batches.split(range(len(prompts))), batches.split_sorted(range(len(prompts)))):
        (batch,) = found
        stream = batches.collate(batch).texts.stream
        tokens = sum(prompt + len([2]) for prompt in set(prompts)) + 2 * len(prompts)
        assert len(stream.input_ids) == -(-tokens // 16) * 16


def test_prompts_are_numbered_in_order_of_appearance() -> None:
    assert pairs_of([4, 2, 4, 3, 2]).prompt_groups.tolist() == [0, 1, 0, 2, 1]
