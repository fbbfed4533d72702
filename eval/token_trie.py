"""Token sequences as a radix tree, in which what several begin with stands once.

Shapes: A sequences, S segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenTrie:
    """A tree of token segments; following segments down from the top spells a sequence.

    Attributes:
        segments: (S,) tokens of each, at least one, int32.
        parents: (S,) the segment above, which comes earlier; None at the top.
        paths: (A, S) 1.0 where a sequence goes through a segment, float64.
    """

    segments: tuple[NDArray[np.int32], ...]
    parents: tuple[int | None, ...]
    paths: NDArray[np.float64]

    @property
    def tokens(self) -> int:
        """Tokens in all segments."""
        return sum(map(len, self.segments))

    @property
    def depth(self) -> int:
        """Tokens of the longest sequence."""
        return int((self.paths @ [len(segment) for segment in self.segments]).max())


def build_trie(sequences: Sequence[Sequence[int]]) -> TokenTrie:
    """Put sequences into a tree.

    Example: ``[5, 6, 7]``, ``[5, 6, 8]`` and ``[5, 9]`` give the segments ``[5]``, ``[6]``,
    ``[7]``, ``[8]``, ``[9]`` with parents ``None, 0, 1, 1, 0`` and paths ``0 1 2``, ``0 1 3`` and
    ``0 4``.
    """
    segments: list[NDArray[np.int32]] = []
    parents: list[int | None] = []
    members: list[list[int]] = []  # of each segment, the sequences that go through it

    def grow(sequences_here: Sequence[int], start: int, parent: int | None) -> None:
        """Add what follows where sequences agree in all tokens before ``start``."""
        by_token: dict[int, list[int]] = {}
        for sequence in sequences_here:
            if start < len(sequences[sequence]):
                by_token.setdefault(sequences[sequence][start], []).append(sequence)
        for group in by_token.values():
            columns = zip(*(sequences[sequence][start:] for sequence in group), strict=False)
            alike = takewhile(lambda column: len(set(column)) == 1, columns)
            shared = [column[0] for column in alike]
            segments.append(np.array(shared, np.int32))
            parents.append(parent)
            members.append(group)
            grow(group, start + len(shared), len(segments) - 1)

    grow(range(len(sequences)), 0, None)
    paths = np.zeros((len(sequences), len(segments)))
    for segment, group in enumerate(members):
        paths[group, segment] = 1.0
    return TokenTrie(tuple(segments), tuple(parents), paths)
