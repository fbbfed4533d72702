"""What only token ids show about preference pairs: the checks that need a model's tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from dpo.errors import InputError
from dpo.pair import PreferencePair
from dpo.tokenization import Tokenization, TokenizedPair, tokenize_pairs
from dpo.tokenizer import Tokenizer


class TokenFinding(NamedTuple):
    """What a check found about one of the pairs, named by its index."""

    pair: int
    check: str
    detail: str


class TokenView(NamedTuple):
    """The findings, and the tokens of both answers of each row that has both."""

    findings: list[TokenFinding]
    answer_lengths: list[tuple[int, int]]


def view_tokens(
    pairs: Sequence[PreferencePair], tokenizer: Tokenizer, max_length: int | None
) -> TokenView:
    """Tokenize pairs as training would, without a limit, and look at the ids."""
    named = [replace(pair, id=str(index)) for index, pair in enumerate(pairs)]
    findings: list[TokenFinding] = []
    lengths: list[tuple[int, int]] = []
    for tokenization in _tokenize(named, tokenizer, findings):
        findings += _reported(tokenization)
        for row in tokenization.pairs:
            findings += _found(row, named[int(row.id)], tokenizer, max_length)
            if not named[int(row.id)].is_unpaired:
                lengths.append((len(row.chosen_ids), len(row.rejected_ids)))
    return TokenView(sorted(findings), lengths)


def _tokenize(
    pairs: Sequence[PreferencePair], tokenizer: Tokenizer, findings: list[TokenFinding]
) -> Iterator[Tokenization]:
    """Tokenize what can be; where nothing of a part can be, look at its halves.

    The pairs that no part can do with are added to ``findings``.
    """
    try:
        yield tokenize_pairs(pairs, tokenizer, on_bad_row="skip")
    except InputError as error:
        if len(pairs) == 1:
            reason = str(error).splitlines()[-1]
            findings.append(TokenFinding(int(str(pairs[0].id)), "untokenizable", reason))
            return
        half = len(pairs) // 2
        yield from _tokenize(pairs[:half], tokenizer, findings)
        yield from _tokenize(pairs[half:], tokenizer, findings)


def _reported(tokenization: Tokenization) -> Iterator[TokenFinding]:
    """Yield what the tokenization reports."""
    report = tokenization.report
    for note in report.dropped:
        yield TokenFinding(int(note.id), "untokenizable", note.text)
    for name in report.boundary_merges:
        yield TokenFinding(int(name), "boundary-merge", "the answer is tokenized by itself")
    for name in report.special_in_text:
        yield TokenFinding(int(name), "typed-token", "a special token of the tokenizer in the text")
    for name in report.end_tokens_added:
        yield TokenFinding(int(name), "missing-end", "training adds the end token")


def _found(
    row: TokenizedPair, pair: PreferencePair, tokenizer: Tokenizer, max_length: int | None
) -> Iterator[TokenFinding]:
    """Yield what the ids of one row show."""
    index = int(row.id)
    longest = len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))
    if max_length is not None and longest > max_length:
        yield TokenFinding(index, "too-long", f"{longest} tokens, max_length {max_length}")
    if row.prompt_ids[:2].tolist() == [tokenizer.bos_id] * 2:
        yield TokenFinding(index, "doubled-special", "the prompt begins with two begin tokens")
    ends = []
    for name, ids, answer in (
        ("chosen", row.chosen_ids, pair.chosen),
        ("rejected", row.rejected_ids, pair.rejected),
    ):
        count = sum(id_ in tokenizer.eos_ids for id_ in ids.tolist())
        messages = len(answer) if isinstance(answer, tuple) else 1
        if count > messages:
            ends.append(f"{name} has {count} end tokens where {messages} would do")
    if ends:
        yield TokenFinding(index, "doubled-special", "; ".join(ends))
