"""Training examples, and a table that holds a million of them in little memory.

An example is one decision with its state, its action and the reward it earned. A table keeps each
different state, prompt and action once, the long texts in unnamed temporary files, and numbers in
memory; an example is put together when it is asked for.

Shapes: N examples.
"""

import json
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Generic, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from dpo.data.kinds.base import Action, GroupKey, State, TypedKind
from dpo.data.records import Decision, decision_from_json
from dpo.data.strict_json import decode_json
from dpo.data.texts import DistinctTexts, TextColumn, TextFile, json_line
from dpo.errors import InputError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class ExampleMetadata:
    """Where an example comes from.

    Attributes:
        id: the decision's id.
        session_id: the session it was made in.
        decided_at: when, in UTC.
        confidence: of the deciding policy in its action, in [0, 1].
        propensity: probability with which the deciding policy takes this action here, in (0, 1].
    """

    id: str
    session_id: str
    decided_at: datetime
    confidence: float | None = None
    propensity: float | None = None


@dataclass(frozen=True, slots=True)
class Example(Generic[State, Action]):
    """A decision and what it earned; ``reward`` is in [-1, 1]."""

    state: State
    action: Action
    reward: float
    metadata: ExampleMetadata


class Columns(NamedTuple):
    """What is compared and counted; every column is (N,)."""

    prompts: NDArray[np.int64]  # indices: equal where the prompt texts are equal
    actions: NDArray[np.int64]  # likewise for the responses,
    groups: NDArray[np.int64]  # the grouping keys,
    sessions: NDArray[np.int64]  # and the session ids
    times: NDArray[np.int64]  # microseconds since 1970
    rewards: NDArray[np.float64]
    confidences: NDArray[np.float64]  # NaN where missing


class Examples(Sequence[Example[State, Action]]):
    """Rows of an `ExampleTable`, in an order of their own; each is decoded when it is asked for."""

    def __init__(self, table: "ExampleTable[State, Action]", rows: NDArray[np.int64]) -> None:
        self.table = table
        self.rows = rows
        self.kind = table.kind

    @staticmethod
    def of(
        examples: Iterable[Example[State, Action]], kind: TypedKind[State, Action]
    ) -> "Examples[State, Action]":
        """Put ``examples`` into a table, unless they are in one already."""
        if isinstance(examples, Examples):
            return examples
        table = ExampleTable(kind)
        for example in examples:
            table.append(example)
        return table.all()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example[State, Action]: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples[State, Action]": ...
    def __getitem__(self, index: int | slice) -> "Example[State, Action] | Examples[State, Action]":
        if isinstance(index, slice):
            return Examples(self.table, self.rows[index])
        return self.table.example(int(self.rows[index]))

    def where(self, keep: NDArray[np.bool_]) -> "Examples[State, Action]":
        """Return the rows where ``keep`` (N,) is true."""
        return Examples(self.table, self.rows[keep])

    def line(self, index: int) -> str:
        """Return an example as the JSON it has in a file, without the newline."""
        return self.table.line(int(self.rows[index]))

    def id(self, index: int) -> str:
        """Return the id of an example's decision."""
        return self.table.ids[int(self.rows[index])]

    def metadata(self, index: int) -> ExampleMetadata:
        """Return where an example comes from."""
        return self.table.metadata(int(self.rows[index]))

    def prompt(self, index: int) -> str:
        """Return an example's state as prompt text."""
        table = self.table
        return table.prompts[table.prompt_of_state[table.states[int(self.rows[index])]]]

    def response(self, index: int) -> str:
        """Return an example's action as response text, without ids."""
        table = self.table
        return table.responses[table.response_of_spelling[table.actions[int(self.rows[index])]]]

    def group(self, index: int) -> GroupKey:
        """Return an example's grouping key."""
        state = self.table.states[int(self.rows[index])]
        return self.table.groups[self.table.group_of_state[state]]

    def columns(self) -> Columns:
        """Return copies of the columns."""
        table = self.table
        states, actions = np.array(table.states)[self.rows], np.array(table.actions)[self.rows]
        return Columns(
            prompts=np.array(table.prompt_of_state, dtype=np.int64)[states],
            actions=np.array(table.response_of_spelling, dtype=np.int64)[actions],
            groups=np.array(table.group_of_state, dtype=np.int64)[states],
            sessions=np.array(table.session_of_row, dtype=np.int64)[self.rows],
            times=np.array(table.times)[self.rows],
            rewards=np.array(table.rewards)[self.rows],
            confidences=np.array(table.confidences)[self.rows],
        )


class ExampleTable(Generic[State, Action]):
    """Examples of one kind, in the order of appending; append all before reading any.

    A state or action is parsed and rendered once, however often it occurs.
    """

    def __init__(self, kind: TypedKind[State, Action]) -> None:
        self.kind = kind
        # Texts: each state and action once, what they are rendered to, and what names the rows.
        file = TextFile()
        self.state_texts, self.prompts = DistinctTexts(file), DistinctTexts(file)
        self.spellings, self.responses = DistinctTexts(file), DistinctTexts(file)
        self.action_texts = TextColumn(file)  # of each spelling, as the kind writes it
        self.ids, self.sessions = TextColumn(file), DistinctTexts(file)
        # Indices into them: of each state, of each spelling of an action, of each row.
        self.prompt_of_state, self.group_of_state = array("i"), array("i")
        self.response_of_spelling = array("i")
        self.states, self.actions, self.session_of_row = array("i"), array("i"), array("i")
        # Numbers of each row; NaN where missing.
        self.rewards, self.confidences, self.propensities = array("d"), array("d"), array("d")
        self.times = array("q")  # microseconds since 1970
        self.groups: list[GroupKey] = []
        self._group_index: dict[GroupKey, int] = {}

    def append(self, example: Example[State, Action]) -> None:
        """Add one example."""
        state, action = example.state, example.action
        self._append(
            self._state(json_line(self.kind.state_to_json(state)), lambda: state),
            self._action(json_line(self.kind.action_to_json(action)), lambda: action),
            example.reward,
            example.metadata,
        )

    def append_decision(self, decision: Decision, where: str) -> None:
        """Add a decision with the reward it has, or else the one the kind makes from its outcome.

        A table that refused one is of no more use.

        Raises:
            InputError: ``where``, and what is wrong with the state, action or outcome; or that both
                reward and outcome are missing.
        """
        kind = self.kind
        self._append(
            self._state(
                json_line(decision.state),
                lambda: kind.parse_state(decision.state, f"{where}: state"),
            ),
            self._action(
                json_line(decision.action),
                lambda: kind.parse_action(decision.action, f"{where}: action"),
            ),
            _reward(decision, kind, where) if decision.reward is None else decision.reward,
            decision,
        )

    def all(self) -> Examples[State, Action]:
        """Return every row, in the order of appending."""
        return Examples(self, np.arange(len(self.rewards)))

    def example(self, row: int) -> Example[State, Action]:
        """Put one example together."""
        state = json.loads(self.state_texts[self.states[row]])
        action = json.loads(self.action_texts[self.actions[row]])
        return Example(
            state=self.kind.parse_state(state, f"example {row}: state"),
            action=self.kind.parse_action(action, f"example {row}: action"),
            reward=self.rewards[row],
            metadata=self.metadata(row),
        )

    def line(self, row: int) -> str:
        """Return one example as JSON, put together from the texts of its parts."""
        time = np.datetime64(self.times[row], "us")
        return (
            f'{{"state":{self.state_texts[self.states[row]]},'
            f'"action":{self.action_texts[self.actions[row]]},'
            f'"reward":{self.rewards[row]!r},'
            f'"metadata":{{"id":{json_line(self.ids[row])},'
            f'"sessionId":{json_line(self.sessions[self.session_of_row[row]])},'
            f'"decidedAt":"{time}Z",'
            f'"confidence":{_number_or_null(self.confidences[row])},'
            f'"propensity":{_number_or_null(self.propensities[row])}}}}}'
        )

    def _append(
        self, state: int, action: int, reward: float, source: Decision | ExampleMetadata
    ) -> None:
        self.states.append(state)
        self.actions.append(action)
        self.rewards.append(reward)
        self.ids.append(source.id)
        self.session_of_row.append(self.sessions.index_of(source.session_id))
        self.times.append((source.decided_at - _EPOCH) // _MICROSECOND)
        self.confidences.append(_nan_for_none(source.confidence))
        self.propensities.append(_nan_for_none(source.propensity))

    def metadata(self, row: int) -> ExampleMetadata:
        """Return where one example comes from."""
        return ExampleMetadata(
            id=self.ids[row],
            session_id=self.sessions[self.session_of_row[row]],
            decided_at=_EPOCH + self.times[row] * _MICROSECOND,
            confidence=_none_for_nan(self.confidences[row]),
            propensity=_none_for_nan(self.propensities[row]),
        )

    def _state(self, text: str, parse: Callable[[], State]) -> int:
        """Return the index of a state, which is parsed and rendered if it is new."""
        index = self.state_texts.index_of(text)
        if index == len(self.prompt_of_state):
            state = parse()
            self.prompt_of_state.append(self.prompts.index_of(self.kind.render_prompt(state)))
            key = self.kind.group_key(state)
            group = self._group_index.setdefault(key, len(self.groups))
            self.group_of_state.append(group)
            if group == len(self.groups):
                self.groups.append(key)
        return index

    def _action(self, text: str, parse: Callable[[], Action]) -> int:
        """Return the index of an action's spelling, which is parsed and rendered if it is new.

        Spellings with one response are one action to compare: 80 and 80.0, or other ids.
        """
        spelling = self.spellings.index_of(text)
        if spelling == len(self.response_of_spelling):
            action, kind = parse(), self.kind
            response = kind.render_action(kind.without_ids(action))
            self.response_of_spelling.append(self.responses.index_of(response))
            self.action_texts.append(json_line(kind.action_to_json(action)))
        return spelling


def check_decision(decision: Decision, kind: TypedKind[State, Action], where: str) -> None:
    """Refuse a decision that no table takes.

    Raises:
        InputError: as `ExampleTable.append_decision`.
    """
    kind.parse_state(decision.state, f"{where}: state")
    kind.parse_action(decision.action, f"{where}: action")
    if decision.reward is None:
        _reward(decision, kind, where)


def read_examples(path: Path, kind: TypedKind[State, Action]) -> Examples[State, Action]:
    """Read a file of examples, one JSON object a line.

    Raises:
        InputError: no such file, or a line that holds no example of this kind.
    """
    table = ExampleTable(kind)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                row = decode_json(line, where)
                table.append_decision(_decision(row, kind.name, where), where)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file of examples") from error
    return table.all()


def _decision(row: object, policy: str, where: str) -> Decision:
    """Return the decision that a row of an examples file was made from."""
    metadata = row.get("metadata") if isinstance(row, Mapping) else None
    if not isinstance(row, Mapping) or not isinstance(metadata, Mapping):
        raise InputError(f"{where}: expected an object with state, action, reward and metadata")
    record = {name: row.get(name) for name in ("state", "action", "reward")}
    record |= {name: metadata.get(name) for name in ("id", "confidence", "propensity")}
    record |= {"session_id": metadata.get("sessionId"), "decided_at": metadata.get("decidedAt")}
    return decision_from_json({"policy": policy, **record}, where)


def _reward(decision: Decision, kind: TypedKind[State, Action], where: str) -> float:
    """Work out the reward of a decision from its outcome."""
    if decision.outcome is None:
        raise InputError(f"{where}: it has neither a reward nor an outcome")
    action = kind.parse_action(decision.action, f"{where}: action")
    try:
        return kind.reward(decision.outcome, action).value
    except InputError as error:
        raise InputError(f"{where}: outcome: {error}") from error


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value


def _number_or_null(value: float) -> str:
    return "null" if math.isnan(value) else repr(value)


def _none_for_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
