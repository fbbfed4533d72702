"""From preference pairs to token ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from dpo.errors import InputError
from dpo.tokenized_pairs import TokenizedPair, TokenizedPairs, columns_of

__all__ = ["TokenizeOptions", "TokenizedPair", "TokenizedPairs", "columns_of"]

Truncation = Literal["keep-start", "keep-end", "drop", "error"]
TemplateChoice = Literal["auto", "none", "chatml"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeOptions:
    """How pairs become tokens.

    Raises:
        InputError: a value is out of range; all of them are named.
    """

    max_length: Annotated[
        int | None, "Tokens of a prompt with its longer answer, >= 2; none: no limit."
    ] = None
    max_prompt_length: Annotated[int | None, "Tokens of a prompt, >= 1; none: no limit."] = None
    truncation: Annotated[
        Truncation,
        "Rows over a limit: drop or refuse them, or cut: keep-start cuts the ends of prompts and "
        "answers, keep-end the starts of prompts alone.",
    ] = "drop"
    template: Annotated[
        TemplateChoice,
        "Chat template of conversations: the tokenizer's own and ChatML if it has none, ChatML, or "
        "none: refuse conversations.",
    ] = "auto"

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise InputError("\n".join(faults))

    def _faults(self) -> Iterator[str]:
        for name, least in (("max_length", 2), ("max_prompt_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"tokenize.{name} must be at least {least}, got {value}"
        for name, choice in (("truncation", Truncation), ("template", TemplateChoice)):
            if (value := getattr(self, name)) not in get_args(choice):
                yield f"tokenize.{name} must be one of {', '.join(get_args(choice))}, got {value!r}"
        if None not in (self.max_length, self.max_prompt_length):
            assert self.max_length is not None
            assert self.max_prompt_length is not None
            if self.max_prompt_length >= self.max_length:
                yield (
                    f"tokenize.max_prompt_length ({self.max_prompt_length}) must be below "
                    f"tokenize.max_length ({self.max_length}): the answers need room"
                )
