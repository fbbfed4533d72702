"""Pairs to go through again and again that need not be in memory: they are read anew each time.

Of each pair an id and a hash are held, so that rows can be chosen, and found in the token cache,
without reading them. Shapes: P pairs of a source, R rows chosen of them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo.pair import PreferencePair, plain_json
from dpo.pair_rows import pair_to_row

RowNumbers = NDArray[np.int64]
HASH_BYTES = 16


class PairNotes:
    """What is held of the pairs of a source: about 100 bytes of each, and no text.

    Attributes:
        ids: ``row-<number>`` of a pair without one.
        hashes: of all that a pair holds, 16 bytes each.
        conversations: whether each is a conversation, a byte each.
        chosen_alone: how many are unpaired and good.
        rejected_alone: how many are unpaired and bad.
    """

    def __init__(self, pairs: Iterable[PreferencePair] = ()) -> None:
        self.ids: list[str] = []
        self.hashes = bytearray()
        self.conversations = bytearray()
        self.chosen_alone = self.rejected_alone = 0
        for pair in pairs:
            self.add(pair)

    def add(self, pair: PreferencePair) -> None:
        """Note a further pair."""
        row = json.dumps(pair_to_row(pair), sort_keys=True, default=plain_json)
        self.ids.append(pair.id or f"row-{len(self.ids) + 1}")
        self.hashes += hashlib.blake2b(row.encode(), digest_size=HASH_BYTES).digest()
        self.conversations.append(isinstance(pair.prompt, tuple))
        self.chosen_alone += pair.rejected is None
        self.rejected_alone += pair.chosen is None

    def __len__(self) -> int:
        return len(self.ids)


class Part(NamedTuple):
    """Rows of one source.

    Attributes:
        read: yields the pairs of some rows, given in rising order.
        notes: on all P pairs of the source.
        rows: (R,) which rows, from 0, rising.
        time: how often the rows have been taken before; the second time an id ends in ``#2``.
    """

    read: Callable[[RowNumbers], Iterable[PreferencePair]]
    notes: PairNotes
    rows: RowNumbers
    time: int = 0

    @property
    def ids(self) -> Iterator[str]:
        """The ids of the rows."""
        mark = f"#{self.time + 1}" if self.time else ""
        return (self.notes.ids[row] + mark for row in self.rows)

    @property
    def pairs(self) -> Iterator[PreferencePair]:
        """The pairs of the rows, read anew."""
        for name, pair in zip(self.ids, self.read(self.rows), strict=True):
            yield replace(pair, id=name) if self.time else pair


@dataclass(frozen=True)
class PairView:
    """Rows of one or more sources, read anew each time that they are gone through."""

    parts: Sequence[Part]

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    def __iter__(self) -> Iterator[PreferencePair]:
        return (pair for part in self.parts for pair in part.pairs)

    @property
    def ids(self) -> Iterator[str]:
        """The ids of the pairs; nothing is read."""
        return (name for part in self.parts for name in part.ids)

    @property
    def has_conversations(self) -> bool:
        """Whether a pair is a conversation; nothing is read."""
        return any(
            np.frombuffer(part.notes.conversations, np.bool_)[part.rows].any()
            for part in self.parts
        )

    def hash(self, *others: str) -> str:
        """Return the hash of all pairs, in their order, and of other texts; nothing is read."""
        digest = hashlib.sha256(json.dumps([*others, [part.time for part in self.parts]]).encode())
        for part in self.parts:
            hashes = np.frombuffer(part.notes.hashes, f"V{HASH_BYTES}")  # (P,)
            digest.update(hashes[part.rows].tobytes() + b"\n")
        return digest.hexdigest()

    def take(self, is_wanted: NDArray[np.bool_]) -> "PairView":
        """Return a view of those pairs that (len(self),) flags mark."""
        ends = np.cumsum([len(part.rows) for part in self.parts])
        flags = np.split(is_wanted, ends[:-1])
        return PairView(
            [
                part._replace(rows=part.rows[wanted])
                for part, wanted in zip(self.parts, flags, strict=True)
            ]
        )


def view_of(pairs: Sequence[PreferencePair]) -> PairView:
    """Return a view of pairs in memory."""
    notes = PairNotes(pairs)
    return PairView([Part(lambda rows: (pairs[row] for row in rows), notes, np.arange(len(notes)))])
