"""Is a policy right as often as it says? Calibration error, Brier score and the reliability curve.

Shapes: N decisions, R bins, B resamples.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dpo.errors import InputError
from dpo.eval.bootstrap import DEFAULTS, BootstrapOptions, ConfidenceInterval, bootstrap, divide
from dpo.eval.resampling import Floats

BINS = 10


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The decisions whose confidence lies in [``low``, ``high``) (the last bin holds 1 as well)."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean confidence of the bin's decisions."""
    accuracy: ConfidenceInterval
    """Share of them that are right."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far confidence and accuracy lie apart."""

    expected_error: ConfidenceInterval
    """Mean of |accuracy - confidence| over ``BINS`` equal bins, weighted by count (Guo et al. 2017,
    equation 3). Chance alone makes it positive: about 0.4 sqrt(R/N) for a perfect policy."""
    brier: ConfidenceInterval
    """Mean of (confidence - right)^2 of the action chosen; 0.25 for a coin that says 0.5."""
    bins: tuple[ReliabilityBin, ...]
    """The bins that hold a decision."""


def calibrate(
    confidences: ArrayLike,
    is_right: ArrayLike,
    options: BootstrapOptions = DEFAULTS,
    *,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
) -> Calibration:
    """Compare confidences (N,) in [0, 1] with outcomes (N,): 1 right, 0 wrong, a tie 0.5.

    Raises:
        InputError: a confidence outside [0, 1], or as ``bootstrap``.
    """
    confidence = np.asarray(confidences, dtype=np.float64)
    right = np.asarray(is_right, dtype=np.float64)
    outside = ~((confidence >= 0.0) & (confidence <= 1.0))
    if outside.any():
        first = int(np.argmax(outside))
        raise InputError(
            f"confidences must lie in [0, 1]; decision {first} (counted from 0) has "
            f"{confidence[first]}"
        )
    columns = calibration_columns(confidence, right)  # (N, 3 R + 1)
    error, brier, *rates = bootstrap(columns, _scores, options, groups=groups, strata=strata)
    counts, sums = np.split(columns.sum(axis=0)[: 2 * BINS], 2)  # (R,)
    return Calibration(
        error,
        brier,
        tuple(
            ReliabilityBin(
                i / BINS, (i + 1) / BINS, int(counts[i]), float(sums[i] / counts[i]), rates[i]
            )
            for i in range(BINS)
            if counts[i]
        ),
    )


def calibration_columns(confidence: Floats, right: Floats) -> Floats:
    """Return bin membership, confidences and outcomes by bin, and squared errors: (N, 3 R + 1)."""
    index = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    member = np.eye(BINS)[index]  # (N, R)
    # a tie is right half of the time: (confidence - 1)^2 with that chance, else confidence^2
    squares = right * (1.0 - confidence) ** 2 + (1.0 - right) * confidence**2
    return np.concatenate(
        [member, member * confidence[:, None], member * right[:, None], squares[:, None]], axis=1
    )


def expected_error(sums: Floats) -> Floats:
    """Map sums of ``calibration_columns`` (B, 3 R + 1) to the calibration error: (B, 1)."""
    return _scores(sums)[:, :1]


def brier_score(sums: Floats) -> Floats:
    """Map sums of ``calibration_columns`` (B, 3 R + 1) to the Brier score: (B, 1)."""
    return _scores(sums)[:, 1:2]


def _scores(sums: Floats) -> Floats:
    """Map (B, 3 R + 1) sums to calibration error, Brier score and bin accuracies: (B, 2 + R)."""
    counts, confidence, right = (sums[:, i * BINS : (i + 1) * BINS] for i in range(3))
    total = counts.sum(axis=1, keepdims=True)
    error = divide(np.abs(right - confidence).sum(axis=1, keepdims=True), total)
    return np.concatenate([error, divide(sums[:, -1:], total), divide(right, counts)], axis=1)
