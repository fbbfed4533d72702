"""How pairs become tokens: the options that ``dpo.tokenization`` reads.

The text beside each field is its documentation and its line in ``dpo train --help``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from dpo.errors import InputError

Truncation = Literal["error", "drop", "keep-start", "keep-end"]
TemplateChoice = Literal["auto", "none", "chatml"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeOptions:
    """How pairs become tokens.

    Raises:
        InputError: values are out of range or contradict each other; names all faults.
    """

    max_length: Annotated[
        int | None, "Tokens of a prompt with its longer answer, >= 2; none: no limit."
    ] = None
    max_prompt_length: Annotated[int | None, "Tokens of a prompt, >= 1; none: no limit."] = None
    truncation: Annotated[
        Truncation,
        "Rows over a limit: refuse them (error), drop them, or cut: keep-start the ends of prompts "
        "and answers, keep-end the starts of prompts alone.",
    ] = "error"
    template: Annotated[
        TemplateChoice,
        "How conversations are written: auto is the tokenizer's chat template, or ChatML if it has "
        "none; none refuses conversations.",
    ] = "auto"

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise InputError("\n".join(faults))

    def _faults(self) -> Iterator[str]:
        longest, longest_prompt = self.max_length, self.max_prompt_length
        if longest is not None and longest < 2:
            yield f"tokenize.max_length must be at least 2, got {longest}"
        if longest_prompt is not None and longest_prompt < 1:
            yield f"tokenize.max_prompt_length must be at least 1, got {longest_prompt}"
        if longest is not None and longest_prompt is not None and longest_prompt >= longest:
            yield (
                f"tokenize.max_prompt_length, {longest_prompt}, must be below tokenize.max_length, "
                f"{longest}: the answers need room"
            )
        if self.truncation.startswith("keep") and longest is None and longest_prompt is None:
            yield (
                f"tokenize.truncation = {self.truncation} cuts rows to a limit: give "
                "tokenize.max_length or tokenize.max_prompt_length"
            )
        for name, choice in (("truncation", Truncation), ("template", TemplateChoice)):
            if (value := getattr(self, name)) not in get_args(choice):
                yield f"tokenize.{name} must be one of {', '.join(get_args(choice))}, got {value!r}"
