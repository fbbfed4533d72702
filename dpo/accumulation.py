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


def differentiate(
    loss: Loss,
    score: Score,
    micro_batches: Sequence[Sequence[int]],
    rows: Sequence[int],
    *,
    sums: MetricSums,
    running: Tensor,
    mismatch: Tensor,
    total_weight: float,
    scale: Scale,
    router_weight: float | None = None,
) -> StepResult:
    """Add the gradient of ``sum(w loss) / total_weight`` over a step to that of the parameters.

    With ``router_weight`` also that of so many times the balance loss of the step's experts.

    Args:
        loss: the loss.
        score: gives the log-probs of a micro-batch, differentiable where gradients are enabled.
        micro_batches: the rows of the step, cut up.
        rows: the same in the order of the step.
        sums: gets what the metrics are made of.
        running: (S,) the loss's running statistics before the step.
        mismatch: as in ``PairLogProbs``.
        total_weight: sum of the pairs' weights.
        scale: applied to what is differentiated.
        router_weight: None for a policy that records no routers.
    """
    if loss.sees_whole_step or router_weight is not None:
        return _differentiate_whole(
            loss,
            score,
            micro_batches,
            rows,
            sums,
            running,
            mismatch,
            total_weight,
            scale,
            router_weight,
        )
    losses = []
    for batch_rows in micro_batches:
        scored = score(batch_rows)
        pairs = replace(scored.loss_pairs, running=running, mismatch=mismatch)
        values = loss(pairs)
        scale((loss.pair_weights(pairs) * values).sum() / total_weight).backward()
        sums.add(loss, scored, values.detach())
        losses.append(values.detach())
    return StepResult(sums, torch.cat(losses), running)


def _differentiate_whole(
    loss: Loss,
    score: Score,
    micro_batches: Sequence[Sequence[int]],
    rows: Sequence[int],
    sums: MetricSums,
    running: Tensor,
    mismatch: Tensor,
    total_weight: float,
    scale: Scale,
    router_weight: float | None,
) -> StepResult:
    """Score all pairs, take the slopes of the loss, and differentiate the log-probs with them."""
    first = None
    if len(micro_batches) == 1:  # its graph is kept, and no second pass needed
        first = score(micro_batches[0])
        seen = [(first.loss_pairs, first.router)]
    else:
        with torch.no_grad():
            passes = map(score, micro_batches)
            seen = [(scored.loss_pairs, scored.router) for scored in passes]
    scored_pairs = [pairs for pairs, _ in seen]
    balance = router_slope = None
    if router_weight is not None:
        balance, router_slope = _balance([use for _, use in seen if use is not None])
        router_slope = router_weight * router_slope
    places = _places(micro_batches, rows, scored_pairs[0].chosen.device)
    pairs = _in_order(scored_pairs, places)
    leaves = {name: getattr(pairs, name).detach().requires_grad_() for name in _sloped(pairs)}
    pairs = replace(pairs, **leaves, running=running, mismatch=mismatch)
    pairs = replace(pairs, running=loss.update(pairs))
    values = loss(pairs)
    objective = (loss.pair_weights(pairs) * values).sum() / total_weight
    slopes = torch.autograd.grad(objective, list(leaves.values()), materialize_grads=True)
    sizes = [len(batch_rows) for batch_rows in micro_batches]
    parts = zip(*(slope[places].split(sizes) for slope in slopes), strict=True)
    losses = values.detach()[places]
    for batch_rows, part, of_batch in zip(micro_batches, parts, losses.split(sizes), strict=True):
        scored = first or score(batch_rows)
        outputs = [getattr(scored.loss_pairs, name) for name in leaves]
        if scored.router is not None and router_slope is not None:
            outputs, part = [*outputs, scored.router.shares], (*part, router_slope)
        with_graph = [pair for pair in zip(outputs, part, strict=True) if pair[0].requires_grad]
        torch.autograd.backward(
            [output for output, _ in with_graph], [scale(slope) for _, slope in with_graph]
        )
        sums.add(loss, scored, of_batch)
    return StepResult(sums, losses, pairs.running, balance)


def _balance(uses: Sequence[RouterUse]) -> tuple[Tensor, Tensor]:
    """Return the balance loss of a step, (), and its slope at the shares of any part, (X,)."""
    use = total_use(uses)
    shares = use.shares.detach().requires_grad_()
    loss = balance_loss(replace(use, shares=shares))
    return loss.detach(), torch.autograd.grad(loss, shares)[0]


def evaluate(
    loss: Loss,
    score: Score,
    micro_batches: Sequence[Sequence[int]],
    rows: Sequence[int],
    *,
    sums: MetricSums,
    running: Tensor,
    mismatch: Tensor,
) -> None:
    """Add to ``sums`` what the metrics over ``rows`` are made of, as if they were one step."""
    whole = []
    for batch_rows in micro_batches:
        scored = score(batch_rows)
        pairs = replace(scored.loss_pairs, running=running, mismatch=mismatch)
        if loss.sees_whole_step:
            whole.append(pairs)
            sums.add(loss, scored, torch.zeros_like(pairs.chosen))
        else:
            sums.add(loss, scored, loss(pairs))
    if whole:
        places = _places(micro_batches, rows, whole[0].chosen.device)
        sums.assign_losses(loss(_in_order(whole, places))[places])


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
