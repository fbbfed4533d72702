"""From a micro-batch and a model to the log-probs of its pairs.

Shapes: P pairs, K answer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpo.batching import PairBatch, collate, draw, pack
from dpo.divergence import reference_kl
from dpo.live_reference import LiveReference
from dpo.log_probs import Predictions, TokenLogProbs, predict_answers, token_log_probs
from dpo.losses import Loss, PairLogProbs, TokenLoss
from dpo.losses.base import NOT_GIVEN
from dpo.losses.token_level import AnswerTokens
from dpo.policy import Policy
from dpo.precision import Precision
from dpo.reference import AnswerLogProbs, ReferenceLogProbs
from dpo.routing import Routed, RouterUse
from dpo.segments import move
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import TrainConfig

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
        draw_seed: of the random numbers that go with each row, or None for none.
        with_chains: whether ``TokenizedPairs.chains`` go with the rows.
    """

    pairs: TokenizedPairs
    reference: ReferenceLogProbs | None = None
    micro_batch_size: int | None = None
    tokens_per_micro_batch: int | None = 8192
    share_prefix: bool = True
    draw_seed: int | None = None
    with_chains: bool = False

    @classmethod
    def of_run(
        cls,
        config: TrainConfig,
        pairs: TokenizedPairs,
        reference: ReferenceLogProbs | None = None,
        *,
        loss: Loss | None = None,
    ) -> MicroBatches:
        """Cut ``pairs`` as a run's options say; with ``loss`` rows bring what that reads."""
        return cls(
            pairs,
            reference,
            micro_batch_size=config.micro_batch_size,
            tokens_per_micro_batch=config.token_budget,
            share_prefix=config.share_prefix,
            draw_seed=config.seed if loss is not None and loss.draws else None,
            with_chains=loss is not None and loss.sees_chains,
        )

    def divide(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """Divide ``rows`` over ``count`` ranks so that their tokens are even; some may get none.

        Longest first, each to the rank that has the fewest tokens (Graham 1969, "Bounds on
        Multiprocessing Timing Anomalies"): the most loaded one has at most 4/3 of the best there
        is. Rows of a prompt stay together, up to a rank's share of the tokens.
        """
        if count == 1:
            return [list(rows)]
        share = math.ceil(self.pairs.lengths()[list(rows)].sum() / count)
        units, sizes = self._units(rows, capacity=share)
        parts: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        for unit in sorted(range(len(units)), key=lambda unit: -sizes[unit]):
            rank = tokens.index(min(tokens))
            tokens[rank] += sizes[unit]
            parts[rank] += units[unit]
        return parts

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

    def smaller(self, rows: Sequence[int]) -> MicroBatches | None:
        """Return what cuts ``rows`` into more micro-batches; None if each holds one row."""
        count = len(self.split(rows))
        if count == len(rows):
            return None
        size, tokens = self.micro_batch_size, self.tokens_per_micro_batch
        halved = replace(
            self,
            micro_batch_size=size and math.ceil(size / 2),
            tokens_per_micro_batch=tokens and math.ceil(tokens / 2),
        )
        return halved if len(halved.split(rows)) > count else halved.smaller(rows)

    def cut_as(self, other: MicroBatches) -> MicroBatches:
        """Return the same data in micro-batches of the size of ``other``'s."""
        return replace(
            self,
            micro_batch_size=other.micro_batch_size,
            tokens_per_micro_batch=other.tokens_per_micro_batch,
        )

    @property
    def limit(self) -> str:
        """The size of a micro-batch in words."""
        if self.micro_batch_size is not None:
            return f"{self.micro_batch_size:,} pairs"
        return f"{self.tokens_per_micro_batch:,} tokens"

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

    def collate(self, rows: Sequence[int], *, step: int = 0) -> PairBatch:
        """Put ``rows`` into one micro-batch; ``step`` decides on random numbers."""
        reference = self.reference
        batch = collate(
            [self.pairs[row] for row in rows],
            rows=rows,
            reference=None if reference is None else [reference[row] for row in rows],
            share_prefix=self.share_prefix,
        )
        if self.draw_seed is not None:
            tokens = self.pairs.scored_lengths[list(rows)].sum(axis=1).tolist()
            batch = replace(batch, draws=draw(rows, tokens, seed=self.draw_seed, step=step))
        if self.with_chains:
            batch = replace(batch, chain=torch.from_numpy(self.pairs.chains[list(rows)]))
        return batch


@dataclass(frozen=True)
class ScoredPairs:
    """A micro-batch under a policy.

    Attributes:
        batch: the micro-batch; its reference is that of a live one if there is one.
        tokens: its answer tokens, (K,) each.
        pairs: the same summed over each answer, (P,) each; a missing reference is zero.
        loss_pairs: what the loss sees: ``pairs`` with what it asks for, and its own log-probs.
        router: the use of experts, if the policy records it.
    """

    batch: PairBatch
    tokens: TokenLogProbs
    pairs: PairLogProbs
    loss_pairs: PairLogProbs
    router: RouterUse | None = None


def score_batch(
    policy: Policy,
    batch: PairBatch,
    loss: Loss | None = None,
    of_reference: Predictions | None = None,
    *,
    with_router: bool = False,
) -> ScoredPairs:
    """Run ``policy`` over ``batch``, differentiably.

    Args:
        policy: the model.
        batch: with the reference log-probs, if there is a reference.
        loss: what it asks for is put into ``loss_pairs``; the log-probs alone if None.
        of_reference: what a live reference predicts, from ``run_reference``.
        with_router: the policy is `Routed` and records its routers.
    """
    statistic = None if loss is None else loss.token_statistic
    predicted = predict_answers(policy, batch.texts)
    router = None
    if with_router:
        assert isinstance(policy, Routed)
        router = policy.router_use(move(batch.texts.reads(), predicted.hidden.device))
    tokens = token_log_probs(
        predicted.hidden,
        batch.texts.targets,
        predicted.head,
        with_square=statistic == "typicality",
    )
    reference = tokens.log_probs.new_zeros(())
    if batch.reference is not None:
        reference = batch.reference.to(tokens.log_probs.dtype)
    reference = reference.expand_as(tokens.log_probs)
    pairs = _pairs(batch, tokens.log_probs, reference)
    loss_pairs = pairs
    if isinstance(loss, TokenLoss):
        adjusted = loss.adjust(_answer_tokens(batch, pairs, tokens.log_probs, reference))
        loss_pairs = _pairs(batch, adjusted.log_probs, adjusted.reference)
    if tokens.log_square is not None:
        typicality = tokens.log_probs.detach() - tokens.log_square
        loss_pairs = _with_statistic(loss_pairs, batch, typicality)
    if statistic == "reference_kl" and of_reference is not None:
        loss_pairs = _with_statistic(loss_pairs, batch, reference_kl(predicted, of_reference))
    return ScoredPairs(batch, tokens, pairs, _with_extras(loss_pairs, batch), router)


@torch.no_grad()
def run_reference(
    policy: Policy, batch: PairBatch, reference: LiveReference
) -> tuple[PairBatch, Predictions]:
    """Run a live reference, of which ``policy`` is the architecture.

    Returns:
        The batch with the reference's log-probs, and all that it predicts.
    """
    predicted = reference.predict(policy, batch.texts)
    found = token_log_probs(predicted.hidden, batch.texts.targets, predicted.head)
    return replace(batch, reference=found.log_probs), predicted


def _pairs(batch: PairBatch, log_probs: Tensor, reference: Tensor) -> PairLogProbs:
    """Sum (K,) log-probs over the answers."""
    chosen, rejected = _per_pair(batch, log_probs)
    reference_chosen, reference_rejected = _per_pair(batch, reference)
    chosen_tokens, rejected_tokens = _per_pair(batch, torch.ones_like(log_probs))
    return PairLogProbs(
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


def _per_pair(batch: PairBatch, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum (K,) values over the chosen and the rejected answers, (P,) each."""
    chosen, rejected = batch.texts.sum_per_answer(values).view(-1, 2).unbind(1)
    return chosen, rejected


def _answer_tokens(
    batch: PairBatch, pairs: PairLogProbs, log_probs: Tensor, reference: Tensor
) -> AnswerTokens:
    answers = batch.texts.answers
    counts = torch.stack([pairs.chosen_tokens, pairs.rejected_tokens], dim=1).long().flatten()
    first = (counts.cumsum(0) - counts).index_select(0, answers)  # (K,)
    shorter = torch.minimum(pairs.chosen_tokens, pairs.rejected_tokens).long()
    return AnswerTokens(
        log_probs,
        reference,
        answer=answers,
        place=torch.arange(len(answers), device=answers.device) - first,
        shorter=shorter.index_select(0, answers // 2),
        draw=NOT_GIVEN if batch.draws is None else batch.draws.tokens,
    )


def _with_statistic(pairs: PairLogProbs, batch: PairBatch, values: Tensor) -> PairLogProbs:
    chosen, rejected = _per_pair(batch, values)
    return replace(pairs, chosen_statistic=chosen, rejected_statistic=rejected)


def _with_extras(pairs: PairLogProbs, batch: PairBatch) -> PairLogProbs:
    """Add what comes with the batch."""
    if batch.draws is not None:
        pairs = replace(pairs, draw=batch.draws.pairs.to(pairs.chosen.dtype))
    return pairs if batch.chain is None else replace(pairs, chain=batch.chain)


@torch.no_grad()
def score_rows(
    policy: Policy,
    batches: MicroBatches,
    rows: Sequence[int],
    *,
    precision: Precision,
    device: torch.device,
    loss: Loss | None = None,
) -> ScoredPairs:
    """Score ``rows`` as one micro-batch, without gradient."""
    with precision.context(device):
        return score_batch(policy, batches.collate(rows).to(device), loss)


def answer_log_probs(scored: ScoredPairs) -> list[AnswerLogProbs]:
    """Take the per-token log-probs of each pair's two answers to the host, float32."""
    values = scored.tokens.log_probs.float().cpu().numpy()  # (K,), answer after answer
    lengths = torch.stack([scored.pairs.chosen_tokens, scored.pairs.rejected_tokens], dim=1)
    ends = np.cumsum(lengths.flatten().long().cpu().numpy())
    answers = np.split(values, ends[:-1])
    return list(zip(answers[0::2], answers[1::2], strict=True))
