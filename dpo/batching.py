"""From tokenized pairs to micro-batches: the flat stream, and which pairs make up which step.

Shapes: N tokens in the stream, P pairs, A = 2 P answers, K answer tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo.segments import Segments, TokenStream, move, plan_attention
from dpo.tokenized_pairs import TokenIds, TokenizedPair

_ROUNDS = 8  # of the Feistel network: four leave a bias that 3,000 shuffles of seven rows show


@dataclass(frozen=True)
class AnswerBatch:
    """Texts to score in one forward pass: prompts as roots, their answers as children.

    Attributes:
        stream: what the model reads.
        predictors: (K,) int64, the stream index whose hidden state predicts each answer token.
        targets: (K,) int64, the answer tokens themselves.
        answers: (K,) int64, the answer each token belongs to, counted over the prompts in turn.
        answer_count: A.
    """

    stream: TokenStream
    predictors: Tensor
    targets: Tensor
    answers: Tensor
    answer_count: int

    def sum_per_answer(self, values: Tensor) -> Tensor:
        """Sum (K,) values of answer tokens to (A,)."""
        return values.new_zeros(self.answer_count).index_add_(0, self.answers, values)

    def to(self, device: torch.device) -> AnswerBatch:
        """Return the same batch on ``device``."""
        return replace(
            self,
            stream=self.stream.to(device),
            predictors=move(self.predictors, device),
            targets=move(self.targets, device),
            answers=move(self.answers, device),
        )


@dataclass(frozen=True)
class PairBatch:
    """P pairs for the model. Answer ``2 i`` is the chosen one of pair i, ``2 i + 1`` the rejected.

    Attributes:
        texts: the pairs as prompts with two answers each.
        reference: (K,) float32 log-probs of the answer tokens under the reference, or None.
        weight: (P,) float32.
        margin: (P,) float32.
        label_prob: (P,) float32.
        rows: the pairs' row numbers in the data.
    """

    texts: AnswerBatch
    reference: Tensor | None
    weight: Tensor
    margin: Tensor
    label_prob: Tensor
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> PairBatch:
        """Return the same batch on ``device``."""
        return replace(
            self,
            texts=self.texts.to(device),
            reference=None if self.reference is None else move(self.reference, device),
            weight=move(self.weight, device),
            margin=move(self.margin, device),
            label_prob=move(self.label_prob, device),
        )


def collate(
    pairs: Sequence[TokenizedPair],
    *,
    rows: Sequence[int] | None = None,
    reference: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]] | None = None,
    share_prefix: bool = True,
    multiple_of: int = 16,
) -> PairBatch:
    """Put ``pairs`` into one stream without padding.

    Example: prompt ``[5, 6, 7]``, chosen ``[8, 2]``, rejected ``[9]`` with ``multiple_of=1``
    gives::

        input_ids  [5, 6, 7, 8, 2, 9]     positions [0, 1, 2, 3, 4, 3]
        segments   lengths (3, 2, 1), parents (None, 0, 0)
        predictors [2, 3, 2]              the last prompt token predicts the first token of both
        answers targets    [8, 2, 9] answers    [0, 0, 1]

    Args:
        pairs: the pairs of the micro-batch.
        rows: their row numbers, for messages; 0, 1, ... if not given.
        reference: per-token reference log-probs (chosen, rejected) of each pair.
        share_prefix: each prompt and each answer of it once, however many pairs have them, instead
            of once per answer; the result is the same.
        multiple_of: fill the stream with tokens nobody attends to up to a multiple of this, because
            matrix products of odd sizes are slow on tensor cores and AMX.
    """
    texts = collate_answers(
        [(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs],
        share_prefix=share_prefix,
        multiple_of=multiple_of,
    )
    values = None
    if reference is not None:
        values = torch.from_numpy(np.concatenate([side for pair in reference for side in pair]))
    return PairBatch(
        texts=texts,
        reference=values,
        weight=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
        margin=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        label_prob=torch.tensor([pair.label_prob for pair in pairs], dtype=torch.float32),
        rows=tuple(range(len(pairs)) if rows is None else rows),
    )


def collate_answers(
    trees: Sequence[tuple[TokenIds, Sequence[TokenIds]]],
    *,
    share_prefix: bool = True,
    multiple_of: int = 16,
) -> AnswerBatch:
    """Put prompts with any number of answers each into one stream; see ``collate``.

    Equal prompts become one root, equal answers to it one child, which is scored for each of them.

    Raises:
        ValueError: a prompt or an answer is empty, or there is no answer.
    """
    ids: list[TokenIds] = []
    parents: list[int | None] = []
    scored: list[int] = []
    place: dict[tuple[int | None, bytes], int] = {}  # of a segment, by its parent and tokens

    def put(parent: int | None, tokens: TokenIds) -> int:
        key = (parent, tokens.tobytes())
        if key in place and share_prefix:
            return place[key]
        place[key] = len(ids)
        ids.append(tokens)
        parents.append(parent)
        return place[key]

    for prompt, answers in trees:
        root = put(None, prompt)
        for number, answer in enumerate(answers):
            if number and not share_prefix:
                root = put(None, prompt)
            scored.append(put(root, answer))
    return collate_forest(ids, parents, scored, multiple_of=multiple_of)


def collate_forest(
    ids: Sequence[TokenIds],
    parents: Sequence[int | None],
    scored: Sequence[int],
    *,
    multiple_of: int = 16,
) -> AnswerBatch:
    """Put trees of segments of any depth into one stream, to score the tokens of some of them.

    The stream is laid out in runs, so that few keys are gathered: each root with its first child,
    that one's first child and so on; then every other segment with its first children.

    Example: ids ``[5, 6], [7], [8], [9, 2], [3]`` with parents ``None, 0, 0, 1, 1``, of which 2, 3
    and 4 are scored, and ``multiple_of=1`` give::

        input_ids  [5, 6, 7, 9, 2, 8, 3]     positions [0, 1, 2, 3, 4, 2, 3]
        segments   lengths (2, 1, 2, 1, 1), parents (None, 0, 1, 0, 1)
        predictors [1, 2, 3, 2]              the last token above a segment predicts its first
        targets    [8, 9, 2, 3]              answers [0, 1, 1, 2]

    Args:
        ids: the tokens of each segment.
        parents: for each segment the index of an earlier one, or None for a root.
        scored: the segments that are answers, counted in this order; none is a root.
        multiple_of: as for ``collate``.

    Raises:
        ValueError: a segment is empty, a parent does not come before its child, a root is to be
            scored, or nothing is.
    """
    if not scored:
        raise ValueError("no segment is to be scored")
    roots = [segment for segment in scored if parents[segment] is None]
    if roots:
        raise ValueError(f"segment {roots[0]} is a root: nothing predicts its first token")
    order = _in_runs(Segments(tuple(map(len, ids)), tuple(parents)))
    laid_ids, laid_parents = [ids[segment] for segment in order], [parents[s] for s in order]
    filler = -sum(map(len, ids)) % multiple_of
    if filler:
        laid_ids.insert(0, np.zeros(filler, np.int32))
        laid_parents.insert(0, None)
    place = {segment: index for index, segment in enumerate(order, start=int(filler > 0))}
    segments = Segments(
        tuple(map(len, laid_ids)),
        tuple(None if parent is None else place[parent] for parent in laid_parents),
    )
    return _index_answers(laid_ids, segments, [place[segment] for segment in scored])


def _in_runs(segments: Segments) -> list[int]:
    """Order segments so that as many as can be follow their parent at once, and roots lead."""
    first_child: dict[int, int] = {}
    for segment, parent in enumerate(segments.parents):
        if parent is not None:
            first_child.setdefault(parent, segment)
    followers = set(first_child.values())
    heads = [segment for segment in range(len(segments.parents)) if segment not in followers]
    order: list[int] = []
    for head in sorted(heads, key=lambda segment: segments.parents[segment] is not None):
        node: int | None = head
        while node is not None:
            order.append(node)
            node = first_child.get(node)
    return order


def _index_answers(
    ids: list[TokenIds], segments: Segments, answer_segments: list[int]
) -> AnswerBatch:
    """Build the stream of segments ``ids`` and the indexes of the tokens of ``answer_segments``."""
    predictors = []
    for segment in answer_segments:
        *_, prompt, _ = segments.path(segment)
        last_of_prompt = segments.starts[prompt] + segments.lengths[prompt] - 1
        predictors.append(np.concatenate([[last_of_prompt], segments.tokens([segment])[:-1]]))
    targets = np.concatenate([ids[segment] for segment in answer_segments])
    lengths = [len(ids[segment]) for segment in answer_segments]
    return AnswerBatch(
        stream=TokenStream(
            input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
            positions=torch.from_numpy(segments.positions()),
            plan=plan_attention(segments),
        ),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(targets.astype(np.int64)),
        answers=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        answer_count=len(lengths),
    )


@dataclass(frozen=True)
class StepSampler:
    """Which rows make up which optimizer step, computed from the step number alone.

    Each epoch is a permutation of all rows, cut into steps of ``batch_size``; the last step of an
    epoch takes what is left. Nothing is stored and nothing is replayed: a resumed run asks for the
    next step.
    """

    pairs: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(self.pairs / self.batch_size)

    def rows(self, step: int) -> list[int]:
        """Rows of optimizer step ``step``, counted from 0 over all epochs."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.batch_size
        last = min(first + self.batch_size, self.pairs)
        return [
            permuted(index, self.pairs, seed=(self.seed, epoch)) for index in range(first, last)
        ]


@dataclass(eq=False)
class GroupSampler:
    """Like ``StepSampler``, but rows of one group follow each other.

    Each epoch is a permutation of the groups, cut into steps of ``batch_size`` rows, so that a step
    holds whole groups except at its ends. An epoch's order follows from the seed and the epoch.

    Attributes:
        groups: (P,) number of each row's group, from 0.
    """

    groups: NDArray[np.int64]
    batch_size: int
    seed: int
    _epoch: int = field(default=-1, init=False, repr=False)
    _order: list[int] = field(default_factory=list, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(len(self.groups) / self.batch_size)

    def rows(self, step: int) -> list[int]:
        """Rows of optimizer step ``step``, counted from 0 over all epochs."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        first = step_of_epoch * self.batch_size
        return self._order[first : first + self.batch_size]

    def _shuffled(self, epoch: int) -> list[int]:
        """Return all rows in the order of an epoch."""
        count = int(self.groups.max()) + 1
        places = [permuted(group, count, seed=(self.seed, epoch)) for group in range(count)]
        order: list[int] = np.argsort(np.array(places)[self.groups], kind="stable").tolist()
        return order


def permuted(index: int, size: int, *, seed: tuple[int, ...]) -> int:
    """Return where a seeded permutation of ``range(size)`` sends ``index``, in O(1) memory.

    A Feistel network permutes the next power of four; walking its cycle until it lands below
    ``size`` permutes the range (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half_bits = max(1, math.ceil(math.log2(max(size, 2)) / 2))
    low = (1 << half_bits) - 1
    key = hashlib.blake2b(repr(seed).encode(), digest_size=8 * _ROUNDS).digest()
    keys = [int.from_bytes(key[first : first + 8]) for first in range(0, len(key), 8)]
    while True:
        left, right = index >> half_bits, index & low
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        index = left << half_bits | right
        if index < size:
            return index


def _mixed(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def pack(sizes: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Put items into as few bins of ``capacity`` as first-fit decreasing finds.

    An item larger than ``capacity`` gets a bin of its own.

    Returns:
        The item indexes of each bin, ascending in each.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for number, free in enumerate(room):
            if sizes[item] <= free:
                bins[number].append(item)
                room[number] -= sizes[item]
                break
        else:
            bins.append([item])
            room.append(capacity - sizes[item])
    return [sorted(items) for items in bins]
