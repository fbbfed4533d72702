"""Permutation tests, McNemar, Holm and detectable differences."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.eval.bootstrap import compute_confidence_interval, ratio_of_sums
from dpo.eval.resampling import Floats
from dpo.eval.significance import (
    holm,
    mcnemar,
    relabel_p_value,
    smallest_detectable,
    swap_p_value,
)


@settings(max_examples=50, deadline=None)
@given(only_a=st.integers(0, 40), only_b=st.integers(0, 40))
def test_mcnemar_equals_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    right_a = np.array([1.0] * only_a + [0.0] * only_b + [1.0, 0.0])
    right_b = np.array([0.0] * only_a + [1.0] * only_b + [1.0, 0.0])
    found = mcnemar(right_a, right_b)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    expected = 1.0
    if only_a + only_b:
        expected = scipy.stats.binomtest(only_a, only_a + only_b).pvalue
    assert found.p_value == pytest.approx(expected)


def test_mcnemar_stays_exact_for_many_examples() -> None:
    right_a = np.array([1.0] * 100_000 + [0.0] * 101_000)
    found = mcnemar(right_a, 1.0 - right_a)
    assert found.p_value == pytest.approx(scipy.stats.binomtest(100_000, 201_000).pvalue, rel=1e-6)


def test_holm_by_hand() -> None:
    # sorted .01 x 3, .02 x 2, .5: each at least as large as the one before
    assert holm([0.02, 0.5, 0.01]) == pytest.approx([0.04, 0.5, 0.03])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def _table(a: Floats, b: Floats) -> Floats:
    ones = np.ones(len(a))
    return np.stack([a, ones, b, ones], axis=1)


def test_swap_test_equals_scipys_paired_permutation_test() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=40)
    b = a + generator.normal(0.25, 0.8, size=40)
    ours = swap_p_value(_table(a, b), ratio_of_sums, permutations=20_000, seed=1)
    theirs = scipy.stats.permutation_test(
        (a, b),
        lambda x, y, axis: (y - x).mean(axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(2),
    )
    assert ours == pytest.approx(theirs.pvalue, abs=0.012)


def test_relabel_test_equals_scipys_independent_permutation_test() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=30), generator.normal(0.5, 1.0, size=40)
    values = np.concatenate([a, b])
    table = np.stack([values, np.ones(70)], axis=1)
    labels = np.arange(70) >= 30
    ours = relabel_p_value(table, labels, ratio_of_sums, permutations=20_000, seed=1)
    theirs = scipy.stats.permutation_test(
        (a, b),
        lambda x, y, axis: y.mean(axis=axis) - x.mean(axis=axis),
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(2),
    )
    assert ours == pytest.approx(theirs.pvalue, abs=0.012)


def test_equal_results_have_a_p_value_of_one() -> None:
    a = np.random.default_rng(0).normal(size=20)
    assert swap_p_value(_table(a, a), ratio_of_sums, permutations=200, seed=0) == 1.0


def test_merged_units_give_the_p_value_of_single_ones() -> None:
    # 0/1 results: thousands of units of three kinds, each swapped by a binomial draw
    generator = np.random.default_rng(3)
    a = (generator.random(4000) < 0.5).astype(float)
    b = (generator.random(4000) < 0.515).astype(float)
    ours = swap_p_value(_table(a, b), ratio_of_sums, permutations=20_000, seed=1)
    found = mcnemar(a, b)  # the same test, exactly: only unequal units matter
    assert ours == pytest.approx(found.p_value, abs=0.015)


def test_three_examples_cannot_be_significant() -> None:
    a, b = np.zeros(3), np.ones(3)
    assert swap_p_value(_table(a, b), ratio_of_sums, permutations=1000, seed=0) > 0.2


def test_detectable_difference_by_hand() -> None:
    found = compute_confidence_interval(np.random.default_rng(0).normal(size=100))
    # 1.96 for the level of 5%, 0.84 for the power of 80%
    assert smallest_detectable(found) == pytest.approx(
        (1.960 + 0.842) * found.standard_error, rel=1e-3
    )
