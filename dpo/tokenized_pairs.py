"""Preference pairs as token ids, in columns, and the report of how they came about.

Shapes: P pairs, T tokens in all of them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
_NAMED_ROWS = 20


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPair:
    """A preference pair as the model reads it; of an unpaired row one answer has no tokens.

    A token of an answer that is context and not scored, such as one of another speaker between two
    turns of the assistant, stands as ``-1 - id`` (``as_context``).

    Attributes:
        prompt_ids: int32, at least one.
        chosen_ids: int32; follows the prompt.
        rejected_ids: int32; follows the prompt.
        weight: of the pair's loss within its step.
        margin: by how much the chosen reward should exceed the rejected one, in nats.
        label_prob: probability that the label is right.
        id: names the pair in messages.
        source: where the pair comes from.
    """

    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    weight: float = 1.0
    margin: float = 0.0
    label_prob: float = 1.0
    id: str = ""
    source: str | None = None


def as_context(id_: int) -> int:
    """Return how a token of an answer stands that is not scored; its own inverse."""
    return -1 - id_


def model_ids(ids: TokenIds) -> TokenIds:
    """Return the tokens as the model reads them, scored or not."""
    return np.where(ids < 0, -1 - ids, ids)


class TokenizedPairs(Sequence[TokenizedPair]):
    """P tokenized pairs in flat arrays, which may be memory-mapped.

    Example: prompt ``[5, 6]``, chosen ``[7, 2]``, rejected ``[8]`` are ``tokens = [5, 6, 7, 2, 8]``
    and ``offsets = [0, 2, 4, 5]``.

    Args:
        tokens: (T,) int32, prompt, chosen and rejected of each pair in turn.
        offsets: (3 P + 1,) int64, where each of them begins in ``tokens``; the last is T.
        weights: (P,) float32.
        margins: (P,) float32.
        label_probs: (P,) float32.
        ids: P names.
        sources: P sources.

    Raises:
        ValueError: the columns do not fit together, or a prompt or both its answers have no tokens.
    """

    def __init__(
        self,
        *,
        tokens: NDArray[np.int32],
        offsets: NDArray[np.int64],
        weights: NDArray[np.float32],
        margins: NDArray[np.float32],
        label_probs: NDArray[np.float32],
        ids: Sequence[str],
        sources: Sequence[str | None],
    ) -> None:
        self.tokens = tokens
        self.offsets = offsets
        self.weights = weights
        self.margins = margins
        self.label_probs = label_probs
        self.ids = ids
        self.sources = sources
        columns = (weights, margins, label_probs, ids, sources)
        if {len(column) for column in columns} != {(len(offsets) - 1) / 3}:
            raise ValueError(
                f"{len(offsets)} offsets need {(len(offsets) - 1) / 3} rows in every column, found "
                f"{[len(column) for column in columns]}"
            )
        lengths = np.diff(offsets).reshape(-1, 3)
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (lengths < 0).any():
            raise ValueError(f"offsets must rise from 0 to {len(tokens)}")
        if (lengths[:, 0] < 1).any() or (lengths[:, 1:].max(axis=1, initial=0) < 1).any():
            raise ValueError("every row needs tokens of its prompt and of an answer")

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenizedPairs": ...
    def __getitem__(self, index: int | slice) -> "TokenizedPair | TokenizedPairs":
        """Return a pair, whose arrays are views, or a copy of some pairs."""
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        row = range(len(self))[index]
        starts = self.offsets[3 * row : 3 * row + 4]
        prompt_ids, chosen_ids, rejected_ids = (
            self.tokens[begin:end] for begin, end in pairwise(starts)
        )
        return TokenizedPair(
            prompt_ids,
            chosen_ids,
            rejected_ids,
            weight=float(self.weights[row]),
            margin=float(self.margins[row]),
            label_prob=float(self.label_probs[row]),
            id=self.ids[row],
            source=self.sources[row],
        )

    def take(self, rows: Iterable[int]) -> "TokenizedPairs":
        """Return a copy of the pairs in ``rows``, in that order."""
        return columns_of([self[row] for row in rows])

    def lengths(self) -> NDArray[np.int64]:
        """Count the tokens of each pair: (P, 3) int64, prompt, chosen, rejected."""
        return self._lengths

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets).reshape(-1, 3)

    @cached_property
    def scored_lengths(self) -> NDArray[np.int64]:
        """Count the tokens of each pair's answers that are scored: (P, 2) int64."""
        if not (np.asarray(self.tokens) < 0).any():
            return self._lengths[:, 1:]
        ends = np.concatenate([[0], np.cumsum(np.asarray(self.tokens) >= 0)])[self.offsets]
        return np.diff(ends).reshape(-1, 3)[:, 1:]

    @property
    def has_chosen(self) -> NDArray[np.bool_]:
        """(P,) whether the chosen answer is there."""
        return self._lengths[:, 1] > 0

    @property
    def has_rejected(self) -> NDArray[np.bool_]:
        """(P,) whether the rejected answer is there."""
        return self._lengths[:, 2] > 0

    @property
    def is_unpaired(self) -> NDArray[np.bool_]:
        """(P,) whether one answer alone is there."""
        return ~(self.has_chosen & self.has_rejected)

    @cached_property
    def prompt_groups(self) -> NDArray[np.int64]:
        """Number the different prompts from 0 in order of appearance: (P,) int64."""
        numbers: dict[bytes, int] = {}
        starts, ends = self.offsets[:-1:3].tolist(), self.offsets[1::3].tolist()
        digests = (
            hashlib.blake2b(self.tokens[start:end].tobytes(), digest_size=16).digest()
            for start, end in zip(starts, ends, strict=True)
        )
        return np.array([numbers.setdefault(key, len(numbers)) for key in digests], dtype=np.int64)

    @cached_property
    def chains(self) -> NDArray[np.int64]:
        """Number the chains of pairs from 0 in order: (P,) int64.

        A pair is of the chain of the one before if it has its prompt and, as the chosen answer, the
        rejected answer of that one: the pairs of a list of answers, ranked from the best.
        """
        starts = self.offsets.tolist()
        texts = [self.tokens[start:end].tobytes() for start, end in pairwise(starts)]
        goes_on = [
            texts[3 * row] == texts[3 * row - 3] and texts[3 * row + 1] == texts[3 * row - 1]
            for row in range(1, len(self))
        ]
        return np.cumsum([0, *(not same for same in goes_on)])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all columns, in hexadecimal: equal for equal content, whatever holds it."""
        digest = hashlib.sha256()
        for column in (self.tokens, self.offsets, self.weights, self.margins, self.label_probs):
            digest.update(np.ascontiguousarray(column).data)
        digest.update(json.dumps([list(self.ids), list(self.sources)]).encode())
        return digest.hexdigest()


def columns_of(pairs: Sequence[TokenizedPair]) -> TokenizedPairs:
    """Put pairs into columns."""
    texts = [ids for pair in pairs for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    return TokenizedPairs(
        tokens=np.concatenate(texts or [np.empty(0, np.int32)]).astype(np.int32, copy=False),
        offsets=np.array([0, *accumulate(map(len, texts))], dtype=np.int64),
        weights=np.array([pair.weight for pair in pairs], dtype=np.float32),
        margins=np.array([pair.margin for pair in pairs], dtype=np.float32),
        label_probs=np.array([pair.label_prob for pair in pairs], dtype=np.float32),
        ids=[pair.id for pair in pairs],
        sources=[pair.source for pair in pairs],
    )


class RowNote(NamedTuple):
    """What happened to one row."""

    id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizationReport:
    """What became of the rows.

    Attributes:
        rows: how many there were.
        kept: how many have become tokens.
        dropped: rows left out, with the reason.
        cut: rows cut to a limit, with the counts.
        boundary_merges: rows whose prompt and answer would merge if they were tokenized together.
        special_in_text: rows in whose text a special token is written out.
        end_tokens_added: conversations whose chat template marks no end of the answer.
        template_date: the day that the chat template has written into the tokens, if it does so.
        cache: "not used", "stored", "found", or why it was made again.
    """

    rows: int
    kept: int
    dropped: tuple[RowNote, ...] = ()
    cut: tuple[RowNote, ...] = ()
    boundary_merges: tuple[str, ...] = ()
    special_in_text: tuple[str, ...] = ()
    end_tokens_added: tuple[str, ...] = ()
    template_date: str | None = None
    cache: str = "not used"

    def describe(self) -> list[str]:
        """Return the lines that tell a person all of it; a row is named by its id."""
        lines = [f"tokens: {self.kept:,} of {self.rows:,} rows; cache {self.cache}"]
        if self.template_date is not None:
            lines += [f"the chat template wrote the date of {self.template_date} into the tokens"]
        for rows, what in (
            ([f"{row.id} ({row.text})" for row in self.dropped], "dropped"),
            ([f"{row.id} ({row.text})" for row in self.cut], "cut"),
            (self.boundary_merges, "merge across the boundary of prompt and answer"),
            (self.special_in_text, "have special tokens written out in their text"),
            (self.end_tokens_added, "got an end token that the chat template does not write"),
        ):
            if rows:
                more = f" and {len(rows) - _NAMED_ROWS:,} more" if len(rows) > _NAMED_ROWS else ""
                lines += [f"{len(rows):,} rows {what}: {', '.join(rows[:_NAMED_ROWS])}{more}"]
        return lines


@dataclass(frozen=True, slots=True)
class Tokenization:
    """The pairs as tokens and the report on them."""

    pairs: TokenizedPairs
    report: TokenizationReport
