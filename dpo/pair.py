"""A preference pair: what it holds, and what must be true of it.

To add a field: a default, a check in ``__post_init__`` and a line in ``pair_rows._optional``.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from dpo.errors import InputError
from dpo.files import JSON

TEMPLATE_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

Message: TypeAlias = Mapping[str, JSON]  # {"role": str, "content": str, ...}
Text: TypeAlias = str | tuple[Message, ...]  # plain text, or a conversation


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as ids of the model's tokenizer, which nothing is added to."""

    ids: tuple[int, ...]


Content: TypeAlias = Text | Tokens  # of a prompt or an answer
AnswerTurns = Literal["all", "last"]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with the answer that was preferred and the one that was not.

    The texts are all plain text, all conversations or all token ids. The answers of a conversation
    hold assistant messages alone and continue the prompt; a prompt whose last message is the
    assistant's is continued inside that message.

    One of the two answers may be missing: the pair is then an unpaired row, a single answer that is
    good (``chosen``) or bad (``rejected``) by itself.

    Attributes:
        prompt: what both answers answer.
        chosen: the preferred answer, or None.
        rejected: the other answer, or None; differs from ``chosen``.
        weight: of this pair's loss within its step, >= 0.
        margin: by how much the chosen reward should exceed the rejected one, in nats.
        label_prob: probability that the label is right, in [0, 1].
        source: where the pair comes from; metrics can be split by it.
        id: names the pair in messages and reports; takes no part in equality.
        tools: JSON schemas of functions, handed to the chat template.
        chat_template_kwargs: further variables of the chat template, such as ``enable_thinking``;
            for conversations alone.
        answer_turns: lets answers hold messages of others between those of the assistant, and says
            which of the assistant's are trained on: "all" or the "last"; None refuses such answers.

    Raises:
        InputError: fields are empty, of the wrong type or out of range; all of them are named.

    Example:
        >>> from dpo import PreferencePair
        >>> PreferencePair("2 + 2 =", chosen=" 4", rejected=" 5", weight=2.0).chosen
        ' 4'
    """

    prompt: Content
    chosen: Content | None
    rejected: Content | None
    weight: float = 1.0
    margin: float = 0.0
    label_prob: float = 1.0
    source: str | None = None
    id: str | None = field(default=None, compare=False)
    tools: tuple[JSON, ...] | None = None
    chat_template_kwargs: Mapping[str, JSON] | None = None
    answer_turns: AnswerTurns | None = None

    def __post_init__(self) -> None:
        faults = [*_text_faults("prompt", self.prompt)]
        answers = {"chosen": self.chosen, "rejected": self.rejected}
        there = {name: answer for name, answer in answers.items() if answer is not None}
        for name, answer in there.items():
            faults += _answer_faults(name, answer, self.answer_turns)
        if not there:
            faults += ["chosen and rejected are both missing"]
        if not faults and self.chosen == self.rejected:
            faults += ["chosen and rejected are identical"]
        if len({type(text) for text in (self.prompt, *there.values())}) > 1:
            faults += [f"prompt, {', '.join(there)} must all be text, messages or token ids"]
        faults += _number_faults("weight", self.weight, 0.0, math.inf, "a finite number >= 0")
        faults += _number_faults("margin", self.margin, -math.inf, math.inf, "a finite number")
        faults += _number_faults("label_prob", self.label_prob, 0.0, 1.0, "a number in [0, 1]")
        faults += [*_name_faults("source", self.source), *_name_faults("id", self.id)]
        faults += _tools_faults(self.tools)
        if self.chat_template_kwargs is not None:
            faults += _argument_faults(self.chat_template_kwargs)
            if not isinstance(self.prompt, tuple):
                faults += ["chat_template_kwargs are for conversations, and the prompt is none"]
        if self.answer_turns not in (None, *get_args(AnswerTurns)):
            faults += [f"answer_turns must be all or last, found {self.answer_turns!r}"]
        if self.answer_turns is not None and not isinstance(self.prompt, tuple):
            faults += ["answer_turns is for conversations, and the prompt is none"]
        if faults:
            raise InputError("; ".join(faults))

    @property
    def is_unpaired(self) -> bool:
        """Whether there is one answer alone."""
        return self.chosen is None or self.rejected is None


def kind(value: object) -> str:
    """Name a decoded JSON value's type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "an object" if isinstance(value, Mapping) else "a list"


def _text_faults(name: str, text: object) -> Iterator[str]:
    if isinstance(text, Tokens):
        yield from _token_faults(name, text.ids)
    elif not isinstance(text, str | tuple):
        yield f"{name} must be text or a tuple of messages, found {kind(text)}"
    elif not text or (isinstance(text, str) and not text.strip()):
        yield f"{name} is empty"
    elif isinstance(text, str):
        yield from _json_faults(name, text)
    else:
        for index, message in enumerate(text):
            yield from _message_faults(f"{name}[{index}]", message)


def _token_faults(name: str, ids: tuple[object, ...]) -> Iterator[str]:
    if not ids:
        yield f"{name} is empty"
    for index, id_ in enumerate(ids):
        if not isinstance(id_, int) or isinstance(id_, bool) or not 0 <= id_ < 2**31:
            found = id_ if type(id_) in (int, float) else kind(id_)
            yield f"{name}[{index}] must be a token id, found {found}"
            return


def _answer_faults(name: str, answer: Content, turns: str | None) -> Iterator[str]:
    faults = [*_text_faults(name, answer)]
    yield from faults
    if faults or isinstance(answer, str | Tokens):
        return
    for index, message in enumerate(answer):
        if message["role"] != "assistant":
            if turns is not None and 0 < index < len(answer) - 1:
                continue
            yield (
                f"{name}[{index}] is a {message['role']} message, which would be trained on as if "
                "the assistant had said it: answers hold assistant messages alone, or with "
                "answer_turns begin and end with them"
            )
        elif not message.get("tool_calls") and not text_of(message).strip():
            yield f"{name}[{index}] is empty"


def _message_faults(name: str, message: object) -> Iterator[str]:
    if not isinstance(message, Mapping):
        yield f"{name} must be a message {{role, content}}, found {kind(message)}"
        return
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        yield f"{name}.role must be text, found {kind(role)}"
    if content is None:
        if not message.get("tool_calls"):
            yield f"{name}.content is {'null' if 'content' in message else 'missing'}"
    elif not isinstance(content, str) and not _is_text_parts(content):
        yield f"{name}.content must be text or a list of text parts, found {kind(content)}"
    yield from _json_faults(name, message)


def _is_text_parts(content: JSON) -> bool:
    return isinstance(content, Sequence) and all(
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        for part in content
    )


def text_of(message: Message) -> str:
    """Return the text of a message that has passed the checks; empty if its content is null."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(str(part["text"]) for part in parts if isinstance(part, Mapping))


def _number_faults(
    name: str, value: object, low: float, high: float, expected: str
) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        yield f"{name} must be {expected}, found {kind(value)}"
    elif not (math.isfinite(value) and low <= value <= high):
        yield f"{name} must be {expected}, found {value}"


def _name_faults(name: str, value: object) -> Iterator[str]:
    if value is not None and not (isinstance(value, str) and value):
        yield f"{name} must be text and not empty, found {value!r}"
    yield from _json_faults(name, value)


def _tools_faults(tools: object) -> Iterator[str]:
    if tools is not None and not isinstance(tools, tuple):
        yield f"tools must be a tuple, found {kind(tools)}"
    yield from _json_faults("tools", tools)


def _argument_faults(arguments: object) -> Iterator[str]:
    if not isinstance(arguments, Mapping):
        yield f"chat_template_kwargs must be a mapping, found {kind(arguments)}"
    elif taken := arguments.keys() & TEMPLATE_VARIABLES:
        yield f"chat_template_kwargs: {', '.join(sorted(taken))} is given by the row itself"
    yield from _json_faults("chat_template_kwargs", arguments)


def _json_faults(name: str, value: object) -> Iterator[str]:
    """Refuse what a file could not hold: numbers that are not finite, halves of surrogate pairs."""
    try:
        if isinstance(value, str):
            value.encode()
        elif value is not None:
            json.dumps(value, ensure_ascii=False, allow_nan=False, default=plain_json).encode()
    except UnicodeEncodeError:
        yield f"{name} holds half of a surrogate pair, which UTF-8 cannot write"
    except (TypeError, ValueError, RecursionError) as error:
        yield f"{name} cannot be written as JSON: {error}"


def plain_json(value: object) -> object:
    """Let ``json.dumps(default=...)`` write any mapping or sequence."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return list(value)
    raise TypeError(f"found a {type(value).__name__}")
