"""The checks of the data doctor.

A check of rows is a function that makes a finder: given the rows one after another, a finder
returns what is odd about a row, or None. To add one, write it and name it in ``CHECKS``. What
training would refuse is found by the reader (``dpo.data.doctor_rows``), what only token ids show by
``dpo.data.doctor_tokens``; they too are named in ``CHECKS``.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal, TypeAlias

from dpo.data.doctor_rows import PairRow

Policy = Literal["ignore", "warn", "drop", "error"]
Finder: TypeAlias = Callable[[PairRow], str | None]

NEAR_IDENTICAL = 0.95  # share of the words that are the same, in order
# A word; a letter of a script that puts no blanks between words (kana, ideographs, Thai to Khmer);
# or a sign that changes what is said, as marks of punctuation do not.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[-+*/%=<>&|^~@#$\\\u00d7\u00f7]")
_TYPED_TOKEN = re.compile(
    r"<\|[a-z0-9_ ]{2,40}\|>|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<<SYS>>"
    r"|<(?:start|end)_of_turn>|\[(?:CLS|SEP|MASK|PAD)\]",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look for.

    Attributes:
        summary: what is wrong with a row that is found.
        policy: what is done about it unless the user says otherwise.
        make: makes the finder from the files that are for evaluation; None for what the reader,
            the tokenizer or the lengths tell.
        needs_model: whether only the tokenizer can tell.
    """

    summary: str
    policy: Policy = "warn"
    make: Callable[[frozenset[Path]], Finder] | None = None
    needs_model: bool = False


def _near_identical(_: frozenset[Path]) -> Finder:
    def find(row: PairRow) -> str | None:
        chosen, rejected = (_WORD.findall(text.lower()) for text in row.texts[1:])
        share = share_in_common(chosen, rejected)
        if share < NEAR_IDENTICAL:
            return None
        return "the words are the same" if share == 1 else f"{share:.1%} of the words are the same"

    return find


def share_in_common(one: Sequence[str], other: Sequence[str]) -> float:
    """Return 2 * matches / words of both, in order; 0 if a quick bound is below the threshold."""
    words = len(one) + len(other)
    if not words or 2 * (Counter(one) & Counter(other)).total() < NEAR_IDENTICAL * words:
        return 0.0
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def _duplicate(_: frozenset[Path]) -> Finder:
    first: dict[bytes, str] = {}

    def find(row: PairRow) -> str | None:
        place = first.setdefault(_digest(*row.texts), row.place)
        return None if place == row.place else f"the same as {place}"

    return find


def _contradiction(_: frozenset[Path]) -> Finder:
    first: dict[bytes, str] = {}

    def find(row: PairRow) -> str | None:
        prompt, chosen, rejected = row.texts
        first.setdefault(_digest(prompt, chosen, rejected), row.place)
        place = first.get(_digest(prompt, rejected, chosen), row.place)
        if place == row.place:
            return None
        says = "labels the answer otherwise" if row.pair.is_unpaired else "prefers the other answer"
        return f"{says} than {place}"

    return find


def _leak(eval_files: frozenset[Path]) -> Finder:
    trained: dict[bytes, str] = {}

    def find(row: PairRow) -> str | None:
        prompt = _digest(row.texts.prompt)
        if row.path not in eval_files:
            trained.setdefault(prompt, row.place)
            return None
        return f"the prompt of {trained[prompt]}" if prompt in trained else None

    return find


def _typed_token(_: frozenset[Path]) -> Finder:
    def find(row: PairRow) -> str | None:
        found = {match for text in row.texts for match in _TYPED_TOKEN.findall(text)}
        return f"{', '.join(sorted(found))} in the text" if found else None

    return find


def _digest(*texts: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


CHECKS: dict[str, Check] = {
    "unreadable": Check("no pair: training refuses the row", "error"),
    "different-prompts": Check("the answers follow different prompts", "error"),
    "empty": Check("an answer is empty or null", "error"),
    "identical": Check("chosen and rejected are the same", "error"),
    "near-identical": Check("chosen and rejected hardly differ", make=_near_identical),
    "duplicate": Check("an earlier row is the same", make=_duplicate),
    "contradiction": Check("an earlier row says the opposite", make=_contradiction),
    "leak": Check("an evaluation prompt that training has too", make=_leak),
    "typed-token": Check("a special token typed in the text", make=_typed_token),
    "untokenizable": Check(
        "the tokenizer or its template refuses the row", "error", needs_model=True
    ),
    "boundary-merge": Check("a token would reach over prompt and answer", needs_model=True),
    "missing-end": Check("the template marks no end of the answer", needs_model=True),
    "doubled-special": Check("a begin or end token stands twice", needs_model=True),
    "too-long": Check("more tokens than max_length", needs_model=True),
    "length-bias": Check("length alone tells the chosen answer"),
}
