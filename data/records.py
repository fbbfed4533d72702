"""One decision of an agent, and the outcome that may arrive later, as feedback stores keep them.

On disk a decision is one JSON object, here broken into lines::

    {"id": "d-1", "policy": "extraction", "session_id": "s-1",
     "decided_at": "2024-05-01T09:30:00Z", "state": {...}, "action": {...},
     "confidence": 0.8, "propensity": 0.5, "reward": 1.0, "outcome": {...}}

``state`` and ``action`` hold what the policy's kind defines, in its own camelCase names, as it was
when the decision was made. The last four keys may be missing. An outcome that arrives later is an
object of its own::

    {"decision_id": "d-1", "at": "2024-05-02T08:00:00Z", "reward": 1.0, "outcome": {...}}

Times are ISO 8601; an offset or ``Z`` is honoured, a time without either is UTC.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from dpo.data.strict_json import decode_json, encode_json
from dpo.errors import InputError
from dpo.files import JSON

__all__ = [
    "SIMULATED_PREFIX",
    "Decision",
    "DecisionOutcome",
    "decision_from_json",
    "decision_to_json",
    "decode_json",
    "encode_json",
    "format_time",
    "is_simulated",
    "outcome_from_json",
    "outcome_to_json",
    "parse_time",
]

SIMULATED_PREFIX = "simulated-"  # of every id that the simulator gives

Record = TypeVar("Record")


def is_simulated(session_id: str) -> bool:
    """Return whether a session is the simulator's: nobody observed it."""
    return session_id.startswith(SIMULATED_PREFIX)


@dataclass(frozen=True, slots=True)
class Decision:
    """What one policy saw, what it did, and how good that turned out to be.

    Attributes:
        id: unique in its store.
        policy: name of the policy's kind.
        session_id: the session in which it was made; a split keeps sessions whole.
        decided_at: an aware time, kept in UTC.
        state: the state features, as they were at that moment.
        action: what was done.
        confidence: of the policy in its action, in [0, 1].
        propensity: probability with which the policy takes this action in this state, in (0, 1].
        reward: in [-1, 1].
        outcome: what was observed afterwards, as the kind defines it.

    Raises:
        InputError: a value is of another type or out of range; every such fault is named.
    """

    id: str
    policy: str
    session_id: str
    decided_at: datetime
    state: Mapping[str, JSON]
    action: Mapping[str, JSON]
    confidence: float | None = None
    propensity: float | None = None
    reward: float | None = None
    outcome: Mapping[str, JSON] | None = None

    def __post_init__(self) -> None:
        if faults := _faults(self, _DECISION):
            raise InputError(f"decision {self.id!r}: {'; '.join(faults)}")
        _set_utc(self, "decided_at")
        _set_floats(self, "confidence", "propensity", "reward")

    @property
    def has_outcome(self) -> bool:
        """Whether it is known how good the decision was; a reward of 0 is knowledge."""
        return self.reward is not None or self.outcome is not None


@dataclass(frozen=True, slots=True)
class DecisionOutcome:
    """What became of a decision, as known at one time.

    Attributes:
        decision_id: the decision it belongs to.
        at: when this was known, an aware time, kept in UTC.
        reward: in [-1, 1].
        outcome: what was observed, as the kind defines it; reward, outcome or both are given.

    Raises:
        InputError: a value is of another type or out of range, or nothing is given.
    """

    decision_id: str
    at: datetime
    reward: float | None = None
    outcome: Mapping[str, JSON] | None = None

    def __post_init__(self) -> None:
        faults = _faults(self, _OUTCOME)
        if self.reward is None and self.outcome is None:
            faults.append("it needs a reward, an outcome or both")
        if faults:
            raise InputError(f"outcome of decision {self.decision_id!r}: {'; '.join(faults)}")
        _set_utc(self, "at")
        _set_floats(self, "reward")


def decision_from_json(value: object, where: str) -> Decision:
    """Return the decision that decoded JSON holds.

    Raises:
        InputError: ``where`` and every fault: what is missing, unknown, of another type or out of
            range.
    """
    return _read(value, _DECISION, Decision, where)


def decision_to_json(decision: Decision) -> dict[str, JSON]:
    """Return the documented record; what is not known is left out."""
    return _record(decision, _DECISION)


def outcome_from_json(value: object, where: str) -> DecisionOutcome:
    """Return the outcome that decoded JSON holds.

    Raises:
        InputError: ``where`` and every fault, as in `decision_from_json`.
    """
    return _read(value, _OUTCOME, DecisionOutcome, where)


def outcome_to_json(outcome: DecisionOutcome) -> dict[str, JSON]:
    """Return the documented record; what is not known is left out."""
    return _record(outcome, _OUTCOME)


def parse_time(text: str) -> datetime:
    """Return an ISO 8601 date or time in UTC; without an offset it is taken as UTC.

    Raises:
        InputError: it is not ISO 8601, or not a time in the years 1 to 9999.
    """
    try:
        time = datetime.fromisoformat(text)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{text!r} is not an ISO 8601 time such as 2024-05-01T09:30:00Z: {error}"
        ) from error


def format_time(time: datetime) -> str:
    """Return an aware time in UTC, always in 27 letters: the order of texts is that of times."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")[:26] + "Z"


def _read(
    value: object, rules: "Mapping[str, _Rule]", make: Callable[..., Record], where: str
) -> Record:
    """Return the record that decoded JSON holds, or report all that is wrong with it."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected a JSON object, got {_shown(value)}")
    values = {name: value.get(name) for name in rules}
    faults = []
    if unknown := value.keys() - rules.keys():
        names = ", ".join(sorted(map(_shown, unknown)))
        faults.append(f"unknown key {names}, expected only {', '.join(rules)}")
    time_name = "decided_at" if "decided_at" in rules else "at"
    if isinstance(text := values[time_name], str):
        try:
            values[time_name] = parse_time(text)
        except InputError as error:
            faults.append(f"{time_name}: {error}")
            values[time_name] = _EPOCH  # to look at the other fields
    try:
        record = make(**values)
    except InputError as error:
        raise InputError(f"{where}: {'; '.join([*faults, str(error)])}") from error
    if faults:
        raise InputError(f"{where}: {'; '.join(faults)}")
    return record


def _record(source: Decision | DecisionOutcome, rules: "Mapping[str, _Rule]") -> dict[str, JSON]:
    record = {name: value for name in rules if (value := getattr(source, name)) is not None}
    for name in ("decided_at", "at"):
        if name in record:
            record[name] = format_time(record[name])
    return record


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a field must hold; a field that is not required may be None."""

    expected: str
    holds: Callable[[Any], bool]
    is_required: bool = False


def _faults(record: object, rules: Mapping[str, _Rule]) -> list[str]:
    faults = []
    for name, rule in rules.items():
        value = getattr(record, name)
        if value is None:
            if rule.is_required:
                faults.append(f"{name} is missing")
        elif not rule.holds(value):
            faults.append(f"{name} must be {rule.expected}, got {_shown(value)}")
    return faults


def _is_text(value: object) -> bool:
    """Whether every store can hold the text: PostgreSQL has no NUL, UTF-8 no surrogates."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_aware(value: object) -> bool:
    return isinstance(value, datetime) and value.tzinfo is not None


def _is_object(value: object) -> bool:
    return isinstance(value, dict | Mapping)  # a dict is the common case, and faster to tell


_TEXT = _Rule("a text of at least one letter, without NUL", _is_text, is_required=True)
_TIME = _Rule("an ISO 8601 time (in Python: an aware datetime)", _is_aware, is_required=True)
_OBJECT = _Rule("an object", _is_object)
_REWARD = _Rule("a number in [-1, 1]", lambda value: _is_number(value) and -1 <= value <= 1)
_DECISION = {
    "id": _TEXT,
    "policy": _TEXT,
    "session_id": _TEXT,
    "decided_at": _TIME,
    "state": _Rule("an object", _is_object, is_required=True),
    "action": _Rule("an object", _is_object, is_required=True),
    "confidence": _Rule("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1),
    "propensity": _Rule("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1),
    "reward": _REWARD,
    "outcome": _OBJECT,
}
_OUTCOME = {"decision_id": _TEXT, "at": _TIME, "reward": _REWARD, "outcome": _OBJECT}
_EPOCH = datetime.fromtimestamp(0, UTC)


def _set_utc(record: Decision | DecisionOutcome, name: str) -> None:
    time: datetime = getattr(record, name)
    if time.tzinfo is not UTC:
        object.__setattr__(record, name, time.astimezone(UTC))


def _set_floats(record: Decision | DecisionOutcome, *names: str) -> None:
    for name in names:
        if isinstance(value := getattr(record, name), int):  # JSON has one type of number
            object.__setattr__(record, name, float(value))


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
