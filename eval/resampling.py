"""Drawing units with replacement, fast and in bounded memory.

A table of numbers is resampled by counts: ``counts @ table`` are the column sums of a resample.
Rows of one group are added up first, since they are drawn together. Three forms of one draw:

- every unit on its own, counts by index draws: exact;
- equal units merged (0/1 outcomes, confusion cells), counts from a multinomial: exact;
- units of nearly equal influence on one statistic merged: at most ``LOST_VARIANCE`` of the variance
  is lost, so an interval is shortened by at most half that share.

Shapes: N rows, U units (rows, or groups of rows), F columns, H strata, K kinds of unit,
B resamples.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dpo.errors import InputError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CHUNK_ELEMENTS = (
    2**21
)  # drawn counts held at once: 16 MiB of float64, and as much again for scratch
LOST_VARIANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Units:
    """What is drawn: kinds of unit, sorted by stratum."""

    table: Floats
    """(K, F) the column sums of one unit of each kind."""
    copies: Integers
    """(K,) how many units of that kind there are."""
    bounds: Integers
    """(H + 1,) stratum h holds the kinds ``bounds[h]:bounds[h + 1]``."""

    @property
    def strata(self) -> list[slice]:
        """The rows of ``table`` of each stratum."""
        return [slice(int(start), int(end)) for start, end in pairwise(self.bounds)]

    @property
    def total(self) -> Floats:
        """(F,) the column sums of the sample itself."""
        return np.asarray(self.copies @ self.table, dtype=np.float64)


def make_units(
    columns: Floats,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
) -> Units:
    """Add up the rows of each group and sort the groups by stratum.

    Args:
        columns: (N, F).
        groups: (N,) keys; None makes every row a unit.
        strata: (N,) keys; None puts all units in one stratum.

    Raises:
        InputError: values that are not finite, fewer than two units, keys of another length, a
            group in two strata, a stratum of one unit.
    """
    if not np.isfinite(columns).all():
        row = int(np.argmin(np.isfinite(columns).all(axis=1)))
        raise InputError(f"values must be finite numbers; value {row} (counted from 0) is not")
    rows = len(columns)
    group = np.arange(rows) if groups is None else _codes(groups, rows, "groups")  # (N,)
    stratum = np.zeros(rows, np.int64) if strata is None else _codes(strata, rows, "strata")  # (N,)
    units = int(group.max(initial=-1)) + 1
    if units < 2:
        what = "values" if groups is None else "groups"
        raise InputError(f"an interval needs at least two {what}, got {units}")
    stratum_of = np.zeros(units, np.int64)  # (U,)
    stratum_of[group] = stratum
    if (stratum_of[group] != stratum).any():
        row = int(np.argmax(stratum_of[group] != stratum))
        raise InputError(
            f"every group must lie in one stratum; the group of value {row} lies in two"
        )
    sizes = np.bincount(stratum_of)  # (H,)
    if (sizes < 2).any():
        key = dict.fromkeys(strata or ())
        lonely = list(key)[int(np.argmin(sizes))]
        raise InputError(f"every stratum needs at least two units, {lonely!r} has one; drop strata")
    table = columns if groups is None else _sums_by_code(columns, group, units)  # (U, F)
    order = np.argsort(stratum_of, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return Units(table[order], np.ones(units, np.int64), bounds)


def merge_equal(units: Units) -> Units:
    """Merge units with equal sums, if that leaves far fewer; the draw has the same distribution."""
    # A random projection tells rows apart; rows that differ by its round-off stay apart, unharmed.
    key = units.table @ np.random.default_rng(0).standard_normal(units.table.shape[1])  # (U,)
    parts = [np.unique(key[rows], return_index=True, return_counts=True) for rows in units.strata]
    kinds = sum(len(values) for values, _, _ in parts)
    if kinds * 4 > len(units.table):
        return units
    first = [
        units.table[rows][index] for rows, (_, index, _) in zip(units.strata, parts, strict=True)
    ]
    copies = [count for _, _, count in parts]
    return _joined(first, copies)


def merge_alike(units: Units, influence: Floats) -> Units:
    """Merge units of nearly equal influence on a statistic, each kind at the mean of its units.

    Args:
        units: every unit on its own.
        influence: (U,) change of the statistic when the unit is drawn once more.
    """
    tables, copies = [], []
    for rows in units.strata:
        code = _alike_codes(influence[rows])
        count = np.bincount(code)
        tables.append(_sums_by_code(units.table[rows], code, len(count)) / count[:, None])
        copies.append(count)
    return _joined(tables, copies)


def draw_counts(units: Units, generator: np.random.Generator, resamples: int) -> Iterator[Floats]:
    """Yield (b, K) counts, b resamples at a time, ``resamples`` in all."""
    chunk = max(1, CHUNK_ELEMENTS // max(len(units.table), 1))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = [_draw_stratum(units.copies[rows], generator, size) for rows in units.strata]
        yield drawn[0] if len(drawn) == 1 else np.concatenate(drawn, axis=1)


def _draw_stratum(copies: Integers, generator: np.random.Generator, size: int) -> Floats:
    """Draw as many units as there are, with replacement: (size, K) counts."""
    kinds, units = len(copies), int(copies.sum())
    if kinds < units:
        return generator.multinomial(units, copies / units, size=size).astype(np.float64)
    index = generator.integers(0, kinds, size=(size, kinds))  # (b, K)
    index += np.arange(size)[:, None] * kinds
    counts = np.bincount(index.ravel(), minlength=size * kinds).reshape(size, kinds)
    return counts.astype(np.float64)


def _alike_codes(influence: Floats) -> Integers:
    """Cut the influences into cells that keep all but ``LOST_VARIANCE`` of the variance: (U,)."""
    centred = influence - influence.mean()
    low, span = centred.min(), max(float(np.ptp(centred)), np.finfo(np.float64).tiny)
    variance = centred @ centred
    cells = 1024
    while True:
        code = np.minimum((centred - low) / span * cells, cells - 1).astype(np.int64)
        count = np.bincount(code)
        sums = np.bincount(code, weights=centred)
        lost = variance - (sums**2 / np.maximum(count, 1)).sum()
        if lost <= LOST_VARIANCE * variance:
            renumbered = np.cumsum(count > 0) - 1  # without the empty cells
            return np.asarray(renumbered[code], dtype=np.int64)
        cells *= 2


def _codes(keys: Sequence[Hashable], rows: int, what: str) -> Integers:
    """Number keys in order of first appearance: (N,)."""
    if len(keys) != rows:
        raise InputError(f"{what} must have one key for each of the {rows} values, got {len(keys)}")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _sums_by_code(table: Floats, code: Integers, codes: int) -> Floats:
    """Add up the rows of each code: (codes, F)."""
    columns = [np.bincount(code, weights=column, minlength=codes) for column in table.T]
    return np.stack(columns, axis=1).astype(np.float64, copy=False)


def _joined(tables: list[Floats], copies: list[Integers]) -> Units:
    bounds = np.cumsum([0, *(len(table) for table in tables)])
    return Units(np.concatenate(tables), np.concatenate(copies).astype(np.int64), bounds)
