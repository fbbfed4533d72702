"""Which retrieval deserves how much of a task's outcome.

A task that ends well or badly used several entries before; each method splits the outcome's value
(``outcome_value``) over them. ``normalize_scores`` rescales the shares. To add a method, write a
function of an ``Outcome`` and its ``Retrieval`` objects and name it in ``ATTRIBUTIONS``.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from dpo.errors import InputError

OutcomeType = Literal["success", "partial", "failure", "unknown"]

OUTCOME_VALUES: dict[OutcomeType, float] = {
    "success": 1.0,
    "partial": 0.5,
    "failure": -0.5,
    "unknown": 0.0,
}


@dataclass(frozen=True, slots=True)
class Retrieval:
    """One entry that was found for a query; rank 1 is the best, None is not known."""

    retrieved_at: datetime
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise InputError(f"a retrieval's rank must be at least 1, or None, got {self.rank}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended, and how sure that is, in [0, 1]."""

    type: OutcomeType
    at: datetime
    confidence: float = 1.0

    def __post_init__(self) -> None:
        if self.type not in OUTCOME_VALUES:
            raise InputError(f"outcome must be one of {', '.join(OUTCOME_VALUES)}, got {self.type}")
        if not 0 <= self.confidence <= 1:
            raise InputError(f"an outcome's confidence must be in [0, 1], got {self.confidence}")


@dataclass(frozen=True, slots=True)
class InferredOutcome:
    """An outcome read from words, and how sure that is."""

    type: OutcomeType
    confidence: float


def outcome_value(outcome: Outcome) -> float:
    """Return what is split: the value of the outcome's type times its confidence."""
    return OUTCOME_VALUES[outcome.type] * outcome.confidence


def linear(outcome: Outcome, retrievals: Sequence[Retrieval]) -> list[float]:
    """Give each retrieval the same share."""
    return _split(outcome, [1.0] * len(retrievals))


def last_touch(outcome: Outcome, retrievals: Sequence[Retrieval]) -> list[float]:
    """Give everything to the latest retrieval; of several at that time, to the first."""
    shares = [0.0] * len(retrievals)
    if retrievals:
        latest = max(range(len(retrievals)), key=lambda index: retrievals[index].retrieved_at)
        shares[latest] = outcome_value(outcome)
    return shares


def rank_weighted(outcome: Outcome, retrievals: Sequence[Retrieval]) -> list[float]:
    """Share by 1/rank; an unknown rank counts as the first."""
    return _split(outcome, [1 / (retrieval.rank or 1) for retrieval in retrievals])


def time_decay(
    outcome: Outcome,
    retrievals: Sequence[Retrieval],
    *,
    half_life: timedelta = timedelta(hours=1),
) -> list[float]:
    """Share by 2 ** -(age / half life), the age being the time from retrieval to outcome.

    Raises:
        InputError: a retrieval lies after the outcome, or the half life is not positive.
    """
    if half_life <= timedelta(0):
        raise InputError(f"half_life must be positive, got {half_life}")
    ages = [outcome.at - retrieval.retrieved_at for retrieval in retrievals]
    if any(age < timedelta(0) for age in ages):
        raise InputError(f"a retrieval lies after the outcome at {outcome.at}")
    youngest = min(ages, default=timedelta(0))  # only ratios matter; keeps the weights from 0/0
    return _split(outcome, [2.0 ** -((age - youngest) / half_life) for age in ages])


def weighted(outcome: Outcome, weights: Sequence[float]) -> list[float]:
    """Share by weights of the caller, such as attention.

    Raises:
        InputError: a weight is negative or not finite, or all are 0.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise InputError(f"weights must be finite and not negative, got {list(weights)}")
    if weights and not sum(weights):
        raise InputError("at least one weight must be above 0")
    return _split(outcome, weights)


Attribution = Callable[[Outcome, Sequence[Retrieval]], list[float]]

# the methods that need no weights of the caller
ATTRIBUTIONS: dict[str, Attribution] = {
    "linear": linear,
    "last_touch": last_touch,
    "rank_weighted": rank_weighted,
    "time_decay": time_decay,
}


def normalize_scores(scores: Sequence[float], *, target: float = 1.0) -> list[float]:
    """Rescale the scores so that their absolute values add up to ``target``; all 0 stay 0."""
    total = sum(map(abs, scores))
    return [score * target / total if total else score for score in scores]


def infer_outcome(status: str) -> InferredOutcome:
    """Guess how a task ended from free text such as a status line.

    What is only partly done is looked for first, then failure, then success, so that neither
    ``incomplete`` nor ``unsuccessful`` nor ``completed with errors`` passes for a success;
    ``without errors`` is no failure.
    """
    text = _NO_FAILURE.sub(" ", status)
    for outcome_type, pattern in _STATUS_WORDS.items():
        if pattern.search(text):
            return InferredOutcome(outcome_type, confidence=0.8)
    return InferredOutcome("unknown", confidence=0.5)


_NO_FAILURE = re.compile(
    r"\b(?:no|without|without any|0|zero) (?:errors?|failures?|failed)\b", re.IGNORECASE
)
_STATUS_WORDS: dict[OutcomeType, re.Pattern[str]] = {
    "partial": re.compile(
        r"\b(?:partial|incomplete|unfinished|paused|not (?:yet )?(?:complete|finish))",
        re.IGNORECASE,
    ),
    "failure": re.compile(
        r"\b(?:fail|error|discarded|unsuccessful|(?:no|not|without)(?: a)? succe)", re.IGNORECASE
    ),
    "success": re.compile(r"\b(?:complete|success|succeed)", re.IGNORECASE),
}


def _split(outcome: Outcome, weights: Sequence[float]) -> list[float]:
    value, total = outcome_value(outcome), sum(weights)
    return [value * weight / total for weight in weights]
