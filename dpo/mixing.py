"""Several data sets as one: how many rows of each an epoch has, and which.

Shapes: S sets.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from dpo.errors import InputError
from dpo.pair import PreferencePair


@dataclass(frozen=True, slots=True, kw_only=True)
class MixConfig:
    """What part of an epoch each of several data sets makes up.

    Raises:
        InputError: values are out of range or contradict each other; names all faults.
    """

    weights: Annotated[
        tuple[float, ...] | None,
        "Of several --data, what part of an epoch each makes up, in their order; of any sum.",
    ] = None
    temperature: Annotated[
        float | None,
        "In place of weights: n rows weigh n^(1/temperature). 1 takes every row once, inf as many "
        "rows of each; 1 unless given.",
    ] = None
    rows: Annotated[
        int | None, "Rows of an epoch of several --data; none: as many as all hold."
    ] = None

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise InputError("\n".join(faults))

    def _faults(self) -> Iterator[str]:
        if not all(0 < weight < math.inf for weight in self.weights or ()):
            yield f"mix.weights must be above 0 and finite, got {list(self.weights or ())}"
        if self.temperature is not None and not self.temperature > 0:
            yield f"mix.temperature must be above 0, got {self.temperature}"
        if self.rows is not None and self.rows < 1:
            yield f"mix.rows must be at least 1, got {self.rows}"
        if self.weights is not None and self.temperature is not None:
            yield "mix.weights and mix.temperature: give one, not both"


def set_names(sources: Sequence[str]) -> list[str]:
    """Name data sets by their files without folder and type, or as given if two are called so."""
    names = [Path(source).name.split(".")[0] or source for source in sources]
    return names if len(set(names)) == len(names) else list(sources)


def named(name: str, pair: PreferencePair) -> PreferencePair:
    """Put a set's name before the id of a row, and make it the source of one without."""
    return replace(pair, id=f"{name}/{pair.id}", source=pair.source or name)


def count_rows(sizes: Sequence[int], config: MixConfig) -> list[int]:
    """Return how many rows of each set make up an epoch, given how many each has: (S,) both.

    The share of a set is its weight, or its size to the power 1 / temperature (Arivazhagan et al.
    2019, arXiv 1907.05019); the counts are those shares of all rows, rounded by the
    largest remainders so that their sum is exact.
    """
    total = sum(sizes) if config.rows is None else config.rows
    weights = config.weights or sizes
    power, largest = 1 / (config.temperature or 1.0), max(weights)
    shares = [(weight / largest) ** power for weight in weights]  # at most 1: never infinite
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(rows) for rows in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def mix(
    ids_by_set: Mapping[str, Sequence[str]], config: MixConfig, *, seed: int
) -> dict[str, list[NDArray[np.int64]]]:
    """Return the rows of an epoch by set, for each time that the set is gone through.

    Of a set that gives k times its rows and some, each row is taken k times and some once more.
    Which ones depends on their ids and the seed alone. Rows are numbers from 0, rising.

    Raises:
        InputError: a set would give no row.
    """
    counts = count_rows([len(ids) for ids in ids_by_set.values()], config)
    mixed = {}
    for (name, ids), count in zip(ids_by_set.items(), counts, strict=True):
        if not ids or not count:
            raise InputError(f"data: of {name}, {count} of {len(ids)} rows would be trained on")
        mixed[name] = _taken(ids, count, seed)
    return mixed


def seeded_digest(value: object, seed: int) -> bytes:
    """Return 16 bytes that tell a value from others, in another order with each seed."""
    return hashlib.blake2b(repr((seed, value)).encode(), digest_size=16).digest()


def describe_share(name: str, count: int, size: int) -> str:
    """Say how many rows of a set of ``size`` rows make up an epoch."""
    if count <= size:
        return f"{name}: {count:,} of {size:,} rows"
    return f"{name}: {count:,} rows, {count / size:.1f} times its {size:,}"


def _taken(ids: Sequence[str], count: int, seed: int) -> list[NDArray[np.int64]]:
    repeats, rest = divmod(count, len(ids))
    ranked = sorted(range(len(ids)), key=lambda row: seeded_digest(ids[row], seed))
    once_more = np.array(sorted(ranked[:rest]), dtype=np.int64)
    return [*[np.arange(len(ids))] * repeats, *([once_more] if rest else [])]
