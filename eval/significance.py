"""Could it be chance? Permutation tests, McNemar's test, Holm's correction, detectable differences.

Shapes: U units, F columns, K kinds of unit, B permutations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo.eval.bootstrap import NORMAL, ConfidenceInterval, Statistic
from dpo.eval.resampling import CHUNK_ELEMENTS, Floats, Units, merge_equal

POWER = 0.8


@dataclass(frozen=True, slots=True)
class McNemar:
    """The exact test of two paired rates (McNemar 1947): examples that only one gets right."""

    only_a: int
    """Examples that A alone gets right."""
    only_b: int
    """Examples that B alone gets right."""
    p_value: float
    """Two-sided, exact binomial; takes the examples as independent."""


def mcnemar(right_a: Floats, right_b: Floats) -> McNemar:
    """Compare paired outcomes (N,), 1 right and 0 wrong."""
    only_a = int(((right_a == 1.0) & (right_b == 0.0)).sum())
    only_b = int(((right_b == 1.0) & (right_a == 0.0)).sum())
    count = only_a + only_b
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    few = np.arange(min(only_a, only_b) + 1)
    log_terms = log_factorials[count] - log_factorials[few] - log_factorials[count - few]
    tail = float(np.exp(log_terms - count * math.log(2.0)).sum())
    return McNemar(only_a, only_b, min(1.0, 2.0 * tail))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that all are true at once at the level of any (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def smallest_detectable(difference: ConfidenceInterval) -> float:
    """Return the true difference that such a sample finds with a power of 80%.

    A two-sided test at the interval's level, from its standard error: (z + 0.84) errors.
    """
    critical = NORMAL.inv_cdf((1.0 + difference.confidence) / 2.0)
    return (critical + NORMAL.inv_cdf(POWER)) * difference.standard_error


def swap_p_value(table: Floats, statistic: Statistic, *, permutations: int, seed: int) -> float:
    """Test whether A's and B's results can be swapped within units.

    Args:
        table: (U, 2 F) sums of each unit, A's columns before B's.
        statistic: maps sums (B, F) to (B, 1).
        permutations: random swaps; every unit swaps with chance 1/2.
        seed: of the swaps.

    Returns:
        The two-sided p-value, (1 + as extreme) / (1 + permutations).
    """
    half = table.shape[1] // 2
    total_a, total_b = table[:, :half].sum(axis=0), table[:, half:].sum(axis=0)
    everyone = Units(
        table[:, half:] - table[:, :half],
        np.ones(len(table), np.int64),
        np.array([0, len(table)]),
    )
    kinds = merge_equal(everyone)
    generator = np.random.default_rng(seed)
    observed = float((statistic(total_b[None]) - statistic(total_a[None]))[0, 0])
    extreme = 0
    chunk = max(1, CHUNK_ELEMENTS // len(kinds.table))
    for start in range(0, permutations, chunk):
        size = (min(chunk, permutations - start), len(kinds.table))
        moved = generator.binomial(kinds.copies, 0.5, size=size) @ kinds.table  # (b, F)
        extreme += _count_extreme(statistic(total_b - moved) - statistic(total_a + moved), observed)
    return (1 + extreme) / (1 + permutations)


def relabel_p_value(
    table: Floats, in_b: NDArray[np.bool_], statistic: Statistic, *, permutations: int, seed: int
) -> float:
    """Test whether units of A and of B, as they turned out, could have been labelled otherwise.

    Args:
        table: (U, F) sums of each unit.
        in_b: (U,) true for units of B.
        statistic: maps sums (B, F) to (B, 1).
        permutations: random labels with the same number of units on each side.
        seed: of the labels.

    Returns:
        The two-sided p-value, (1 + as extreme) / (1 + permutations).
    """
    generator = np.random.default_rng(seed)

    def differences(labels: Floats) -> Floats:
        return statistic(labels @ table) - statistic((1.0 - labels) @ table)

    observed = float(differences(in_b[None].astype(np.float64))[0, 0])
    extreme = 0
    chunk = max(1, CHUNK_ELEMENTS // len(table))
    for start in range(0, permutations, chunk):
        size = min(chunk, permutations - start)
        labels = generator.permuted(np.tile(in_b, (size, 1)), axis=1)  # (b, U)
        extreme += _count_extreme(differences(labels.astype(np.float64)), observed)
    return (1 + extreme) / (1 + permutations)


def _count_extreme(values: Floats, observed: float) -> int:
    """Count values (b, 1) as far from 0 as ``observed``; undefined ones count, to be safe."""
    return int((~(np.abs(values) < abs(observed) * (1.0 - 1e-9) - 1e-12)).sum())
