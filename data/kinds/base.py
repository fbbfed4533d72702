"""What a policy kind is: one object that knows its states, actions, texts, rules and rewards.

A new kind is one file with a state and an action dataclass (see ``schema``), one subclass of
``TypedKind`` and one object of it; ``data/kinds/README.md`` shows a complete one.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

from dpo.data.kinds.javascript import json_text
from dpo.data.kinds.schema import RecordSchema, to_json
from dpo.data.strict_json import decode_json
from dpo.files import JSON

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

State = TypeVar("State", bound="DataclassInstance")
Action = TypeVar("Action", bound="DataclassInstance")

EntryType = Literal["tool", "guideline", "knowledge", "project", "experience"]
ScopeType = Literal["global", "org", "project", "session"]
GroupKey: TypeAlias = tuple[str | int | bool, ...]


@dataclass(frozen=True, slots=True)
class BaselineDecision(Generic[Action]):
    """What the rules answer: the action, how sure they are in [0, 1], and the rule's name."""

    action: Action
    confidence: float
    reason: str


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward in [-1, 1], the parts it was made from, and one sentence for people."""

    value: float
    components: Mapping[str, float]
    explanation: str


class TypedKind(ABC, Generic[State, Action]):
    """One policy kind. Subclasses set the attributes and write the abstract methods.

    Attributes:
        name: as in file names and in the ``policy`` field of a decision.
        state_schema: reads the states.
        action_schema: reads the actions.
        classes: every value of ``action_class``.
        id_fields: fields of an action that hold ids. No prompt shows ids, so a model cannot know
            them: they are left out of the responses that it is trained on.
    """

    name: str
    state_schema: RecordSchema[State]
    action_schema: RecordSchema[Action]
    classes: tuple[str, ...]
    id_fields: tuple[str, ...] = ()

    def parse_state(self, data: object, where: str) -> State:
        """Return the state that decoded JSON holds; InputError names ``where`` and each fault."""
        return self.state_schema.parse(data, where)

    def state_to_json(self, state: State) -> dict[str, JSON]:
        """Return the state with the names and groups it has on disk."""
        return to_json(state)

    def parse_action(self, data: object, where: str) -> Action:
        """Return the action that decoded JSON holds; InputError names ``where`` and each fault."""
        return self.action_schema.parse(data, where)

    def action_to_json(self, action: Action) -> dict[str, JSON]:
        """Return the action with the names it has on disk, what is None left out."""
        return to_json(action)

    def render_action(self, action: Action) -> str:
        """Return the response text: the action as JSON with an indent of two spaces."""
        return json_text(to_json(action))

    def without_ids(self, action: Action) -> Action:
        """Return the action with None for its ``id_fields``."""
        if not self.id_fields:
            return action
        return dataclasses.replace(action, **dict.fromkeys(self.id_fields))

    def parse_response(self, text: str) -> Action:
        """Return the action that a response text holds; the inverse of ``render_action``.

        Raises:
            InputError: the text is not one JSON object, names a key twice, or is no valid action.
        """
        where = f"{self.name} response"
        return self.parse_action(decode_json(text, where), where)

    @abstractmethod
    def render_prompt(self, state: State) -> str:
        """Return the prompt text of a state."""

    @abstractmethod
    def action_class(self, action: Action) -> str:
        """Return the class that metrics count the action under, one of ``classes``."""

    @abstractmethod
    def actions(self) -> tuple[Action, ...]:
        """Return the finite set of actions to choose among, free of ids."""

    @abstractmethod
    def group_key(self, state: State) -> GroupKey:
        """Return what similar states have in common."""

    @abstractmethod
    def baseline(self, state: State) -> BaselineDecision[Action]:
        """Return what the hand-written rules answer."""

    @abstractmethod
    def reward(self, outcome: Mapping[str, JSON], action: Action) -> Reward:
        """Return how good the action turned out to be.

        Raises:
            InputError: the outcome lacks a field, or holds one that this action cannot have.
        """


PolicyKind: TypeAlias = TypedKind[Any, Any]
"""A policy kind whose state and action types do not matter to the caller."""


def clamp_reward(value: float) -> float:
    """Bound a reward to [-1, 1]."""
    return min(max(value, -1.0), 1.0)


def added_reward(components: Mapping[str, float], explanation: str) -> Reward:
    """Return the reward that is the sum of its components, bounded to [-1, 1]."""
    total = functools.reduce(operator.add, components.values())  # sum() differs between Pythons
    return Reward(clamp_reward(total), components, explanation)


def prompt_text(sections: Mapping[str, Mapping[str, str | int | bool]], *, question: str) -> str:
    """Return titled lists of figures, a blank line after each, and the question.

    ``{"Context": {"Turn": 5, "Has error": False}}`` with the question ``What now?`` becomes the
    lines ``Context:``, ``- Turn: 5``, ``- Has error: false``, an empty one, and ``What now?``.
    """
    lines = []
    for title, figures in sections.items():
        lines.append(f"{title}:")
        for name, value in figures.items():
            if isinstance(value, bool):
                value = "true" if value else "false"
            lines.append(f"- {name}: {value}")
        lines.append("")
    return "\n".join([*lines, question])
