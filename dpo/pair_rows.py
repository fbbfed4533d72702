r"""The layouts in which a row of a file can hold a preference pair.

A row is one JSON object. Its layout is told from the types of its fields:

========  ====================  =================================================================
prompt    chosen and rejected   the prompt that results
========  ====================  =================================================================
text      text                  the prompt as it stands
messages  messages              the prompt; answers that both begin with it are cut to what follows
messages  text                  the prompt; each text becomes one assistant message
text      messages              what both conversations share, which must hold the text; if they
                                are answers alone, the text as a user message
none      messages              the messages both share, up to the last that is not the assistant's
none      text                  the text both share, up to the last "\n\nAssistant:"
========  ====================  =================================================================

OpenAI's ``input.messages, preferred_output, non_preferred_output`` are other names for the second,
and LLaMA-Factory's ``conversations`` for its prompt.
To add a layout, add a case to ``_split``.

A row can also rank several answers: ``prompt``, ``answers`` (each in a form that ``chosen`` may
have) and ``scores``, a number for each. Every two answers of different scores are then a pair, or
the best and each other one, or each and the next worse one (`parse_rows`).

Or it holds a single answer that is good or bad by itself: ``prompt`` and ``completion`` in the
forms of a prompt and an answer above (without a prompt, the completion's last answer is cut off),
and ``label``, true or false. Such a row is a pair with one answer missing.

Prompt and answers can be token ids already: ``prompt_ids, chosen_ids, rejected_ids``, or
``prompt_ids, completion_ids, label``.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise, product
from typing import Literal, NamedTuple, TypeAlias, TypedDict, get_args

from dpo.errors import InputError
from dpo.files import JSON
from dpo.pair import AnswerTurns, Content, Message, PreferencePair, Text, Tokens, kind

PAIRED = ("prompt", "chosen", "rejected")
RANKED = ("prompt", "answers", "scores")
UNPAIRED = ("prompt", "completion", "label")
PAIRED_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
UNPAIRED_IDS = ("prompt_ids", "completion_ids", "label")
OPTIONAL = (
    *("weight", "margin", "label_prob", "source", "id"),
    *("tools", "chat_template_kwargs", "answer_turns"),
)
FIELDS = tuple(dict.fromkeys(PAIRED + RANKED + UNPAIRED + PAIRED_IDS + UNPAIRED_IDS + OPTIONAL))
RANKED_LAYOUT = "ranked answers"
RankedPairs = Literal["all", "best", "list"]

_Conversation: TypeAlias = tuple[Message, ...]
_HUMAN_TURN, _ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class ParsedRow(NamedTuple):
    """A pair, the name of the layout it was found in, and the fields that such rows have."""

    layout: str
    pair: PreferencePair
    fields: tuple[str, ...]


class _Optional(TypedDict):
    weight: float
    margin: float
    label_prob: float
    source: str | None
    id: str | None
    tools: tuple[JSON, ...] | None
    chat_template_kwargs: Mapping[str, JSON] | None
    answer_turns: AnswerTurns | None


class _Split(NamedTuple):
    layout: str
    prompt: Content
    chosen: Content
    rejected: Content


def parse_rows(
    row: JSON,
    *,
    columns: Mapping[str, str],
    default_id: str,
    ranked: RankedPairs = "all",
    answer_turns: AnswerTurns | None = None,
) -> list[ParsedRow]:
    """Turn one decoded row into its pair, or into the pairs of the answers that it ranks.

    The pair of the answers i and j of a ranked row, counted from 0, has the id ``<row>/<i>-<j>``.

    Args:
        row: the decoded JSON value.
        columns: field -> column that holds it; other fields keep their names.
        default_id: the pair's id if the row has none.
        ranked: which answers of a ranked row make a pair: "all" of different scores, the "best"
            (the first of several) with each worse one, or as a "list" each with the next worse one.
        answer_turns: of conversations that have no column of this name.

    Raises:
        InputError: the row is no pair, or ranks nothing; says which field, what was found and what
            was expected.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"expected a JSON object, found {kind(row)}")
    fields = _fields(row, columns)
    form = _form(fields)
    missing = [name for name in form if name not in fields and name != "prompt"]
    if missing:
        raise InputError(
            f"missing {' and '.join(missing)}; the row has {', '.join(row) or 'nothing'}"
        )
    if unused := columns.keys() - {*form, *OPTIONAL}:
        raise InputError(
            f"column {columns[min(unused)]!r} (for {min(unused)}) would not be read: the row has "
            f"{', '.join(form)}"
        )
    fields = {name: value for name, value in fields.items() if name in form or name in OPTIONAL}
    fields.setdefault("id", default_id)
    fields.setdefault("answer_turns", answer_turns)
    if form is RANKED:
        pairs = [_pair(each)[1] for each in _ranked(fields, ranked)]
        return [ParsedRow(RANKED_LAYOUT, pair, form) for pair in pairs]
    layout, pair = _unpaired(fields) if "label" in form else _pair(fields)
    return [ParsedRow("OpenAI preference" if "preferred_output" in row else layout, pair, form)]


def _form(fields: Mapping[str, JSON]) -> tuple[str, str, str]:
    """Tell which fields hold prompt and answers."""
    if fields.keys() >= {*RANKED[1:]}:
        return RANKED
    for form in (PAIRED, UNPAIRED, PAIRED_IDS, UNPAIRED_IDS):
        if fields.keys() & {*form[1:]} - {"label"}:
            return form
    return PAIRED


def _pair(fields: Mapping[str, JSON]) -> tuple[str, PreferencePair]:
    """Make the pair of a chosen and a rejected answer; the layout goes before it."""
    split = _split(*(_content(name, fields) for name in PAIRED))
    pair = PreferencePair(split.prompt, split.chosen, split.rejected, **_optional(fields))
    return split.layout, pair


def _unpaired(fields: Mapping[str, JSON]) -> tuple[str, PreferencePair]:
    """Make the unpaired row of an answer and whether it is good; the layout goes before it."""
    label = fields["label"]
    if label not in (0, 1):
        found = label if type(label) in (int, float) else kind(label)
        raise InputError(f"label must be true or false (or 1 or 0), found {found}")
    completion = _content("completion", fields)
    split = _split(_content("prompt", fields), completion, completion)
    chosen, rejected = (split.chosen, None) if label else (None, split.chosen)
    pair = PreferencePair(split.prompt, chosen, rejected, **_optional(fields))
    return f"unpaired, {split.layout}", pair


def _ranked(fields: Mapping[str, JSON], ranked: RankedPairs) -> Iterator[dict[str, JSON]]:
    """Yield the fields of the pairs of a row that ranks answers."""
    answers = fields["answers"]
    order = _ranking(answers, fields["scores"])
    assert isinstance(answers, Sequence)
    name = _name("id", fields["id"])
    for (better, i), (worse, j) in _PAIRINGS[ranked](order):
        if better > worse:
            pair = {"id": f"{name}/{i}-{j}", "chosen": answers[i], "rejected": answers[j]}
            yield {**fields, **pair}
        elif ranked == "list":
            raise InputError(f"answers {i} and {j} have the score {better}: a list needs an order")


_Ranking: TypeAlias = list[tuple[float, int]]  # score and place of each answer, the best first

_PAIRINGS: dict[RankedPairs, Callable[[_Ranking], Iterable[tuple[tuple[float, int], ...]]]] = {
    "all": lambda order: combinations(order, 2),
    "best": lambda order: product(order[:1], order[1:]),
    "list": pairwise,
}


def _ranking(answers: JSON, scores: JSON) -> _Ranking:
    """Return score and place of each answer, the best first, of equal ones the earlier first."""
    for name, value in (("answers", answers), ("scores", scores)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InputError(f"{name} must be a list, found {kind(value)}")
    assert isinstance(answers, Sequence)
    assert isinstance(scores, Sequence)
    if len(answers) != len(scores) or len(answers) < 2:
        raise InputError(
            f"{len(answers)} answers and {len(scores)} scores: expected a score for each of two "
            "answers or more"
        )
    numbers = [_number(f"scores[{place}]", score) for place, score in enumerate(scores)]
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"scores must be finite, found {numbers}")
    if len(set(numbers)) == 1:
        raise InputError(f"all {len(numbers)} answers have the score {numbers[0]}: none is better")
    order = sorted(range(len(numbers)), key=lambda place: -numbers[place])
    return [(numbers[place], place) for place in order]


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse names of columns for what is no field of a pair.

    Raises:
        InputError: names the unknown fields and those that there are.
    """
    if unknown := columns.keys() - set(FIELDS):
        raise InputError(
            f"columns: a pair has no {', '.join(sorted(unknown))}; it has {', '.join(FIELDS)}"
        )


def pair_to_row(pair: PreferencePair) -> dict[str, JSON]:
    """Return the row that ``parse_rows`` reads back as the same pair; defaults are left out."""
    parts: dict[str, Content | None] = {"prompt": pair.prompt}
    is_good = pair.chosen is not None
    if pair.is_unpaired:
        parts["completion"] = pair.chosen if is_good else pair.rejected
    else:
        parts |= {"chosen": pair.chosen, "rejected": pair.rejected}
    row: dict[str, JSON] = {}
    for name, text in parts.items():
        row |= {f"{name}_ids": text.ids} if isinstance(text, Tokens) else {name: text}
    if pair.is_unpaired:
        row["label"] = is_good
    defaults = PreferencePair("prompt", "chosen", "rejected")
    for name in OPTIONAL:
        if getattr(pair, name) != getattr(defaults, name):
            row[name] = getattr(pair, name)
    return row


def _fields(row: Mapping[str, JSON], columns: Mapping[str, str]) -> dict[str, JSON]:
    """Name the row's columns by fields; an optional field that is null is absent."""
    absent = [f"{column!r} (for {name})" for name, column in columns.items() if column not in row]
    if absent:
        raise InputError(f"missing column {', '.join(absent)}; the row has {', '.join(row)}")
    fields = _openai_fields(row) if "preferred_output" in row else dict(row)
    if "conversations" in fields:
        fields.setdefault("prompt", fields["conversations"])
    fields |= {name: row[column] for name, column in columns.items()}
    return {
        name: fields[name]
        for name in FIELDS
        if name in fields and not (name in OPTIONAL and fields[name] is None)
    }


def _optional(fields: Mapping[str, JSON]) -> _Optional:
    """Return the fields that any row may have."""
    return {
        "weight": _number("weight", fields.get("weight", 1.0)),
        "margin": _number("margin", fields.get("margin", 0.0)),
        "label_prob": _number("label_prob", fields.get("label_prob", 1.0)),
        "source": _name("source", fields.get("source")),
        "id": _name("id", fields["id"]),
        "tools": _tools(_decoded("tools", fields.get("tools"))),
        "chat_template_kwargs": _arguments(
            _decoded("chat_template_kwargs", fields.get("chat_template_kwargs"))
        ),
        "answer_turns": _turns(fields.get("answer_turns")),
    }


def _turns(value: JSON) -> AnswerTurns | None:
    if value is None:
        return None
    found = [choice for choice in get_args(AnswerTurns) if choice == value]
    if not found:
        raise InputError(f"answer_turns must be all or last, found {value!r}")
    turns: AnswerTurns = found[0]
    return turns


def _openai_fields(row: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return a row of OpenAI's preference format under the names of a pair's fields."""
    request = row.get("input")
    if not isinstance(request, Mapping) or "messages" not in request:
        raise InputError("preferred_output needs input.messages beside it")
    if "non_preferred_output" not in row:
        raise InputError("preferred_output needs non_preferred_output beside it")
    return {
        **row,
        "prompt": request["messages"],
        "chosen": row["preferred_output"],
        "rejected": row["non_preferred_output"],
        "tools": request.get("tools"),
    }


def _content(name: str, fields: Mapping[str, JSON]) -> Content | None:
    """Return a prompt or an answer from its field, or from that of its token ids."""
    if (ids := f"{name}_ids") in fields:
        value = fields[ids]
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InputError(f"{ids} must be a list of token ids, found {kind(value)}")
        return Tokens(tuple(value))  # type: ignore[arg-type]  # what is no id the pair refuses
    return _text(name, fields[name]) if name in fields else None


def _text(name: str, value: JSON) -> Text:
    """Return text as it is and messages as a tuple; a message alone is a conversation of one."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence):
        raise InputError(f"{name} must be text or a list of messages, found {kind(value)}")
    return tuple(_message(f"{name}[{index}]", message) for index, message in enumerate(value))


def _message(name: str, value: JSON) -> Message:
    """Return a message without its null fields; ``from, value`` becomes ``role, content``."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a message {{role, content}}, found {kind(value)}")
    if value.keys() == {"from", "value"}:
        role = value["from"]
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        return {"role": role, "content": value["value"]}
    return {key: item for key, item in value.items() if item is not None or key == "content"}


def _number(name: str, value: JSON) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number, found {kind(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise InputError(f"{name} must be finite, found {len(str(value))} digits") from error


def _name(name: str, value: JSON) -> str | None:
    """Return a name as text: ids are often whole numbers."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{name} must be text, found {kind(value)}")


def _decoded(name: str, value: JSON) -> JSON:
    """Return a value that some files hold as JSON within text."""
    if not isinstance(value, str):
        return value
    try:
        decoded: JSON = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is text but not JSON: {error}") from error
    return decoded


def _arguments(value: JSON) -> dict[str, JSON] | None:
    """Return the variables for a template; those that are null are absent, as in a table."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InputError(f"chat_template_kwargs must be an object, found {kind(value)}")
    return {name: item for name, item in value.items() if item is not None} or None


def _tools(value: JSON) -> tuple[JSON, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"tools must be a list, found {kind(value)}")
    return tuple(value) or None


def _split(prompt: Content | None, chosen: Content | None, rejected: Content | None) -> _Split:
    """Tell the layout from the types and set the prompt and the answers apart."""
    match prompt, chosen, rejected:
        case Tokens(), Tokens(), Tokens():
            return _Split("token ids", prompt, chosen, rejected)
        case str(prompt), str(chosen), str(rejected):
            return _Split("prompt and answers as text", prompt, chosen, rejected)
        case tuple(prompt), tuple(chosen), tuple(rejected):
            return _without_prompt("prompt and answers as messages", prompt, chosen, rejected)
        case tuple(prompt), str(chosen), str(rejected):
            layout = "prompt as messages, answers as text"
            return _Split(layout, prompt, _said("assistant", chosen), _said("assistant", rejected))
        case str(prompt), tuple(chosen), tuple(rejected):
            return _beside_text("prompt as text, answers as messages", prompt, chosen, rejected)
        case None, tuple(chosen), tuple(rejected):
            return _shared_messages("messages that share a prompt", chosen, rejected)
        case None, str(chosen), str(rejected):
            return _shared_dialogue("dialogues as text that share a prompt", chosen, rejected)
    raise InputError(
        f"chosen is {kind(chosen)} and rejected is {kind(rejected)}: both must have the same form"
    )


def _said(role: str, content: str) -> _Conversation:
    return ({"role": role, "content": content},)


def _without_prompt(
    layout: str, prompt: _Conversation, chosen: _Conversation, rejected: _Conversation
) -> _Split:
    """Cut the prompt from answers that both hold the whole conversation."""
    size = len(prompt)
    if chosen[:size] == prompt and rejected[:size] == prompt:
        return _Split(layout, prompt, chosen[size:], rejected[size:])
    return _Split(layout, prompt, chosen, rejected)


def _beside_text(
    layout: str, prompt: str, chosen: _Conversation, rejected: _Conversation
) -> _Split:
    """Read a text beside conversations, as in HuggingFaceH4/ultrafeedback_binarized."""
    if all(messages and messages[0].get("role") == "assistant" for messages in (chosen, rejected)):
        return _Split(layout, _said("user", prompt), chosen, rejected)
    split = _shared_messages(layout, chosen, rejected)
    assert isinstance(split.prompt, tuple)
    if not any(message.get("content") == prompt for message in chosen[: len(split.prompt)]):
        raise InputError("prompt is none of the messages that come before the answers")
    return split


def _shared_messages(layout: str, chosen: _Conversation, rejected: _Conversation) -> _Split:
    """Split after the last shared message that is not the assistant's.

    So no answer is cut in two, even if both begin alike or one begins the other.
    """
    size = 0
    for index, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left != right:
            break
        if left.get("role") != "assistant":
            size = index + 1
    if not size:
        raise InputError("the answers share no messages to be the prompt; give a prompt")
    return _Split(layout, chosen[:size], chosen[size:], rejected[size:])


def _shared_dialogue(layout: str, chosen: str, rejected: str) -> _Split:
    """Split two dialogues as text, as in Anthropic/hh-rlhf, after the last mark of a turn.

    The prompt ends with the mark and the answers are all that follows it, so no answer is cut in
    two, even if both begin alike or one begins the other.
    """
    before, mark, answer = chosen.rpartition(_ASSISTANT_TURN)
    if not mark:
        raise InputError(
            f"no prompt, and no {_ASSISTANT_TURN!r} in the answer to split at; give a prompt column"
        )
    prompt = before + mark
    other = rejected.removeprefix(prompt)
    if other == rejected or any(
        turn in text for turn in (_HUMAN_TURN, _ASSISTANT_TURN) for text in (answer, other)
    ):
        raise InputError("the answers do not share every turn before the last answer")
    return _Split(layout, prompt, answer, other)
