"""Bootstrap confidence intervals for means and for every metric that is a function of sums.

A metric is written as a *statistic*: a function of column sums. Accuracy is (sum of hits) / (sum
of ones), an F1 score is a function of three counts, a self-normalised off-policy value is a ratio
of two sums. A thousand resamples are then one matrix product, the jackknife of BCa a subtraction.

Shapes: N rows, U units (rows, or groups of rows), F columns, K kinds of unit, M statistics,
B resamples.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from dpo.errors import InputError
from dpo.eval.resampling import Floats, Units, draw_counts, make_units, merge_alike, merge_equal

Statistic = Callable[[Floats], Floats]
Method = Literal["percentile", "basic", "bca", "studentised"]

METHODS: tuple[Method, ...] = get_args(Method)
MAX_KINDS = 20_000  # distinct units above which those of nearly equal influence are merged
MAX_UNDEFINED = 0.05  # share of resamples that may leave a statistic undefined
BLOCK = 2**16  # units whose influence is computed at once
NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """An estimate with its bootstrap interval."""

    mean: float
    """The statistic of the sample itself (of a mean: the mean); not the mean of the resamples."""
    lower: float
    """Lower end; NaN where more than 5% of the resamples leave the statistic undefined."""
    upper: float
    """Upper end; NaN together with ``lower``."""
    confidence: float
    """Nominal coverage, in (0, 1)."""
    method: Method
    """How the ends were made from the resamples."""
    resamples: int
    """Number of resamples drawn."""
    n: int
    """Number of values (rows)."""
    units: int
    """Number of independent units that were drawn: groups, or values where no groups were named."""
    standard_error: float
    """Standard deviation of the statistic over the resamples; NaN where the ends are."""

    @property
    def is_defined(self) -> bool:
        """Whether there is an interval at all."""
        return not math.isnan(self.lower)

    def excludes(self, value: float) -> bool:
        """Tell whether ``value`` lies outside the interval; false where there is no interval."""
        return self.is_defined and not self.lower <= value <= self.upper


@dataclass(frozen=True, slots=True)
class BootstrapOptions:
    """How intervals are made; checked here, so that every caller refuses the same values."""

    confidence: float = 0.95
    """Nominal coverage, in (0, 1)."""
    method: Method = "bca"
    """One of ``METHODS``; README.md in this folder has the measured coverage of each."""
    resamples: int = 2000
    """Number of resamples; at least 2 / (1 - confidence), so that some lie beyond each end."""
    seed: int = 0
    """Seed of the draws; equal seeds give equal intervals."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if not 0.0 < self.confidence < 1.0:
            raise InputError(
                f"confidence must be between 0 and 1, both excluded, got {self.confidence}"
            )
        if self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        fewest = math.ceil(round(2.0 / (1.0 - self.confidence), 6))
        if self.resamples < fewest:
            raise InputError(
                f"resamples must be at least {fewest} for confidence {self.confidence}, "
                f"got {self.resamples}"
            )
        if self.seed < 0:
            raise InputError(f"seed must not be negative, got {self.seed}")


DEFAULTS = BootstrapOptions()


def compute_confidence_interval(
    values: ArrayLike,
    confidence: float = 0.95,
    *,
    method: Method = "bca",
    resamples: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
) -> ConfidenceInterval:
    """Estimate the mean of ``values`` with a bootstrap interval.

    Args:
        values: (N,) finite numbers.
        confidence: nominal coverage, in (0, 1).
        method: one of ``METHODS``.
        resamples: number of resamples.
        seed: seed of the draws.
        groups: (N,) keys; values of one group (a session) belong together and are drawn together.
        strata: (N,) keys; the number of units drawn from each stratum (a class) is held fixed.

    Raises:
        InputError: values that are not finite numbers, fewer than two values or groups, an option
            out of its range, keys of another length, a group in two strata, a stratum of one unit.

    Example:
        >>> from dpo import compute_confidence_interval
        >>> interval = compute_confidence_interval([0.1, 0.4, 0.2, 0.9, 0.5, 0.3])
        >>> f"{interval.mean:.2f}", interval.lower < interval.mean < interval.upper
        ('0.40', True)
    """
    options = BootstrapOptions(confidence, method, resamples, seed)
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise InputError(f"values must be a flat list of numbers, got shape {column.shape}")
    columns = np.stack([column, np.ones_like(column)], axis=1)  # (N, 2)
    return bootstrap(columns, ratio_of_sums, options, groups=groups, strata=strata)[0]


def ratio_of_sums(sums: Floats) -> Floats:
    """Divide the first column of sums by the second: (B, 2) to (B, 1)."""
    return divide(sums[:, :1], sums[:, 1:])


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, NaN where the denominator is 0: a rate of nothing is undefined, not zero."""
    defined = denominator != 0.0
    return np.where(defined, numerator / np.where(defined, denominator, 1.0), np.nan)


def quantiles(values: Floats, shares: Floats) -> Floats:
    """Interpolate linearly between order statistics, as numpy's default does."""
    return np.asarray(np.quantile(values, shares), dtype=np.float64)


def bootstrap(
    columns: Floats,
    statistic: Statistic,
    options: BootstrapOptions = DEFAULTS,
    *,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
) -> list[ConfidenceInterval]:
    """Give each statistic of the column sums its interval.

    Args:
        columns: (N, F) finite numbers, summed over rows before ``statistic`` sees them; a column of
            ones gives it the number of rows.
        statistic: maps (B, F) sums to (B, M) values, each unchanged when all sums are scaled
            together; NaN where a value is undefined.
        options: confidence, method, resamples, seed.
        groups: as in ``compute_confidence_interval``.
        strata: as in ``compute_confidence_interval``.

    Returns:
        M intervals.

    Raises:
        InputError: as in ``compute_confidence_interval``.
    """
    units = make_units(columns, groups, strata)
    plan = merge_equal(units)
    if len(plan.table) <= MAX_KINDS:
        distributions = _resample(plan, statistic, options)
    else:
        distributions = []
        for output in range(statistic(units.total[None]).shape[1]):
            part = _output(statistic, output)
            alike = merge_alike(units, np.nan_to_num(_influence(units, part)[:, 0]))
            distributions += _resample(alike, part, options)
    return [_interval(found, options, len(columns), len(units.table)) for found in distributions]


@dataclass(frozen=True, slots=True)
class _Distribution:
    """What resampling tells about one statistic."""

    estimate: float
    values: Floats  # (B,)
    acceleration: float  # of BCa; 0 for the other methods
    error: float  # standard error of the estimate; the fields of studentised, NaN otherwise
    errors: Floats  # (B,) standard error within each resample


def _output(statistic: Statistic, index: int) -> Statistic:
    return lambda sums: statistic(sums)[:, index : index + 1]


def _resample(units: Units, statistic: Statistic, options: BootstrapOptions) -> list[_Distribution]:
    generator = np.random.default_rng(options.seed)
    studentised = options.method == "studentised"
    values, errors = [], []
    for counts in draw_counts(units, generator, options.resamples):
        sums = counts @ units.table  # (b, F)
        values.append(statistic(sums))
        if studentised:
            errors.append(_standard_errors(units, statistic, counts))
    drawn = np.concatenate(values)  # (B, M)
    sample = units.copies[None].astype(np.float64)  # the sample itself as counts (1, K)
    estimates = statistic(units.total[None])[0]  # (M,)
    blank = np.full_like(drawn, np.nan)
    within = np.concatenate(errors) if studentised else blank
    own = _standard_errors(units, statistic, sample)[0] if studentised else blank[0]
    bends = _acceleration(units, statistic) if options.method == "bca" else np.zeros_like(estimates)
    return [
        _Distribution(
            float(estimates[i]), drawn[:, i], float(bends[i]), float(own[i]), within[:, i]
        )
        for i in range(len(estimates))
    ]


def _interval(
    found: _Distribution, options: BootstrapOptions, rows: int, units: int
) -> ConfidenceInterval:
    defined = _defined(found, is_studentised=options.method == "studentised")
    ends, error = np.full(2, np.nan), float("nan")
    if _is_constant(found):
        ends, error = np.full(2, found.estimate), 0.0
    elif len(defined.values) >= (1.0 - MAX_UNDEFINED) * options.resamples:
        tail = (1.0 - options.confidence) / 2.0
        ends = _ENDS[options.method](defined, np.array([tail, 1.0 - tail]))
        error = float(defined.values.std(ddof=1))
    return ConfidenceInterval(
        mean=found.estimate,
        lower=float(ends[0]),
        upper=float(ends[1]),
        confidence=options.confidence,
        method=options.method,
        resamples=options.resamples,
        n=rows,
        units=units,
        standard_error=error,
    )


def _is_constant(found: _Distribution) -> bool:
    """Tell whether every resample gave the estimate again, up to round-off."""
    return bool((np.abs(found.values - found.estimate) <= 1e-12 * abs(found.estimate)).all())


def _defined(found: _Distribution, *, is_studentised: bool) -> _Distribution:
    """Keep the resamples that have a value (and, to be studentised, an error to divide by)."""
    keep = np.isfinite(found.values)
    if is_studentised:
        keep &= found.errors > 1e-9 * found.error
    return replace(found, values=found.values[keep], errors=found.errors[keep])


def _percentile_ends(found: _Distribution, tails: Floats) -> Floats:
    return quantiles(found.values, tails)


def _basic_ends(found: _Distribution, tails: Floats) -> Floats:
    return 2.0 * found.estimate - quantiles(found.values, tails)[::-1]


def _studentised_ends(found: _Distribution, tails: Floats) -> Floats:
    ratios = quantiles((found.values - found.estimate) / found.errors, tails)
    return found.estimate - ratios[::-1] * found.error


def _bca_ends(found: _Distribution, tails: Floats) -> Floats:
    """Shift the percentiles for bias and skew (Efron 1987, equations 2.3 and 6.6)."""
    tie = 1e-9 * float(found.values.std())  # equal up to round-off
    below = np.mean(found.values < found.estimate - tie)
    up_to = np.mean(found.values <= found.estimate + tie)
    share = float(
        np.clip((below + up_to) / 2.0, 1.0 / len(found.values), 1 - 1.0 / len(found.values))
    )
    bias = NORMAL.inv_cdf(share)
    shifted = []
    for tail in tails:
        z = bias + NORMAL.inv_cdf(float(tail))
        bend = 1.0 - found.acceleration * z
        # past the pole the formula turns round: there is no more skewed end than the extreme
        shifted.append(NORMAL.cdf(bias + z / bend) if bend > 0.0 else float(tail > 0.5))
    return quantiles(found.values, np.array(shifted))


_ENDS: dict[Method, Callable[[_Distribution, Floats], Floats]] = {
    "percentile": _percentile_ends,
    "basic": _basic_ends,
    "bca": _bca_ends,
    "studentised": _studentised_ends,
}


def _influence(units: Units, statistic: Statistic) -> Floats:
    """Jackknife influence of a unit of each kind: (K, M), centred within its stratum."""
    influence = []
    for rows in units.strata:
        copies, total = units.copies[rows], units.copies[rows] @ units.table[rows]
        size = int(copies.sum())
        left = []
        for start in range(rows.start, rows.stop, BLOCK):
            block = units.table[start : min(start + BLOCK, rows.stop)]  # (b, F)
            # the stratum without one unit, scaled back to its size
            left.append(statistic(units.total - total + (total - block) * (size / (size - 1))))
        values = np.concatenate(left)  # (K_h, M)
        influence.append((copies @ values / size - values) * ((size - 1) / size))
    return np.concatenate(influence)


def _acceleration(units: Units, statistic: Statistic) -> Floats:
    """Skewness of the influences over 6 (Efron 1987, equation 6.6): (M,)."""
    influence = _influence(units, statistic)  # (K, M)
    with np.errstate(divide="ignore", invalid="ignore"):
        bend = (units.copies @ influence**3) / (6.0 * (units.copies @ influence**2) ** 1.5)
    return np.nan_to_num(bend, nan=0.0, posinf=0.0, neginf=0.0)


def _standard_errors(units: Units, statistic: Statistic, counts: Floats) -> Floats:
    """Standard error of the statistic within each resample, by the delta method: (b, M).

    The influence of a unit is the gradient at the sums times its row; the variance of a
    statistic is the sum over strata of the units' squared deviations.
    """
    sums = counts @ units.table  # (b, F)
    steps = 1e-4 * np.sqrt(units.copies @ units.table**2) + np.finfo(np.float64).tiny  # (F,)
    slopes = [
        (statistic(sums + step) - statistic(sums - step)) / (2.0 * steps[column])
        for column, step in enumerate(np.diag(steps))
    ]
    gradient = np.stack(slopes, axis=1)  # (b, F, M)
    variances = []
    for output in range(gradient.shape[2]):
        effect = gradient[:, :, output] @ units.table.T  # (b, K)
        sizes = np.add.reduceat(units.copies, units.bounds[:-1])  # (H,)
        squares = np.add.reduceat(counts * effect**2, units.bounds[:-1], axis=1)  # (b, H)
        means = np.add.reduceat(counts * effect, units.bounds[:-1], axis=1) / sizes
        variances.append((squares - sizes * means**2).sum(axis=1))
    return np.asarray(np.sqrt(np.maximum(np.stack(variances, axis=1), 0.0)), dtype=np.float64)
