"""What the logged actions earned: distribution, by class, and over time.

They describe the log, whatever policy is evaluated; ``off_policy`` has what a policy would earn.

Shapes: N rewards, C classes, B resamples.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import numpy as np

from dpo.eval.bootstrap import DEFAULTS, BootstrapOptions, ConfidenceInterval, bootstrap, divide
from dpo.eval.resampling import Floats

HISTOGRAM_BINS = 10
Direction = Literal["improving", "declining", "stable"]


@dataclass(frozen=True, slots=True)
class HistogramBin:
    """The rewards in [``low``, ``high``); the last bin holds its upper end as well."""

    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class RewardDistribution:
    """Where rewards lie; quartiles are interpolated."""

    mean: ConfidenceInterval
    std_dev: float
    """Of the population: divided by N."""
    min: float
    q1: float
    median: float
    q3: float
    max: float
    histogram: tuple[HistogramBin, ...]


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """The decisions of one stretch of time, from ``start`` until ``end``."""

    start: datetime
    end: datetime
    count: int
    mean_reward: float


@dataclass(frozen=True, slots=True)
class Trend:
    """How rewards change over time."""

    slope: ConfidenceInterval
    """Least-squares change of the reward in 30 days."""
    direction: Direction
    """"stable" unless the interval of the slope excludes zero."""
    windows: tuple[TimeWindow, ...]
    """Windows without decisions are left out."""


def reward_distribution(
    rewards: Floats,
    options: BootstrapOptions = DEFAULTS,
    *,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
) -> RewardDistribution:
    """Describe rewards (N,).

    Raises:
        InputError: as ``bootstrap``.
    """
    columns = np.stack([rewards, np.ones(len(rewards))], axis=1)
    mean = bootstrap(columns, _ratio, options, groups=groups, strata=strata)[0]
    low, q1, median, q3, high = (float(q) for q in np.quantile(rewards, [0, 0.25, 0.5, 0.75, 1]))
    # numpy widens the range of equal values to 1
    counts, edges = np.histogram(rewards, bins=HISTOGRAM_BINS)
    bins = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    return RewardDistribution(
        mean=mean,
        std_dev=float(rewards.std()),
        min=low,
        q1=q1,
        median=median,
        q3=q3,
        max=high,
        histogram=tuple(HistogramBin(*each) for each in bins),
    )


def reward_by_class(
    rewards: Floats,
    classes: Sequence[str],
    options: BootstrapOptions = DEFAULTS,
    *,
    groups: Sequence[Hashable] | None = None,
) -> Mapping[str, ConfidenceInterval]:
    """Return the mean reward of each class of action that was taken, with its interval.

    Raises:
        InputError: as ``bootstrap``.
    """
    names = sorted(set(classes))
    member = np.array([[name == each for name in names] for each in classes], dtype=np.float64)
    columns = np.concatenate([member * rewards[:, None], member], axis=1)  # (N, 2 C)
    found = bootstrap(columns, _ratio, options, groups=groups)
    return dict(zip(names, found, strict=True))


def reward_trend(
    rewards: Floats,
    times: Sequence[datetime | None],
    options: BootstrapOptions = DEFAULTS,
    *,
    groups: Sequence[Hashable] | None = None,
    window: timedelta = timedelta(days=7),
) -> Trend | None:
    """Fit a line through the rewards over time; None if a time is missing or all are equal.

    Raises:
        InputError: as ``bootstrap``.
    """
    known = [time for time in times if time is not None]
    if len(known) < len(times) or not known or min(known) == max(known):
        return None
    start = min(known)
    days = np.array([(time - start) / timedelta(days=1) for time in known])  # (N,)
    months = (days - days.mean()) / 30.0
    columns = np.stack(
        [np.ones(len(days)), months, rewards, months * rewards, months**2], axis=1
    )  # (N, 5)
    slope = bootstrap(columns, _slope, options, groups=groups)[0]
    direction: Direction = "stable"
    if slope.excludes(0.0):
        direction = "improving" if slope.mean > 0.0 else "declining"
    length = window / timedelta(days=1)
    index = (days // length).astype(np.int64)
    windows = [
        TimeWindow(
            start=start + int(number) * window,
            end=start + (int(number) + 1) * window,
            count=int((index == number).sum()),
            mean_reward=float(rewards[index == number].mean()),
        )
        for number in np.unique(index)
    ]
    return Trend(slope, direction, tuple(windows))


def _ratio(sums: Floats) -> Floats:
    """Map sums and counts side by side (B, 2 C) to means (B, C)."""
    half = sums.shape[1] // 2
    return divide(sums[:, :half], sums[:, half:])


def _slope(sums: Floats) -> Floats:
    """Map sums of 1, t, r, tr, t^2 (B, 5) to the least-squares slope of r over t: (B, 1)."""
    count, time, reward, product, square = (sums[:, i : i + 1] for i in range(5))
    spread = count * square - time**2
    return divide(count * product - time * reward, np.where(spread > 1e-12, spread, 0.0))
