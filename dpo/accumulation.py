"""The loss of a whole step or data set, and its gradient, over micro-batches.

A loss of single pairs is differentiated micro-batch by micro-batch. A loss that sees the whole step
gets all log-probs first; its slopes at these log-probs are then what each micro-batch is
differentiated with. The gradient is exact in both cases, and no micro-batch is held for another.

Shapes: P pairs in all micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from dpo.losses import Loss, PairLogProbs
from dpo.losses.base import NOT_GIVEN, PAIR_COLUMNS
from dpo.metrics import MetricSums
from dpo.routing import RouterUse, balance_loss, total_use
from dpo.scoring import ScoredPairs

Score = Callable[[Sequence[int]], ScoredPairs]  # runs the policy over rows
Scale = Callable[[Tensor], Tensor]  # of a loss or of slopes, against underflow

_SLOPED: Final = ("chosen", "rejected", "chosen_statistic", "rejected_statistic")
_PER_PAIR: Final = (*PAIR_COLUMNS, "chosen_statistic", "rejected_statistic", "draw", "chain")


@dataclass(frozen=True)
class StepResult:
    """What the pairs of a step gave.

    Attributes:
        sums: what was given, with the pairs of the step.
        losses: (P,) loss of each pair, without gradient.
        running: (S,) the loss's running statistics after the step.
        balance: (), ``balance_loss`` of the step, or None without routers.
    """

    sums: MetricSums
    losses: Tensor
    running: Tensor
    balance: Tensor | None = None


@dataclass(frozen=True)
class LossInputs:
    """The pairs of a step or of an evaluation, and what the loss needs beside them.

    Attributes:
        loss: the loss.
        score: gives the log-probs of a micro-batch, differentiable where gradients are enabled.
        micro_batches: the rows, cut up.
        rows: the same in the order of the step.
        sums: gets what the metrics are made of.
        running: (S,) the loss's running statistics before.
        mismatch: as in ``PairLogProbs``.
    """

    loss: Loss
    score: Score
    micro_batches: Sequence[Sequence[int]]
    rows: Sequence[int]
    sums: MetricSums
    running: Tensor
    mismatch: Tensor

    def known(self, pairs: PairLogProbs) -> PairLogProbs:
        """Return pairs with what is known of the whole step."""
        return replace(pairs, running=self.running, mismatch=self.mismatch)


def differentiate(
    step: LossInputs, *, total_weight: float, scale: Scale, router_weight: float | None = None
) -> StepResult:
    """Add the gradient of ``sum(w loss) / total_weight`` over a step to that of the parameters.

    With ``router_weight`` also that of so many times the balance loss of the step's experts.

    Args:
        step: its pairs.
        total_weight: sum of the pairs' weights.
        scale: applied to what is differentiated.
        router_weight: None for a policy that records no routers.
    """
    loss = step.loss
    if loss.sees_whole_step or router_weight is not None:
        return _differentiate_whole(step, total_weight, scale, router_weight)
    losses = []
    for batch_rows in step.micro_batches:
        scored = step.score(batch_rows)
        pairs = step.known(scored.loss_pairs)
        values = loss.with_terms(pairs)
        scale((loss.pair_weights(pairs) * values[0]).sum() / total_weight).backward()
        step.sums.add(loss, scored, values.detach())
        losses.append(values[0].detach())
    return StepResult(step.sums, torch.cat(losses), step.running)


def _differentiate_whole(
    step: LossInputs, total_weight: float, scale: Scale, router_weight: float | None
) -> StepResult:
    """Score all pairs, take the slopes of the loss, and differentiate the log-probs with them."""
    loss, micro_batches = step.loss, step.micro_batches
    first = None
    if len(micro_batches) == 1:  # its graph is kept, and no second pass needed
        first = step.score(micro_batches[0])
        seen = [(first.loss_pairs, first.router)]
    else:
        with torch.no_grad():
            passes = map(step.score, micro_batches)
            seen = [(scored.loss_pairs, scored.router) for scored in passes]
    balance = router_slope = None
    if router_weight is not None:
        balance, router_slope = _balance([use for _, use in seen if use is not None])
        router_slope = router_weight * router_slope
    places = _places(micro_batches, step.rows, seen[0][0].chosen.device)
    pairs = step.known(_in_order([pairs for pairs, _ in seen], places))
    leaves = {name: getattr(pairs, name).detach().requires_grad_() for name in _sloped(pairs)}
    pairs = replace(pairs, **leaves)
    pairs = replace(pairs, running=loss.update(pairs))
    values = loss.with_terms(pairs)
    objective = (loss.pair_weights(pairs) * values[0]).sum() / total_weight
    slopes = torch.autograd.grad(objective, list(leaves.values()), materialize_grads=True)
    sizes = [len(batch_rows) for batch_rows in micro_batches]
    parts = zip(*(slope[places].split(sizes) for slope in slopes), strict=True)
    losses = values.detach()[:, places]
    of_batches = losses.split(sizes, dim=1)
    for batch_rows, part, of_batch in zip(micro_batches, parts, of_batches, strict=True):
        scored = first or step.score(batch_rows)
        outputs = [getattr(scored.loss_pairs, name) for name in leaves]
        if scored.router is not None and router_slope is not None:
            outputs, part = [*outputs, scored.router.shares], (*part, router_slope)
        with_graph = [pair for pair in zip(outputs, part, strict=True) if pair[0].requires_grad]
        torch.autograd.backward(
            [output for output, _ in with_graph], [scale(slope) for _, slope in with_graph]
        )
        step.sums.add(loss, scored, of_batch)
    return StepResult(step.sums, losses[0], pairs.running, balance)


def _balance(uses: Sequence[RouterUse]) -> tuple[Tensor, Tensor]:
    """Return the balance loss of a step, (), and its slope at the shares of any part, (X,)."""
    use = total_use(uses)
    shares = use.shares.detach().requires_grad_()
    loss = balance_loss(replace(use, shares=shares))
    return loss.detach(), torch.autograd.grad(loss, shares)[0]


def evaluate(data: LossInputs) -> None:
    """Give ``data.sums`` what the metrics over its rows are made of, as if they were one step."""
    loss, whole = data.loss, []
    for batch_rows in data.micro_batches:
        scored = data.score(batch_rows)
        pairs = data.known(scored.loss_pairs)
        if loss.sees_whole_step:
            whole.append(pairs)
            data.sums.add(loss, scored, None)
        else:
            data.sums.add(loss, scored, loss.with_terms(pairs))
    if whole:
        places = _places(data.micro_batches, data.rows, whole[0].chosen.device)
        data.sums.assign_losses(loss.with_terms(_in_order(whole, places))[:, places])


def mean_log_ratio(score: Score, micro_batches: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean log-ratio of the chosen answers of all micro-batches, ()."""
    sums, count = [], 0
    with torch.no_grad():
        for batch_rows in micro_batches:
            sums.append(score(batch_rows).pairs.chosen_log_ratio.sum())
            count += len(batch_rows)
    return torch.stack(sums).sum() / count


def _places(
    micro_batches: Sequence[Sequence[int]], rows: Sequence[int], device: torch.device
) -> Tensor:
    """Return where each row of the micro-batches, one after another, stands in ``rows``, (P,)."""
    place_of = {row: place for place, row in enumerate(rows)}
    return torch.tensor(
        [place_of[row] for batch_rows in micro_batches for row in batch_rows], device=device
    )


def _in_order(parts: Sequence[PairLogProbs], places: Tensor) -> PairLogProbs:
    """Join pairs of micro-batches so that each stands at its place."""
    order = places.argsort()
    columns = {
        name: torch.cat([getattr(part, name) for part in parts])[order]
        for name in _PER_PAIR
        if getattr(parts[0], name) is not NOT_GIVEN
    }
    return replace(parts[0], **columns)


def _sloped(pairs: PairLogProbs) -> list[str]:
    return [name for name in _SLOPED if getattr(pairs, name) is not NOT_GIVEN]
