"""Training examples, and a table that holds a million of them in little memory.

An example is one decision with its state, its action and the reward it earned. A table keeps the
texts (each example's JSON line and prompt) in unnamed temporary files and only numbers in memory;
an example is decoded when it is asked for.

Shapes: N examples.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Generic, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from dpo.data.kinds.base import Action, State, TypedKind
from dpo.data.records import Decision, decision_from_json, encode_json, format_time
from dpo.errors import InputError
from dpo.files import JSON

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
    actions: NDArray[np.int64]  # likewise for the response texts,
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
        return example_from_json(json.loads(self.line(index)), self.kind, f"example {index}")

    def where(self, keep: NDArray[np.bool_]) -> "Examples[State, Action]":
        """Return the rows where ``keep`` (N,) is true."""
        return Examples(self.table, self.rows[keep])

    def line(self, index: int) -> str:
        """Return an example as the JSON it has in a file, without the newline."""
        return self.table.lines[int(self.rows[index])]

    def id(self, index: int) -> str:
        """Return the id of an example's decision."""
        return str(json.loads(self.line(index))["metadata"]["id"])

    def prompt(self, index: int) -> str:
        """Return an example's state as prompt text."""
        return self.table.prompt_texts[int(self.rows[index])]

    def response(self, index: int) -> str:
        """Return an example's action as response text."""
        return self.table.action_texts[self.table.actions[int(self.rows[index])]]

    def group(self, index: int) -> JSON:
        """Return an example's grouping key."""
        key: JSON = json.loads(self.table.group_texts[self.table.groups[int(self.rows[index])]])
        return key

    def columns(self) -> Columns:
        """Return copies of the columns."""
        table = self.table
        indices = (table.prompts, table.actions, table.groups, table.sessions, table.times)
        prompts, actions, groups, sessions, times = (
            np.array(column, dtype=np.int64)[self.rows] for column in indices
        )
        rewards = np.array(table.rewards)[self.rows]
        confidences = np.array(table.confidences)[self.rows]
        return Columns(prompts, actions, groups, sessions, times, rewards, confidences)


class ExampleTable(Generic[State, Action]):
    """Examples of one kind, in the order of appending; append all before reading any."""

    def __init__(self, kind: TypedKind[State, Action]) -> None:
        self.kind = kind
        self.lines, self.prompt_texts = _TextFile(), _TextFile()
        self.action_texts, self.group_texts = _Distinct(), _Distinct()
        self.session_texts = _Distinct()
        self.prompts, self.actions = array("i"), array("i")
        self.groups, self.sessions = array("i"), array("i")
        self.rewards, self.confidences, self.times = array("d"), array("d"), array("q")
        self._prompt_digests: dict[bytes, int] = {}

    def append(self, example: Example[State, Action]) -> None:
        """Add one example."""
        kind, metadata = self.kind, example.metadata
        prompt = kind.render_prompt(example.state)
        digest = hashlib.blake2b(prompt.encode(), digest_size=16).digest()
        self.lines.append(encode_json(example_to_json(example, kind)))
        self.prompt_texts.append(prompt)
        self.prompts.append(self._prompt_digests.setdefault(digest, len(self._prompt_digests)))
        self.actions.append(self.action_texts.index_of(kind.render_action(example.action)))
        self.groups.append(self.group_texts.index_of(encode_json(kind.group_key(example.state))))
        self.sessions.append(self.session_texts.index_of(metadata.session_id))
        self.rewards.append(example.reward)
        self.confidences.append(math.nan if metadata.confidence is None else metadata.confidence)
        self.times.append((metadata.decided_at - _EPOCH) // timedelta(microseconds=1))

    def all(self) -> Examples[State, Action]:
        """Return every row, in the order of appending."""
        return Examples(self, np.arange(len(self.rewards)))


def example_to_json(
    example: Example[State, Action], kind: TypedKind[State, Action]
) -> dict[str, JSON]:
    """Return an example under its names on disk."""
    metadata = example.metadata
    return {
        "state": kind.state_to_json(example.state),
        "action": kind.action_to_json(example.action),
        "reward": example.reward,
        "metadata": {
            "id": metadata.id,
            "sessionId": metadata.session_id,
            "decidedAt": format_time(metadata.decided_at),
            "confidence": metadata.confidence,
            "propensity": metadata.propensity,
        },
    }


def example_from_json(
    row: object, kind: TypedKind[State, Action], where: str
) -> Example[State, Action]:
    """Return the example that a decoded line of an examples file holds.

    Raises:
        InputError: ``where``, and what is missing or wrong.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("metadata"), Mapping):
        raise InputError(f"{where}: expected an object with state, action, reward and metadata")
    metadata = row["metadata"]
    record = {name: row.get(name) for name in ("state", "action", "reward")}
    record |= {name: metadata.get(name) for name in ("id", "confidence", "propensity")}
    record |= {"session_id": metadata.get("sessionId"), "decided_at": metadata.get("decidedAt")}
    return example_from_decision(
        decision_from_json({"policy": kind.name, **record}, where), kind, where
    )


def example_from_decision(
    decision: Decision, kind: TypedKind[State, Action], where: str
) -> Example[State, Action]:
    """Return a decision with its state and action typed, and its reward worked out.

    A reward that was recorded is taken; otherwise the kind makes one from the outcome.

    Raises:
        InputError: ``where``, and what is wrong with the state, action or outcome; or that there is
            neither a reward nor an outcome.
    """
    action = kind.parse_action(decision.action, f"{where}: action")
    reward = decision.reward
    if reward is None:
        if decision.outcome is None:
            raise InputError(f"{where}: it has neither reward nor outcome")
        try:
            reward = kind.reward(decision.outcome, action).value
        except InputError as error:
            raise InputError(f"{where}: outcome: {error}") from error
    return Example(
        state=kind.parse_state(decision.state, f"{where}: state"),
        action=action,
        reward=reward,
        metadata=ExampleMetadata(
            id=decision.id,
            session_id=decision.session_id,
            decided_at=decision.decided_at,
            confidence=decision.confidence,
            propensity=decision.propensity,
        ),
    )


class _Distinct(list[str]):
    """Different texts in order of appearance, each found again by its index."""

    def __init__(self) -> None:
        super().__init__()
        self._index: dict[str, int] = {}

    def index_of(self, text: str) -> int:
        """Return the index of ``text``, which is appended if it is new."""
        index = self._index.setdefault(text, len(self))
        if index == len(self):
            self.append(text)
        return index


class _TextFile:
    """Texts in an unnamed temporary file; they take 8 bytes of memory each."""

    def __init__(self) -> None:
        stack = contextlib.ExitStack()
        self._file = stack.enter_context(tempfile.TemporaryFile())
        self._ends = array("q", [0])
        weakref.finalize(self, stack.close)

    def append(self, text: str) -> None:
        data = text.encode()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def __getitem__(self, index: int) -> str:
        self._file.flush()
        start, end = self._ends[index], self._ends[index + 1]
        return os.pread(self._file.fileno(), end - start, start).decode()
