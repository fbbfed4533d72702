"""What a policy is evaluated on: states, the actions that were taken, and what they earned.

Read from the JSON Lines that the dataset builder writes beside its pairs, or given as examples or
decisions of ``dpo.data``, or as the mappings ``{"state", "expected_action", "reward"}``. What else
is known of a decision, such as its session and propensity, stands in the ``metadata`` of a mapping,
as the builder writes it, or beside the state, as in a line of a feedback log.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from dpo.data.examples import Example
from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.records import Decision
from dpo.errors import InputError
from dpo.eval.policies import Action, State
from dpo.preferences import file_rows

ACTION_NAMES = ("expected_action", "expectedAction", "action")
ABOUT = {  # names in a feedback log: names in the metadata of an example
    "id": "id",
    "session_id": "sessionId",
    "decided_at": "decidedAt",
    "propensity": "propensity",
}
SHOWN_FAULTS = 5
JSONObject: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EvaluationExample:
    """One logged decision."""

    state: State
    expected_action: Action
    """The action that was taken; whether it was good is what ``reward`` says."""
    reward: float
    """What the action earned, in [-1, 1]."""
    id: str
    session_id: str
    """Examples of one session are not independent."""
    decided_at: datetime | None = None
    propensity: float | None = None
    """Chance with which the deciding policy took this action here, in (0, 1]."""


@dataclass(frozen=True, slots=True)
class ExampleFile:
    """The examples of a file, and the kind that they are of."""

    kind: PolicyKind
    examples: list[EvaluationExample]


def read_examples(path: str | Path) -> ExampleFile:
    """Read examples from JSON Lines (also ``.gz``) and refuse data that cannot tell policies apart.

    The kind is that of the first line (see ``detect_kind``).

    Raises:
        InputError: no such file, no examples, lines that are no examples of this kind or repeat an
            id (all faults together), or examples that all have the same action class.
    """
    path = Path(path)
    rows = _read_rows(path)
    (first_place, first), *_ = rows
    kind = detect_kind(first, first_place)
    examples: list[EvaluationExample] = []
    faults: list[str] = []
    place_of_id: dict[str, str] = {}
    for number, (place, row) in enumerate(rows, start=1):
        try:
            example = _parse(row, kind, place, str(number))
            if (earlier := place_of_id.setdefault(example.id, place)) != place:
                raise InputError(f"{place}: the id {example.id!r} is already that of {earlier}")
            examples.append(example)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError(_listed(faults, len(rows), kind))
    classes = {kind.action_class(example.expected_action) for example in examples}
    if len(classes) == 1:
        raise InputError(
            f"{path}: all {len(rows)} examples have the action class {classes.pop()!r}; a policy "
            "that always says so would look perfect: evaluate on at least two classes"
        )
    return ExampleFile(kind, examples)


def detect_kind(row: object, where: str) -> PolicyKind:
    """Return the one kind whose states have the groups that ``row["state"]`` has.

    Raises:
        InputError: no kind, or more than one, reads the state.
    """
    state = row.get("state") if isinstance(row, Mapping) else None
    fitting = [kind for kind in KINDS.values() if _reads(kind, state)]
    if len(fitting) == 1:
        return fitting[0]
    raise InputError(
        f"{where}: expected an example with a state of one of the kinds {', '.join(KINDS)}; "
        f"{len(fitting)} of them read this state"
    )


def as_examples(items: Iterable[object], kind: PolicyKind) -> list[EvaluationExample]:
    """Bring examples of any of the accepted forms into one.

    Raises:
        InputError: an item of no such form, a state or an action that is not of ``kind``, a reward
            that is not finite or a propensity outside (0, 1]; no items at all.
    """
    examples = [_convert(item, kind, index) for index, item in enumerate(items)]
    if not examples:
        raise InputError("test_data is empty: there is nothing to evaluate on")
    _check_kind(examples, kind)
    return examples


def _convert(item: object, kind: PolicyKind, index: int) -> EvaluationExample:
    where = f"test_data[{index}]"
    if isinstance(item, Mapping):
        return _parse(item, kind, where, str(index))
    if isinstance(item, Decision):
        return _checked(_of_decision(item, kind, where), where)
    if isinstance(item, Example):
        about = item.metadata
        item = EvaluationExample(
            item.state, item.action, item.reward, about.id, about.session_id, about.decided_at,
            about.propensity,
        )  # fmt: skip
    if isinstance(item, EvaluationExample):
        return _checked(item, where)
    raise InputError(
        f"{where}: expected an example or a decision of dpo.data, or a mapping with state, "
        f"expected_action and reward, got {type(item).__name__}"
    )


def _of_decision(decision: Decision, kind: PolicyKind, where: str) -> EvaluationExample:
    reward = decision.reward
    if reward is None:
        raise InputError(f"{where}: decision {decision.id!r} has no reward yet; leave it out")
    return EvaluationExample(
        kind.parse_state(decision.state, f"{where}: state"),
        kind.parse_action(decision.action, f"{where}: action"),
        reward,
        decision.id,
        decision.session_id,
        decision.decided_at,
        decision.propensity,
    )


def _check_kind(examples: Sequence[EvaluationExample], kind: PolicyKind) -> None:
    """Refuse states that were parsed by another kind; one type stands for all of its states."""
    types = {type(example.state): example for example in examples}
    for example in types.values():
        try:
            kind.parse_state(kind.state_to_json(example.state), f"example {example.id!r}: state")
        except (InputError, TypeError) as error:
            raise InputError(f"not examples of {kind.name}: {error}") from error


def _parse(row: object, kind: PolicyKind, where: str, number: str) -> EvaluationExample:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    action = next((row[name] for name in ACTION_NAMES if name in row), None)
    missing = [name for name in ("state", "reward") if name not in row]
    if missing or action is None:
        names = missing + ([ACTION_NAMES[0]] if action is None else [])
        raise InputError(f"{where}: not an example: missing {', '.join(names)}")
    about = _about(row, where)
    state = row["state"]
    example = EvaluationExample(
        state=kind.parse_state(state, f"{where}: state") if isinstance(state, Mapping) else state,
        expected_action=(
            kind.parse_action(action, f"{where}: action") if isinstance(action, Mapping) else action
        ),
        reward=row["reward"],
        id=str(about.get("id", number)),
        session_id=str(about.get("sessionId", f"example {number}")),
        decided_at=_parse_time(about.get("decidedAt"), where),
        propensity=about.get("propensity"),
    )
    return _checked(example, where)


def _about(row: JSONObject, where: str) -> JSONObject:
    """Return what is known of a decision, by its names in ``metadata``; nulls are left out."""
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise InputError(f"{where}: metadata must be an object, got {metadata!r}")
    beside = {ABOUT[name]: value for name, value in row.items() if name in ABOUT}
    return {name: value for name, value in (beside | {**metadata}).items() if value is not None}


def _checked(example: EvaluationExample, where: str) -> EvaluationExample:
    reward, propensity = example.reward, example.propensity
    if not _is_number(reward) or not -1.0 <= reward <= 1.0:
        raise InputError(f"{where}: reward must be a number in [-1, 1], got {reward!r}")
    if propensity is not None and not (_is_number(propensity) and 0.0 < propensity <= 1.0):
        raise InputError(f"{where}: propensity must be a number in (0, 1], got {propensity!r}")
    return example


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN; whole numbers may be larger


def _parse_time(text: object, where: str) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError as error:
        raise InputError(f"{where}: decidedAt must be an ISO 8601 time, got {text!r}") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _reads(kind: PolicyKind, state: object) -> bool:
    try:
        kind.parse_state(state, "state")
    except InputError:
        return False
    return True


def _read_rows(path: Path) -> list[tuple[str, object]]:
    """Return the rows of a file, each with its place."""
    if path.is_dir():
        found = sorted(path.glob("*_examples_eval.jsonl"))
        hint = f": name {found[0]}" if found else ", expected a file of examples"
        raise InputError(f"{path} is a folder{hint}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected examples, one JSON object a line")
    if path.suffix in (".db", ".sqlite", ".sqlite3"):
        raise InputError(f"{path} is a feedback store: dpo data build makes examples of it")
    rows: list[tuple[str, object]] = []
    for row in file_rows([path]):
        try:
            rows.append((row.place, row.decode()))
        except InputError as error:
            raise InputError(f"{row.place}: {error}") from error
    if not rows:
        raise InputError(f"{path} holds no examples: there is nothing to evaluate on")
    return rows


def _listed(faults: Sequence[str], rows: int, kind: PolicyKind) -> str:
    shown = "\n".join(faults[:SHOWN_FAULTS])
    more = f"\nand {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    return f"{len(faults)} of {rows} lines are no {kind.name} examples:\n{shown}{more}"
