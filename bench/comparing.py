"""Has it become slower? Two results of ``dpo bench``, scenario by scenario."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dpo.bench.results import Measurement
from dpo.errors import InputError

LEAST: Final = 0.03  # a change below this share never counts: two runs differ by as much


@dataclass(frozen=True, slots=True)
class Change:
    """One scenario before and after.

    Attributes:
        scenario: its name.
        ratio: median step after by before; above 1 is slower.
        noise: what the ratio may differ from 1 by without meaning anything.
    """

    scenario: str
    ratio: float
    noise: float

    @property
    def is_regression(self) -> bool:
        """Whether it is slower by more than the noise."""
        return self.ratio > 1 + self.noise

    @property
    def line(self) -> str:
        """The change in words."""
        words = "no change"
        if self.is_regression:
            words = "SLOWER"
        elif self.ratio < 1 - self.noise:
            words = "faster"
        return f"{self.scenario:<24}{self.ratio:6.2f} x the time  noise {self.noise:.0%}  {words}"


def changes(old: Mapping[str, Measurement], new: Mapping[str, Measurement]) -> list[Change]:
    """Compare the scenarios that both have.

    The noise of a scenario is the larger spread of its steps, at least ``LEAST``.

    Raises:
        InputError: they share no scenario, or one was measured on another device or with another
            number of threads.
    """
    shared = [name for name in old if name in new]
    if not shared:
        raise InputError(
            f"no scenario in common: one has {', '.join(old)}, the other {', '.join(new)}"
        )
    for name in shared:
        before, after = ((r.device, r.threads) for r in (old[name], new[name]))
        if before != after:
            raise InputError(
                f"{name}: measured on {before[0]} with {before[1]} threads and on {after[0]} with "
                f"{after[1]}: times of two machines say nothing of the code"
            )
    return [
        Change(
            name,
            new[name].median_seconds / old[name].median_seconds,
            max(LEAST, old[name].spread, new[name].spread),
        )
        for name in shared
    ]
