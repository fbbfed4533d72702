"""Preference pairs written out as the text that a model reads."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple, TypeAlias

from dpo.errors import InputError
from dpo.pair import Content, Message, PreferencePair, text_of
from dpo.templates import ChatTemplate

_SHOWN_CHARACTERS = 40  # of two texts, from where they differ


class Piece(NamedTuple):
    """A part of an answer; what is not scored is context of what follows."""

    text: str
    is_scored: bool


Answer: TypeAlias = tuple[Piece, ...]  # one that is scored, or several by turns


class PairTexts(NamedTuple):
    """The text up to the answers, and what follows it in each of the two; None: no such answer."""

    prompt: str
    chosen: Answer | None
    rejected: Answer | None


def write_pair(pair: PreferencePair, template: ChatTemplate | None) -> PairTexts:
    """Write a pair out.

    Args:
        pair: of plain text, which stays as it is, or of conversations; not of token ids.
        template: for conversations; they are refused without one.

    Raises:
        InputError: the template refuses the conversation, or writes it so that no prompt can be set
            apart from the answers.
    """
    if isinstance(pair.prompt, tuple):
        if template is None:
            raise InputError("a conversation needs a chat template")
        return _write_conversation(pair, pair.prompt, template)
    assert isinstance(pair.prompt, str)

    def plain(answer: Content | None) -> Answer | None:
        return (Piece(answer, is_scored=True),) if isinstance(answer, str) else None

    return PairTexts(pair.prompt, plain(pair.chosen), plain(pair.rejected))


def _write_conversation(
    pair: PreferencePair, prompt: tuple[Message, ...], template: ChatTemplate
) -> PairTexts:
    """Write a pair of conversations out, of which ``prompt`` is the prompt."""
    render = partial(template.render, tools=pair.tools, variables=pair.chat_template_kwargs)
    if prompt[-1]["role"] == "assistant":
        start = template.render_to_continue(
            prompt, tools=pair.tools, variables=pair.chat_template_kwargs
        )
    else:
        start = render(prompt, add_generation_prompt=True)

    def write(answer: Content | None) -> Answer | None:
        if not isinstance(answer, tuple):
            return None
        ends = [(render(_conversation(prompt, answer)), True)]
        if pair.answer_turns is not None:
            last_only = pair.answer_turns == "last"
            ends = list(_ends_of_turns(prompt, answer, render, last_only=last_only))
        return tuple(_pieces(start, ends, template.name))

    return PairTexts(start, write(pair.chosen), write(pair.rejected))


def _ends_of_turns(
    prompt: Sequence[Message],
    answer: Sequence[Message],
    render: Callable[..., str],
    *,
    last_only: bool,
) -> Iterator[tuple[str, bool]]:
    """Yield the text up to the end of each part of an answer, and whether the part is scored.

    The assistant's messages are scored, or the last alone; what makes the model begin one is not.
    """
    for index, message in enumerate(answer):
        if message["role"] == "assistant":
            if index:
                before = _conversation(prompt, answer[:index])
                yield render(before, add_generation_prompt=True), False
            whole = render(_conversation(prompt, answer[: index + 1]))
            yield whole, not last_only or index == len(answer) - 1


def _pieces(start: str, ends: Iterable[tuple[str, bool]], name: str) -> Iterator[Piece]:
    """Cut a conversation at the ends of its parts; neighbours of one kind are one piece."""
    for is_scored, group in groupby(ends, key=lambda end: end[1]):
        *_, (whole, _) = group
        yield Piece(_rest(whole, start, name), is_scored)
        start = whole


def written_texts(pair: PreferencePair) -> Iterator[str]:
    """Yield what people and models have written in a pair, without what a template adds."""
    for text in (pair.prompt, pair.chosen, pair.rejected):
        if isinstance(text, str):
            yield text
        elif isinstance(text, tuple):
            yield from map(text_of, text)


def _conversation(prompt: Sequence[Message], answer: Sequence[Message]) -> Sequence[Message]:
    """Join prompt and answer; if the assistant spoke last, that message goes on."""
    last, first = prompt[-1], answer[0]
    if last["role"] != "assistant":
        return [*prompt, *answer]
    joined = {**last, **first, "content": text_of(last) + text_of(first)}
    return [*prompt[:-1], joined, *answer[1:]]


def _rest(whole: str, start: str, name: str) -> str:
    """Return what follows the prompt in a conversation."""
    if whole.startswith(start):
        return whole[len(start) :]
    same = next(
        (at for at, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b),
        min(len(whole), len(start)),
    )
    raise InputError(
        f"{name}: the conversation does not begin with its prompt: after {same} characters it has "
        f"{whole[same : same + _SHOWN_CHARACTERS]!r}, the prompt "
        f"{start[same : same + _SHOWN_CHARACTERS]!r}"
    )
