"""A forest of token segments in one flat stream, and who attends to whom in it.

A prompt is a root, each of its answers a child. A token attends to every token of the segments
above its own and, in its own segment, to itself and what comes before. Nothing is padded and
nothing is
repeated: the prompt stands in the stream once however many answers share it.

Shapes: N tokens, S segments, R runs, M gathered keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Lengths and parents of the segments, in stream order.

    Attributes:
        lengths: tokens of each segment, at least one.
        parents: for each segment the index of an earlier one, or None for a root.
    """

    lengths: tuple[int, ...]
    parents: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.parents):
            raise ValueError(f"{len(self.lengths)} lengths but {len(self.parents)} parents")
        for index, (length, parent) in enumerate(zip(self.lengths, self.parents, strict=True)):
            if length < 1:
                raise ValueError(f"segment {index} has {length} tokens, expected at least 1")
            if parent is not None and not 0 <= parent < index:
                raise ValueError(
                    f"segment {index} has parent {parent}, expected an earlier segment"
                )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index in the stream of each segment's first token."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Tokens above each segment: the position of its first token."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent is None else depths[parent] + self.lengths[parent])
        return tuple(depths)

    def path(self, segment: int) -> list[int]:
        """Return the segments from the root down to ``segment``, both included."""
        path = []
        node: int | None = segment
        while node is not None:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def tokens(self, segments: Sequence[int]) -> NDArray[np.int64]:
        """Stream indexes of the tokens of ``segments``, one segment after another."""
        ranges = [np.arange(self.starts[s], self.starts[s] + self.lengths[s]) for s in segments]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)

    def positions(self) -> NDArray[np.int64]:
        """(N,) position of each token in its own text, counted from its root."""
        return np.concatenate(
            [
                np.arange(depth, depth + length)
                for depth, length in zip(self.depths, self.lengths, strict=True)
            ]
        )

    def attention_mask(self) -> Tensor:
        """(N, N) bool: may the token of this row see the token of this column? The definition."""
        allowed = torch.zeros(sum(self.lengths), sum(self.lengths), dtype=torch.bool)
        for segment, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            path = torch.from_numpy(self.tokens(self.path(segment)))
            above = len(path) - length
            visible = torch.ones(length, len(path), dtype=torch.bool).tril(above)
            allowed[start : start + length, path] = visible
        return allowed


@dataclass(frozen=True)
class AttentionPlan:
    """The same visibility as a list of causal runs, which is what kernels compute fast.

    A run is a maximal row of neighbouring segments in which each is the child of the one before, so
    its tokens see each other causally. *Root runs* begin at a root and need no other keys. *Branch
    runs* begin below another segment: their keys are the gathered tokens above them and then their
    own, aligned at the lower right. Root runs come first in the stream.

    Attributes:
        root_lengths: tokens of each root run.
        branch_lengths: tokens of each branch run.
        branch_key_lengths: keys of each branch run (tokens above it and its own).
        branch_keys: (M,) int64, stream indexes of those keys, run by run.
        root_bounds: (root runs + 1,) int32, cumulative root_lengths, on the device.
        branch_bounds: (branch runs + 1,) int32, cumulative branch_lengths.
        branch_key_bounds: (branch runs + 1,) int32, cumulative branch_key_lengths.
        segments: the forest itself.
    """

    root_lengths: tuple[int, ...]
    branch_lengths: tuple[int, ...]
    branch_key_lengths: tuple[int, ...]
    branch_keys: Tensor
    root_bounds: Tensor
    branch_bounds: Tensor
    branch_key_bounds: Tensor
    segments: Segments

    @property
    def root_tokens(self) -> int:
        """Tokens in the root runs: where the branch runs begin in the stream."""
        return sum(self.root_lengths)

    def to(self, device: torch.device) -> AttentionPlan:
        """Return the same plan with its tensors on ``device``."""
        return replace(
            self,
            branch_keys=move(self.branch_keys, device),
            root_bounds=move(self.root_bounds, device),
            branch_bounds=move(self.branch_bounds, device),
            branch_key_bounds=move(self.branch_key_bounds, device),
        )


@dataclass(frozen=True)
class TokenStream:
    """What a model reads: N tokens of many texts, and how they hang together.

    Attributes:
        input_ids: (N,) int64.
        positions: (N,) int64, counted from each token's root.
        plan: who attends to whom.
    """

    input_ids: Tensor
    positions: Tensor
    plan: AttentionPlan

    def to(self, device: torch.device) -> TokenStream:
        """Return the same stream on ``device``."""
        return TokenStream(
            move(self.input_ids, device), move(self.positions, device), self.plan.to(device)
        )


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; to CUDA from pinned memory, without waiting."""
    source = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return source.to(device, non_blocking=True)


def plan_attention(segments: Segments) -> AttentionPlan:
    """Find the runs of ``segments``.

    Example: a prompt of 3 tokens, a chosen answer of 2, a rejected one of 1, as
    ``Segments((3, 2, 1), (None, 0, 0))``, has one root run of 5 tokens (prompt and chosen) and one
    branch run of 1 token with keys 0, 1, 2 (prompt) and 5 (itself).

    Raises:
        ValueError: a root run stands behind a branch run.
    """
    roots: list[int] = []
    branches: list[int] = []
    keys: list[NDArray[np.int64]] = []
    for segment, (length, parent) in enumerate(
        zip(segments.lengths, segments.parents, strict=True)
    ):
        if parent is None and branches:
            raise ValueError(f"segment {segment} is a root behind a branch: put roots first")
        if parent is None:
            roots.append(length)
        elif parent == segment - 1 and not branches:
            roots[-1] += length
        elif parent == segment - 1:
            branches[-1] += length
            keys[-1] = np.concatenate([keys[-1], segments.tokens([segment])])
        else:
            branches.append(length)
            keys.append(segments.tokens(segments.path(segment)))
    return AttentionPlan(
        root_lengths=tuple(roots),
        branch_lengths=tuple(branches),
        branch_key_lengths=tuple(len(run) for run in keys),
        branch_keys=torch.from_numpy(np.concatenate(keys) if keys else np.zeros(0, np.int64)),
        root_bounds=_bounds(roots),
        branch_bounds=_bounds(branches),
        branch_key_bounds=_bounds([len(run) for run in keys]),
        segments=segments,
    )


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def visible_keys(
    queries: int, keys: int, window: int | None, device: torch.device | None = None
) -> Tensor | None:
    """Say which keys each query of a run sees, (queries, keys) bool, aligned at the lower right.

    None where each query sees its own key and all before it, and there are no others.
    """
    if queries == keys and (window is None or window >= keys):
        return None
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return visible if window is None else visible.triu(keys - queries - window + 1)
