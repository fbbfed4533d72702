"""Preference pairs written out as the text that a model reads."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dpo.errors import InputError
from dpo.pair import Content, Message, PreferencePair, Tokens, text_of
from dpo.templates import ChatTemplate

_SHOWN_CHARACTERS = 40  # of two texts, from where they differ


class PairTexts(NamedTuple):
    """The text up to the answers, and what follows it in each of the two; None: no such answer."""

    prompt: str
    chosen: str | None
    rejected: str | None


def write_pair(pair: PreferencePair, template: ChatTemplate | None) -> PairTexts:
    """Write a pair out.

    Args:
        pair: of plain text, which stays as it is, or of conversations; not of token ids.
        template: for conversations; they are refused without one.

    Raises:
        InputError: the template refuses the conversation, or writes it so that no prompt can be set
            apart from the answers.
    """
    prompt, variables = pair.prompt, pair.chat_template_kwargs
    assert not isinstance(prompt, Tokens)
    if isinstance(prompt, str):
        start = prompt
    elif template is None:
        raise InputError("a conversation needs a chat template")
    elif prompt[-1]["role"] == "assistant":
        start = template.render_to_continue(prompt, tools=pair.tools, variables=variables)
    else:
        start = template.render(
            prompt, tools=pair.tools, variables=variables, add_generation_prompt=True
        )

    def write(answer: Content | None) -> str | None:
        if answer is None or isinstance(answer, str):
            return answer
        assert template is not None
        assert isinstance(prompt, tuple)
        assert isinstance(answer, tuple)
        whole = template.render(
            _conversation(prompt, answer), tools=pair.tools, variables=variables
        )
        return _rest(whole, start, template.name)

    return PairTexts(start, write(pair.chosen), write(pair.rejected))


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
