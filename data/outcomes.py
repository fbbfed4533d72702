"""What became of a decision, counted from what was retrieved afterwards.

An agent that logs retrievals, and how the tasks ended that used them, need not keep counts: these
functions turn the log into the outcome that a kind's reward is computed from. A retrieval counts
once, and only within the window; what lies before a decision is no consequence of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from dpo.data.attribution import OutcomeType
from dpo.data.kinds.consolidation import ConsolidationOutcome
from dpo.data.kinds.extraction import StoredOutcome
from dpo.data.kinds.schema import to_json
from dpo.errors import InputError
from dpo.files import JSON

_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Use:
    """One retrieval of an entry, and how the task ended that used it; None is not known yet."""

    at: datetime
    ended: OutcomeType | None = None


def stored_outcome(
    stored_at: datetime,
    uses: Iterable[Use],
    *,
    evaluated_at: datetime,
    window: timedelta | None = None,
) -> dict[str, JSON]:
    """Return the outcome of a decision to store an entry.

    Args:
        stored_at: when it was decided.
        uses: retrievals of that entry, in any order.
        evaluated_at: until when they are known.
        window: how long after the decision they count; None is until ``evaluated_at``. A task that
            was partly done, or whose end is unknown, is neither a success nor a failure.

    Raises:
        InputError: evaluated before it was decided, or the window is not positive.
    """
    if evaluated_at < stored_at:
        raise InputError(f"evaluated at {evaluated_at}, before the decision at {stored_at}")
    _check_window(window)
    end = evaluated_at if window is None else min(evaluated_at, stored_at + window)
    counted = _between(uses, stored_at, end)
    return to_json(
        StoredOutcome(
            retrieval_count=len(counted),
            success_count=_count(counted, "success"),
            failure_count=_count(counted, "failure"),
            days_since_creation=(evaluated_at - stored_at) // _DAY,
        )
    )


def consolidation_outcome(
    decided_at: datetime,
    uses: Iterable[Use],
    *,
    evaluated_at: datetime,
    window: timedelta,
    entries_before: int,
    entries_after: int,
) -> dict[str, JSON]:
    """Return the outcome of a consolidation: rates in the windows before and after it.

    Args:
        decided_at: when it was decided.
        uses: retrievals of the group's entries and of those that replaced them, in any order.
        evaluated_at: until when they are known.
        window: length of each of the two windows.
        entries_before: entries of the group before.
        entries_after: entries that stand for the group afterwards.

    Raises:
        InputError: the window is not positive, or not over yet.
    """
    _check_window(window)
    if evaluated_at < decided_at + window:
        raise InputError(
            f"the window after the decision ends at {decided_at + window}, evaluated at "
            f"{evaluated_at}: wait, or choose a shorter one"
        )
    uses = list(uses)
    before = [use for use in _between(uses, decided_at - window, decided_at) if use.at < decided_at]
    after = _between(uses, decided_at, decided_at + window)
    days = window / _DAY
    return to_json(
        ConsolidationOutcome(
            pre_retrieval_rate=len(before) / days,
            post_retrieval_rate=len(after) / days,
            pre_success_rate=_success_rate(before),
            post_success_rate=_success_rate(after),
            pre_storage_count=entries_before,
            post_storage_count=entries_after,
        )
    )


def _check_window(window: timedelta | None) -> None:
    if window is not None and window <= timedelta(0):
        raise InputError(f"window must be positive, got {window}")


def _between(uses: Iterable[Use], start: datetime, end: datetime) -> list[Use]:
    return [use for use in uses if start <= use.at <= end]


def _count(uses: Sequence[Use], ended: OutcomeType) -> int:
    return sum(use.ended == ended for use in uses)


def _success_rate(uses: Sequence[Use]) -> float:
    """Return the successes among the tasks that clearly succeeded or failed; 0 if none did."""
    successes, failures = _count(uses, "success"), _count(uses, "failure")
    return successes / (successes + failures) if successes + failures else 0.0
