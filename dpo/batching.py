"""From tokenized pairs to micro-batches: the flat stream, and how rows are packed.

Shapes: N tokens in the stream, P pairs, A = 2 P answers, K answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo.segments import Segments, TokenStream, move, plan_attention
from dpo.tokenized_pairs import TokenIds, TokenizedPair, model_ids


@dataclass(frozen=True)
class AnswerBatch:
    """Texts to score in one forward pass: prompts as roots, their answers as children.

    Attributes:
        stream: what the model reads.
        predictors: (K,) int64, the stream index whose hidden state predicts each answer token.
        targets: (K,) int64, the answer tokens themselves.
        answers: (K,) int64, the answer each token belongs to, counted over the prompts in turn.
        answer_count: A.
        answer_segments: the segment of each answer that is there.
    """

    stream: TokenStream
    predictors: Tensor
    targets: Tensor
    answers: Tensor
    answer_count: int
    answer_segments: tuple[int, ...]

    @property
    def filler(self) -> int:
        """Tokens that only fill the stream up: those of a first segment that nothing follows."""
        segments = self.stream.plan.segments
        return 0 if 0 in segments.parents else segments.lengths[0]

    def reads(self) -> Tensor:
        """Count for each token of the stream the answers that it is read for, (N,) float32."""
        segments = self.stream.plan.segments
        counts = np.zeros(len(segments.lengths), np.float32)
        for segment in self.answer_segments:
            counts[segments.path(segment)] += 1
        return torch.from_numpy(np.repeat(counts, segments.lengths))

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
class Draws:
    """Uniform random numbers in [0, 1), float32, for the losses that draw.

    Attributes:
        pairs: (P,), one for each pair.
        tokens: (K,), one for each answer token.
    """

    pairs: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class PairBatch:
    """P pairs for the model. Answer ``2 i`` is the chosen one of pair i, ``2 i + 1`` the rejected.

    An unpaired row has one of them alone.

    Attributes:
        texts: the pairs as prompts with two answers each.
        reference: (K,) float32 log-probs of the answer tokens under the reference, or None.
        weight: (P,) float32.
        margin: (P,) float32.
        label_prob: (P,) float32.
        rows: the pairs' row numbers in the data.
        draws: random numbers, where a loss asks for them.
        chain: (P,) int64, ``TokenizedPairs.chains``, where a loss asks for them.
    """

    texts: AnswerBatch
    reference: Tensor | None
    weight: Tensor
    margin: Tensor
    label_prob: Tensor
    rows: tuple[int, ...]
    draws: Draws | None = None
    chain: Tensor | None = None

    def to(self, device: torch.device) -> PairBatch:
        """Return the same batch on ``device``."""
        return replace(
            self,
            texts=self.texts.to(device),
            reference=None if self.reference is None else move(self.reference, device),
            weight=move(self.weight, device),
            margin=move(self.margin, device),
            label_prob=move(self.label_prob, device),
            draws=None
            if self.draws is None
            else Draws(move(self.draws.pairs, device), move(self.draws.tokens, device)),
            chain=None if self.chain is None else move(self.chain, device),
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

    Example:
        >>> from dpo import collate, load_tokenizer, read_pairs, tokenize_pairs
        >>> pairs = tokenize_pairs(read_pairs("pairs.jsonl"), load_tokenizer("model")).pairs
        >>> batch = collate([pairs[0], pairs[1]], multiple_of=1)
        >>> batch.texts.stream.input_ids.shape  # two prompts of 7, each with answers of 3 and 4
        torch.Size([28])
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
    An answer without tokens is counted and takes no place; tokens that stand as context
    (``as_context``) are read and not scored.

    Raises:
        ValueError: a prompt is empty, or there is no answer.
    """
    ids: list[TokenIds] = []
    parents: list[int | None] = []
    scored: list[int | None] = []
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
            scored.append(put(root, answer) if len(answer) else None)
    return collate_forest(ids, parents, scored, multiple_of=multiple_of)


def collate_forest(
    ids: Sequence[TokenIds],
    parents: Sequence[int | None],
    scored: Sequence[int | None],
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
        scored: the segments that are answers, counted in this order; none is a root. None stands
            for an answer that is missing.
        multiple_of: as for ``collate``.

    Raises:
        ValueError: a segment is empty, a parent does not come before its child, a root is to be
            scored, or nothing is.
    """
    present = [segment for segment in scored if segment is not None]
    if not present:
        raise ValueError("no segment is to be scored")
    roots = [segment for segment in present if parents[segment] is None]
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
    lengths = [0 if segment is None else int((ids[segment] >= 0).sum()) for segment in scored]
    return _index_answers(laid_ids, segments, [place[segment] for segment in present], lengths)


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
    ids: list[TokenIds], segments: Segments, answer_segments: list[int], lengths: list[int]
) -> AnswerBatch:
    """Build the stream of segments ``ids`` and the indexes of the tokens of ``answer_segments``.

    ``lengths`` are the scored tokens of all answers, 0 for one without a segment.
    """
    predictors = []
    for segment in answer_segments:
        *_, prompt, _ = segments.path(segment)
        last_of_prompt = segments.starts[prompt] + segments.lengths[prompt] - 1
        before = np.concatenate([[last_of_prompt], segments.tokens([segment])[:-1]])
        predictors.append(before[ids[segment] >= 0])
    targets = np.concatenate([ids[segment][ids[segment] >= 0] for segment in answer_segments])
    return AnswerBatch(
        stream=TokenStream(
            input_ids=torch.from_numpy(model_ids(np.concatenate(ids)).astype(np.int64)),
            positions=torch.from_numpy(segments.positions()),
            plan=plan_attention(segments),
        ),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(targets.astype(np.int64)),
        answers=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        answer_count=len(lengths),
        answer_segments=tuple(answer_segments),
    )


def draw(rows: Sequence[int], tokens: Sequence[int], *, seed: int, step: int) -> Draws:
    """Draw random numbers for pairs that follow from seed, step and row alone.

    Args:
        rows: P row numbers.
        tokens: the answer tokens of each.
        seed: of the run, in [0, 2^63).
        step: of the optimizer.
    """
    numbers = [
        np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, row])).random(
            1 + count, dtype=np.float32
        )
        for row, count in zip(rows, tokens, strict=True)
    ]
    return Draws(
        torch.from_numpy(np.array([of_row[0] for of_row in numbers])),
        torch.from_numpy(np.concatenate([of_row[1:] for of_row in numbers])),
    )


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
