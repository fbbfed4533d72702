"""Splits: whole units, an unbiased seeded choice, and what crosses."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.splits import crossing_rows, seeded_rank, split_by_time, split_by_unit
from dpo.errors import InputError

UNITS = st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(
    lambda units: len(set(units)) > 1
)
SHARES = st.floats(0.01, 0.99)


def names(count: int) -> list[str]:
    return [f"session-{index}" for index in range(count)]


@given(units=UNITS, share=SHARES, seed=st.integers(0, 5))
def test_no_unit_is_on_both_sides_and_no_side_is_empty(
    units: list[int], share: float, seed: int
) -> None:
    array = np.array(units)
    is_eval = split_by_unit(array, names(10), eval_split=share, seed=seed)
    assert not set(array[is_eval]) & set(array[~is_eval])
    assert 0 < is_eval.sum() < len(array)


@given(units=UNITS, share=SHARES, seed=st.integers(0, 5), order=st.randoms(use_true_random=False))
def test_side_of_a_unit_does_not_depend_on_row_order(
    units: list[int], share: float, seed: int, order: random.Random
) -> None:
    shuffled = list(units)
    order.shuffle(shuffled)
    sides = [
        set(np.array(rows)[split_by_unit(np.array(rows), names(10), eval_split=share, seed=seed)])
        for rows in (units, shuffled)
    ]
    assert sides[0] == sides[1]


@given(
    rows=st.integers(2, 200),
    share=st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.8, 0.9]),
    seed=st.integers(0, 3),
)
def test_share_is_exact_when_units_are_single_rows(rows: int, share: float, seed: int) -> None:
    is_eval = split_by_unit(np.arange(rows), names(rows), eval_split=share, seed=seed)
    wanted = min(max(share * rows, 1), rows - 1)
    assert abs(is_eval.sum() - wanted) <= 0.5 + 1e-9


def test_every_position_is_equally_likely_to_be_evaluated() -> None:
    # 400 independent seeds, 100 units, share 0.2: each unit's count is Binomial(400, 0.2), sd 8.
    # Five standard deviations over 100 units: false alarm about 6e-5, and the seeds are fixed.
    taken = np.zeros(100)
    for seed in range(400):
        taken += split_by_unit(np.arange(100), names(100), eval_split=0.2, seed=seed)
    assert np.abs(taken - 80).max() < 40


def test_seed_changes_the_split_and_repeats_it() -> None:
    splits = [
        split_by_unit(np.arange(50), names(50), eval_split=0.5, seed=seed).tolist()
        for seed in (1, 1, 2)
    ]
    assert splits[0] == splits[1] != splits[2]


@given(times=UNITS, share=SHARES)
def test_split_by_time_evaluates_the_latest_and_keeps_instants_whole(
    times: list[int], share: float
) -> None:
    array = np.array(times)
    is_eval = split_by_time(array, eval_split=share)
    assert array[~is_eval].max() < array[is_eval].min()


def test_split_by_time_takes_the_share() -> None:
    assert split_by_time(np.array([3, 1, 2, 5, 4]), eval_split=0.4).tolist() == [
        False,
        False,
        False,
        True,
        True,
    ]


def test_crossing_rows_are_evaluation_rows_with_a_training_key() -> None:
    keys = np.array([1, 1, 2, 3])
    is_eval = np.array([False, True, True, False])
    assert crossing_rows(keys, is_eval).tolist() == [False, True, False, False]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_share_outside_the_open_interval_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"eval_split must be in \(0, 1\), got"):
        split_by_unit(np.arange(4), names(4), eval_split=share, seed=0)
    with pytest.raises(InputError, match=r"eval_split must be in \(0, 1\), got"):
        split_by_time(np.arange(4), eval_split=share)


def test_one_unit_cannot_be_split() -> None:
    with pytest.raises(
        InputError, match=r"3 examples by unit: 1 unit\(s\) found.*another split_by"
    ):
        split_by_unit(np.zeros(3, np.int64), names(1), eval_split=0.5, seed=0)
    with pytest.raises(InputError, match=r"by time: they have 1 different time"):
        split_by_time(np.zeros(3, np.int64), eval_split=0.5)


def test_rank_is_the_documented_hash() -> None:
    # blake2b("session-1", digest_size=8, key="0"), big-endian: a split stays what it was for years.
    assert seeded_rank("session-1", 0) == 3904211964121103525
    assert seeded_rank("session-1", 1) == 17672254818342521079
