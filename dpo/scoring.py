"""From a micro-batch and a model to the log-probs of its pairs.

Shapes: P pairs, K answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpo.batching import PairBatch, collate, pack
from dpo.log_probs import TokenLogProbs, completion_log_probs
from dpo.losses import PairLogProbs
from dpo.policy import Policy
from dpo.precision import Precision
from dpo.reference import AnswerLogProbs, ReferenceLogProbs
from dpo.tokenized_pairs import TokenizedPairs

_WINDOW = 1024  # rows packed at a time where their order is free


@dataclass(frozen=True)
class MicroBatches:
    """Cuts rows of a data set into micro-batches of bounded size.

    Attributes:
        pairs: the data.
        reference: its reference log-probs, or None.
        micro_batch_size: pairs in a micro-batch; or
        tokens_per_micro_batch: tokens in a micro-batch. A pair that is longer stands alone.
        share_prefix: compute a prompt once for all pairs of a micro-batch that have it.
    """

    pairs: TokenizedPairs
    reference: ReferenceLogProbs | None = None
    micro_batch_size: int | None = None
    tokens_per_micro_batch: int | None = 8192
    share_prefix: bool = True

    def split(self, rows: Sequence[int]) -> list[list[int]]:
        """Divide ``rows``, in any order, over micro-batches."""
        if self.micro_batch_size is not None:
            size = self.micro_batch_size
            return [list(rows[first : first + size]) for first in range(0, len(rows), size)]
        assert self.tokens_per_micro_batch is not None
        units, sizes = self._units(rows, capacity=self.tokens_per_micro_batch)
        bins = pack(sizes, capacity=self.tokens_per_micro_batch)
        return [[row for unit in items for row in units[unit]] for items in bins]

    def split_sorted(self, rows: Sequence[int]) -> list[list[int]]:
        """Divide any number of ``rows`` over micro-batches of similar lengths, longest first.

        Rows of one prompt stay together.
        """
        index = np.array(rows, dtype=np.int64)
        lengths, groups = self.pairs.lengths()[index].sum(axis=1), self.pairs.prompt_groups[index]
        longest = np.zeros(len(self.pairs), dtype=np.int64)  # of each prompt
        np.maximum.at(longest, groups, lengths)
        ordered = index[np.lexsort((groups, -longest[groups]))].tolist()
        windows = [ordered[first : first + _WINDOW] for first in range(0, len(ordered), _WINDOW)]
        return [batch for window in windows for batch in self.split(window)]

    def _units(self, rows: Sequence[int], *, capacity: int) -> tuple[list[list[int]], list[int]]:
        """Put rows of one prompt together, up to ``capacity`` tokens; return them and the tokens.

        Answers that are equal are counted each, so a size is an upper bound.
        """
        lengths = self.pairs.lengths()[list(rows)]  # (rows, 3): prompt, chosen, rejected
        answers = lengths[:, 1:].sum(axis=1).tolist()
        prompts = lengths[:, 0].tolist()
        if not self.share_prefix:
            sizes = [2 * prompt + both for prompt, both in zip(prompts, answers, strict=True)]
            return [[row] for row in rows], sizes
        units: list[list[int]] = []
        sizes = []
        open_unit: dict[bytes, int] = {}
        for row, prompt, both in zip(rows, prompts, answers, strict=True):
            key = self.pairs[row].prompt_ids.tobytes()
            unit = open_unit.get(key)
            if unit is None or sizes[unit] + both > capacity:
                unit = open_unit[key] = len(units)
                units.append([])
                sizes.append(prompt)
            units[unit].append(row)
            sizes[unit] += both
        return units, sizes

    def collate(self, rows: Sequence[int]) -> PairBatch:
        """Put ``rows`` into one micro-batch."""
        reference = self.reference
        return collate(
            [self.pairs[row] for row in rows],
            rows=rows,
            reference=None if reference is None else [reference[row] for row in rows],
            share_prefix=self.share_prefix,
        )


@dataclass(frozen=True)
class ScoredPairs:
    """A micro-batch under a policy.

    Attributes:
        batch: the micro-batch.
        tokens: its answer tokens, (K,) each.
        pairs: the same summed over each answer, (P,) each; a missing reference is zero.
    """

    batch: PairBatch
    tokens: TokenLogProbs
    pairs: PairLogProbs


def score_batch(policy: Policy, batch: PairBatch) -> ScoredPairs:
    """Run ``policy`` over ``batch``, differentiably."""
    tokens = completion_log_probs(policy, batch.texts)
    log_probs = tokens.log_probs
    chosen, rejected = batch.texts.sum_per_answer(log_probs).view(-1, 2).unbind(1)
    chosen_tokens, rejected_tokens = (
        batch.texts.sum_per_answer(torch.ones_like(log_probs)).view(-1, 2).unbind(1)
    )
    reference = torch.zeros_like(log_probs) if batch.reference is None else batch.reference
    reference_chosen, reference_rejected = (
        batch.texts.sum_per_answer(reference.to(log_probs.dtype)).view(-1, 2).unbind(1)
    )
    pairs = PairLogProbs(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        weight=batch.weight.to(log_probs.dtype),
        margin=batch.margin.to(log_probs.dtype),
        label_prob=batch.label_prob.to(log_probs.dtype),
    )
    return ScoredPairs(batch, tokens, pairs)


@torch.no_grad()
def score_rows(
    policy: Policy,
    batches: MicroBatches,
    rows: Sequence[int],
    *,
    precision: Precision,
    device: torch.device,
) -> ScoredPairs:
    """Score ``rows`` as one micro-batch, without gradient."""
    with precision.context(device):
        return score_batch(policy, batches.collate(rows).to(device))


def answer_log_probs(scored: ScoredPairs) -> list[AnswerLogProbs]:
    """Take the per-token log-probs of each pair's two answers to the host, float32."""
    values = scored.tokens.log_probs.float().cpu().numpy()  # (K,), answer after answer
    lengths = torch.stack([scored.pairs.chosen_tokens, scored.pairs.rejected_tokens], dim=1)
    ends = np.cumsum(lengths.flatten().long().cpu().numpy())
    answers = np.split(values, ends[:-1])
    return list(zip(answers[0::2], answers[1::2], strict=True))
