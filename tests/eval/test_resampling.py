"""Drawing units: every form draws as many as there are, and merging loses nothing that counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.eval import resampling
from dpo.eval.resampling import (
    LOST_VARIANCE,
    Units,
    draw_counts,
    make_units,
    merge_alike,
    merge_equal,
)

TABLE = st.lists(st.integers(-3, 3), min_size=2, max_size=60).map(
    lambda values: np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=1)
)


def test_rows_of_a_group_are_added_up() -> None:
    units = make_units(np.array([[1.0], [2.0], [4.0]]), groups=["a", "b", "a"])
    assert units.table.tolist() == [[5.0], [2.0]]


def test_units_are_sorted_by_stratum() -> None:
    units = make_units(np.array([[1.0], [2.0], [3.0], [4.0]]), strata=["x", "y", "x", "y"])
    assert [units.table[rows].ravel().tolist() for rows in units.strata] == [[1.0, 3.0], [2.0, 4.0]]


@settings(max_examples=50, deadline=None)
@given(table=TABLE, seed=st.integers(0, 9))
def test_every_resample_has_as_many_units_as_the_sample(
    table: resampling.Floats, seed: int
) -> None:
    for units in (make_units(table), merge_equal(make_units(table))):
        (counts,) = draw_counts(units, np.random.default_rng(seed), 20)
        assert (counts.sum(axis=1) == len(table)).all()


@settings(max_examples=50, deadline=None)
@given(table=TABLE)
def test_merging_equal_units_keeps_the_sums(table: resampling.Floats) -> None:
    merged = merge_equal(make_units(table))
    assert merged.copies.sum() == len(table)
    assert merged.total == pytest.approx(table.sum(axis=0))


def test_zeros_and_ones_become_two_kinds() -> None:
    merged = merge_equal(make_units(np.array([[0.0]] * 30 + [[1.0]] * 70)))
    kinds = dict(zip(merged.table.ravel().tolist(), merged.copies.tolist(), strict=True))
    assert kinds == {0.0: 30, 1.0: 70}


def test_strata_are_merged_apart() -> None:
    units = make_units(np.ones((40, 1)), strata=["a"] * 10 + ["b"] * 30)
    assert merge_equal(units).copies.tolist() == [10, 30]
    (counts,) = draw_counts(merge_equal(units), np.random.default_rng(0), 5)
    assert counts.tolist() == [[10.0, 30.0]] * 5


@pytest.mark.parametrize("draw", ["normal", "lognormal", "standard_cauchy"])
def test_merging_alike_units_keeps_the_variance(draw: str) -> None:
    values = getattr(np.random.default_rng(0), draw)(size=30_000)
    units = make_units(np.stack([values, np.ones(30_000)], axis=1))
    influence = values - values.mean()
    merged = merge_alike(units, influence)
    assert len(merged.table) < 10_000
    assert merged.copies.sum() == 30_000
    assert merged.total == pytest.approx(units.total)
    spread = merged.copies @ (merged.table[:, 0] - values.mean()) ** 2
    assert (1 - LOST_VARIANCE) * influence @ influence <= spread <= influence @ influence * 1.000001


def test_draws_come_in_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "CHUNK_ELEMENTS", 100)
    units = make_units(np.arange(10.0)[:, None])
    sizes = [len(counts) for counts in draw_counts(units, np.random.default_rng(0), 25)]
    assert sizes == [10, 10, 5]


def test_index_and_multinomial_draws_have_the_same_moments() -> None:
    values = np.repeat([0.0, 1.0, 5.0], [50, 30, 20])[:, None]
    single = make_units(values)
    errors = []
    for units in (single, merge_equal(single)):
        counts = np.concatenate([*draw_counts(units, np.random.default_rng(0), 20_000)])
        errors.append((counts @ units.table).std())
    assert errors[0] == pytest.approx(np.sqrt(100) * values.std(), rel=0.02)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_units_know_their_total() -> None:
    units = Units(np.array([[2.0], [3.0]]), np.array([4, 1]), np.array([0, 2]))
    assert units.total.tolist() == [11.0]
