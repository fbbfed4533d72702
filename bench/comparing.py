"""Has it become slower or larger? Two results of ``dpo bench``, scenario by scenario."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from dpo.bench.results import Measurement
from dpo.errors import InputError


@dataclass(frozen=True, slots=True)
class Quantity:
    """What is compared of a scenario.

    Attributes:
        value: less of it is better.
        spread: its noise within one result, as a share.
        least: a change below this share never counts: two runs differ by as much.
        worse, better: what more and less of it is called.
    """

    value: Callable[[Measurement], float]
    spread: Callable[[Measurement], float]
    least: float
    worse: str
    better: str


QUANTITIES: Final = {
    "time": Quantity(
        value=lambda result: result.median_seconds,
        spread=lambda result: result.spread,
        least=0.03,
        worse="SLOWER",
        better="faster",
    ),
    "memory": Quantity(
        value=lambda result: result.peak_mib,
        spread=lambda result: 0.0,
        least=0.02,
        worse="LARGER",
        better="smaller",
    ),
}


@dataclass(frozen=True, slots=True)
class Change:
    """A quantity of one scenario before and after.

    Attributes:
        scenario: its name.
        quantity: a name in ``QUANTITIES``.
        ratio: after by before; above 1 is worse.
        noise: what the ratio may differ from 1 by without meaning anything.
    """

    scenario: str
    quantity: str
    ratio: float
    noise: float

    @property
    def is_regression(self) -> bool:
        """Whether it is worse by more than the noise."""
        return self.ratio > 1 + self.noise

    @property
    def line(self) -> str:
        """The change in words."""
        words = "no change"
        if self.is_regression:
            words = QUANTITIES[self.quantity].worse
        elif self.ratio < 1 - self.noise:
            words = QUANTITIES[self.quantity].better
        what = f"x the {self.quantity}"
        return f"{self.scenario:<24}{self.ratio:6.2f} {what:<13} noise {self.noise:3.0%}  {words}"


def changes(old: Mapping[str, Measurement], new: Mapping[str, Measurement]) -> list[Change]:
    """Compare the scenarios that both have, in every quantity.

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
            what,
            quantity.value(new[name]) / quantity.value(old[name]),
            max(quantity.least, quantity.spread(old[name]), quantity.spread(new[name])),
        )
        for name in shared
        for what, quantity in QUANTITIES.items()
    ]
