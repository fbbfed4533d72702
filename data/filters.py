"""Which decisions of a feedback store are wanted."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from typing import Literal, TypeAlias, get_args

from dpo.data.records import Decision, parse_time
from dpo.errors import InputError
from dpo.files import JSON

Bound: TypeAlias = datetime | date | str
MissingConfidence = Literal["keep", "drop"]


@dataclass(frozen=True, slots=True)
class DecisionFilter:
    """What a decision must satisfy; None leaves a condition out.

    Stores yield what is left in the order of ``decided_at``, then ``id``, and apply ``limit`` last:
    it takes the oldest decisions that satisfy all the rest.

    Attributes:
        policy: name of the decision's policy.
        start: first moment, included: a datetime, a date or ISO 8601 text; UTC without an offset.
        end: last moment, included; a date without a time of day is that whole day.
        sessions: the decision's session is one of these.
        entry_types: an entry type of the action (``entryType``, ``types``) or else of the state's
            group (``groupFeatures.entryTypes``) is one of these; a decision without any is dropped.
        scope_types: the action's ``scope``, or else the state's ``scopeStats.scopeType``, is one of
            these.
        outcome_types: the outcome's ``taskOutcomeType`` (or ``outcomeType``) is one of these.
        min_confidence: least confidence, included, in [0, 1].
        missing_confidence: what ``min_confidence`` does with a decision without a confidence.
        only_with_outcomes: a reward or an outcome is known; a reward of exactly 0 is one.
        limit: most decisions to take, at least 1.
        first_moment: ``start`` in UTC; not given but computed.
        last_moment: ``end`` in UTC, still included; not given but computed.

    Raises:
        InputError: a value is out of range, not a date, or contradicts another.
    """

    policy: str | None = None
    start: Bound | None = None
    end: Bound | None = None
    sessions: Collection[str] | None = None
    entry_types: Collection[str] | None = None
    scope_types: Collection[str] | None = None
    outcome_types: Collection[str] | None = None
    min_confidence: float | None = None
    missing_confidence: MissingConfidence = "drop"
    only_with_outcomes: bool = False
    limit: int | None = None
    first_moment: datetime | None = field(init=False, repr=False, compare=False)
    last_moment: datetime | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        first = None if self.start is None else parse_moment("start", self.start)
        last = None if self.end is None else parse_moment("end", self.end, time_of_day=time.max)
        object.__setattr__(self, "first_moment", first)
        object.__setattr__(self, "last_moment", last)
        if first and last and first > last:
            raise InputError(f"start {self.start} is after end {self.end}")
        if self.min_confidence is not None and not _is_share(self.min_confidence):
            raise InputError(f"min_confidence must be in [0, 1], got {self.min_confidence!r}")
        if self.missing_confidence not in get_args(MissingConfidence):
            raise InputError(
                f"missing_confidence must be keep or drop, got {self.missing_confidence!r}"
            )
        if self.missing_confidence == "keep" and self.min_confidence is None:
            raise InputError("missing_confidence has no effect without min_confidence")
        if self.limit is not None and (type(self.limit) is not int or self.limit < 1):
            raise InputError(f"limit must be a whole number of at least 1, got {self.limit!r}")
        for name in ("sessions", "entry_types", "scope_types", "outcome_types"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str) or not all(isinstance(each, str) for each in value):
                raise InputError(f"{name} must be several texts, got {value!r}")
            object.__setattr__(self, name, frozenset(value))

    def refusals(self, decision: Decision) -> Iterator[str]:
        """Yield the names of the conditions that a decision fails, as the user wrote them."""
        if self.policy not in (None, decision.policy):
            yield "policy"
        if self.first_moment is not None and decision.decided_at < self.first_moment:
            yield "start"
        if self.last_moment is not None and decision.decided_at > self.last_moment:
            yield "end"
        if self.sessions is not None and decision.session_id not in self.sessions:
            yield "sessions"
        if self.entry_types is not None and not any(
            name in self.entry_types for name in entry_types(decision)
        ):
            yield "entry_types"
        if self.scope_types is not None and scope_type(decision) not in self.scope_types:
            yield "scope_types"
        if self.outcome_types is not None and outcome_type(decision) not in self.outcome_types:
            yield "outcome_types"
        if self._lacks_confidence(decision.confidence):
            yield "min_confidence"
        if self.only_with_outcomes and not decision.has_outcome:
            yield "only_with_outcomes"

    def accepts(self, decision: Decision) -> bool:
        """Return whether a decision satisfies every condition; ``limit`` is not looked at."""
        return next(self.refusals(decision), None) is None

    def _lacks_confidence(self, confidence: float | None) -> bool:
        if self.min_confidence is None:
            return False
        if confidence is None:
            return self.missing_confidence == "drop"
        return confidence < self.min_confidence


def entry_types(decision: Decision) -> list[str]:
    """Return the entry types that an action names, or else those of the group it is about."""
    action = decision.action
    found = [action.get("entryType"), *_texts(action.get("types"))]
    named = [value for value in found if isinstance(value, str)]
    return named or _texts(_member(decision.state, "groupFeatures", "entryTypes"))


def scope_type(decision: Decision) -> str | None:
    """Return the scope that an action names, or else that of its state."""
    scope = decision.action.get("scope") or _member(decision.state, "scopeStats", "scopeType")
    return scope if isinstance(scope, str) else None


def outcome_type(decision: Decision) -> str | None:
    """Return how the task ended, if the outcome says it."""
    outcome = decision.outcome or {}
    kind = outcome.get("taskOutcomeType") or outcome.get("outcomeType")
    return kind if isinstance(kind, str) else None


def parse_moment(name: str, bound: Bound, *, time_of_day: time = time.min) -> datetime:
    """Return a moment in UTC; what has no time of day is at ``time_of_day`` of that date.

    Raises:
        InputError: a text that is neither a date nor a time in ISO 8601; it begins with ``name``.
    """
    if isinstance(bound, str):
        bound = _parse_bound(name, bound)
    elif not isinstance(bound, date):
        raise InputError(f"{name} must be a date, a datetime or text, got {bound!r}")
    if not isinstance(bound, datetime):
        bound = datetime.combine(bound, time_of_day)
    return bound.replace(tzinfo=UTC) if bound.tzinfo is None else bound.astimezone(UTC)


def _parse_bound(name: str, text: str) -> datetime | date:
    try:
        return date.fromisoformat(text)
    except ValueError:  # more than a date, or less
        try:
            return parse_time(text)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _member(content: Mapping[str, JSON], group: str, name: str) -> JSON:
    inner = content.get(group)
    return inner.get(name) if isinstance(inner, Mapping) else None


def _texts(value: JSON) -> list[str]:
    if not isinstance(value, list | tuple):
        return []
    return [item for item in value if isinstance(item, str)]
