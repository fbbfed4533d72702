"""The loss of a whole step or data set, and its gradient, over micro-batches.

A loss of single pairs is differentiated micro-batch by micro-batch. A loss that sees the whole step
gets all log-probs first; its slopes at these log-probs are then what each micro-batch is
differentiated with. The gradient is exact in both cases, and no micro-batch is held for another.

Each rank has micro-batches of its own, any number of them, and gets its part of the gradient; what
is a function of the whole step is the same on all of them.

Shapes: P pairs of the step, n pairs of this rank, T terms of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import torch
from torch import Tensor

from dpo.device import is_lack_of_memory
from dpo.losses import Loss, PairLogProbs
from dpo.losses.base import PAIR_COLUMNS
from dpo.metrics import MetricSums
from dpo.ranks import Ranks
from dpo.routing import RouterUse, balance_loss
from dpo.scoring import ScoredPairs

Score = Callable[[Sequence[int]], ScoredPairs]  # runs the policy over rows
Scale = Callable[[Tensor], Tensor]  # of a loss or of slopes, against underflow

_STATISTICS: Final = ("chosen_statistic", "rejected_statistic")

T = TypeVar("T")


class LackOfMemoryError(torch.OutOfMemoryError):
    """The memory of a rank was full, which all ranks raise at the same place.

    Attributes:
        error: that of this rank, or None.
    """

    def __init__(self, error: RuntimeError | None) -> None:
        super().__init__("the memory of another rank is full" if error is None else str(error))
        self.error = error


@dataclass(frozen=True)
class StepResult:
    """What the pairs of a step gave.

    Attributes:
        sums: what was given, with the pairs of this rank.
        losses: (n,) loss of each of them, without gradient.
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
        micro_batches: the rows of this rank, cut up.
        rows: those of all ranks, in the order of the step.
        sums: gets what the metrics are made of, of the rows of this rank.
        running: (S,) the loss's running statistics before.
        mismatch: as in ``PairLogProbs``.
        ranks: those that share the rows.
    """

    loss: Loss
    score: Score
    micro_batches: Sequence[Sequence[int]]
    rows: Sequence[int]
    sums: MetricSums
    running: Tensor
    mismatch: Tensor
    ranks: Ranks

    def extra_passes(self) -> int:
        """Return how often this rank must run the model beside its micro-batches: ask before."""
        return self.ranks.extra_passes(len(self.micro_batches))

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
    if step.loss.sees_whole_step or router_weight is not None:
        return _differentiate_whole(step, total_weight, scale, router_weight)
    losses = within_memory(step.ranks, lambda: _differentiate_pairs(step, total_weight, scale))
    return StepResult(step.sums, losses, step.running)


def within_memory(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do the work of this rank, if the memory of all of them is enough for theirs.

    Raises:
        LackOfMemoryError: it was not.
    """
    if ranks.in_step:  # which a rank that begins again would leave
        return work()
    lack, results = None, []
    try:
        results.append(work())
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        lack = error.with_traceback(None)  # which would hold the tensors of the work
    if ranks.any(lack is not None):
        raise LackOfMemoryError(lack)
    return results[0]


def _differentiate_pairs(step: LossInputs, total_weight: float, scale: Scale) -> Tensor:
    """Differentiate each micro-batch by itself; return the losses, (n,)."""
    loss, losses, extra = step.loss, [step.running.new_empty(0)], step.extra_passes()
    for batch_rows in step.micro_batches:
        scored = step.score(batch_rows)
        pairs = step.known(scored.loss_pairs)
        values = loss.with_terms(pairs)
        scale((loss.pair_weights(pairs) * values[0]).sum() / total_weight).backward()
        step.sums.add(loss, scored, values.detach())
        losses.append(values[0].detach())
    _pass_for_nothing(step, extra)
    return torch.cat(losses)


def _pass_for_nothing(step: LossInputs, extra: int) -> None:
    """Run the model ``extra`` times, with a gradient of zero where it has one."""
    for _ in range(extra):
        scored = step.score(step.rows[:1])
        if torch.is_grad_enabled():
            (0.0 * scored.loss_pairs.chosen.sum()).backward()


def _differentiate_whole(
    step: LossInputs, total_weight: float, scale: Scale, router_weight: float | None
) -> StepResult:
    """Score all pairs, take the slopes of the loss, and differentiate the log-probs with them."""
    loss = step.loss
    seen = within_memory(step.ranks, lambda: _score_all(step))
    balance = router_slope = None
    if router_weight is not None:
        balance, router_slope = _balance(step, [each.router for each in seen if each.router])
        router_slope = router_weight * router_slope
    pairs, places = _whole(step, [each.loss_pairs for each in seen])
    leaves = {name: getattr(pairs, name).detach().requires_grad_() for name in _sloped(loss)}
    pairs = replace(pairs, **leaves)
    pairs = replace(pairs, running=loss.update(pairs))
    values = loss.with_terms(pairs)
    objective = (loss.pair_weights(pairs) * values[0]).sum() / total_weight
    found = torch.autograd.grad(objective, list(leaves.values()), materialize_grads=True)
    slopes = {name: slope[places] for name, slope in zip(leaves, found, strict=True)}
    losses = values.detach()[:, places]  # (1 + T, n)
    kept = seen if len(seen) == 1 and not step.ranks.in_step else []
    del seen
    within_memory(
        step.ranks, lambda: _differentiate_all(step, kept, slopes, router_slope, losses, scale)
    )
    return StepResult(step.sums, losses[0], pairs.running, balance)


def _score_all(step: LossInputs) -> list[ScoredPairs]:
    """Score each micro-batch; a single one keeps its graph, so that it needs no second pass."""
    keeps_graph = len(step.micro_batches) == 1 and not step.ranks.in_step
    extra = step.extra_passes()
    with torch.set_grad_enabled(keeps_graph):
        scored = [step.score(batch_rows) for batch_rows in step.micro_batches]
        _pass_for_nothing(step, extra)
    return scored


def _differentiate_all(
    step: LossInputs,
    kept: list[ScoredPairs],
    slopes: Mapping[str, Tensor],
    router_slope: Tensor | None,
    losses: Tensor,
    scale: Scale,
) -> None:
    """Differentiate the log-probs of each micro-batch with their slopes.

    Args:
        step: the pairs.
        kept: the one micro-batch that is scored with its graph; is emptied.
        slopes: (n,) by name of the log-probs.
        router_slope: (X,) of the shares of experts.
        losses: (1 + T, n) for the metrics, as of ``Loss.with_terms``.
        scale: applied to the slopes.
    """
    first, extra = 0, step.extra_passes()
    for batch_rows in step.micro_batches:
        here = slice(first, first + len(batch_rows))
        first += len(batch_rows)
        scored = kept.pop() if kept else step.score(batch_rows)
        outputs = [getattr(scored.loss_pairs, name) for name in slopes]
        of_outputs = [slope[here] for slope in slopes.values()]
        if scored.router is not None and router_slope is not None:
            outputs, of_outputs = [*outputs, scored.router.shares], [*of_outputs, router_slope]
        with_graph = [
            each for each in zip(outputs, of_outputs, strict=True) if each[0].requires_grad
        ]
        torch.autograd.backward(
            [output for output, _ in with_graph], [scale(slope) for _, slope in with_graph]
        )
        step.sums.add(step.loss, scored, losses[:, here])
    _pass_for_nothing(step, extra)


def _balance(step: LossInputs, uses: Sequence[RouterUse]) -> tuple[Tensor, Tensor]:
    """Return the balance loss of a step, (), and its slope at the shares of any part, (X,)."""
    rows = [torch.cat([use.shares.detach(), use.chosen, use.tokens[None]]) for use in uses]
    all_rows = step.ranks.gather(torch.stack(rows) if rows else None)
    assert all_rows is not None, "a step has rows"
    total = all_rows.to(step.running.device).sum(dim=0)  # (2 X + 1,)
    shares, chosen, tokens = total.split([len(total) // 2, len(total) // 2, 1])
    shares = shares.clone().requires_grad_()
    loss = balance_loss(RouterUse(shares, chosen, tokens.squeeze()))
    return loss.detach(), torch.autograd.grad(loss, shares)[0]


@torch.no_grad()
def evaluate(data: LossInputs) -> None:
    """Give ``data.sums`` what the metrics over its rows are made of, as if they were one step."""
    loss, whole, extra = data.loss, [], data.extra_passes()
    for batch_rows in data.micro_batches:
        scored = data.score(batch_rows)
        pairs = data.known(scored.loss_pairs)
        if loss.sees_whole_step:
            whole.append(pairs)
            data.sums.add(loss, scored, None)
        else:
            data.sums.add(loss, scored, loss.with_terms(pairs))
    _pass_for_nothing(data, extra)
    if loss.sees_whole_step:
        pairs, places = _whole(data, whole)
        data.sums.assign_losses(loss.with_terms(pairs)[:, places])


def mean_log_ratio(
    score: Score, micro_batches: Sequence[Sequence[int]], *, rows: Sequence[int], ranks: Ranks
) -> Tensor:
    """Return the mean log-ratio of the chosen answers of ``rows``, those of all ranks, ().

    Raises:
        LackOfMemoryError: the memory of a rank was full.
    """

    def sums() -> list[Tensor]:
        extra = ranks.extra_passes(len(micro_batches))
        with torch.no_grad():
            found = [score(batch).pairs.chosen_log_ratio.sum() for batch in micro_batches]
            for _ in range(extra):
                score(rows[:1])
        return found

    own = within_memory(ranks, sums)
    all_sums = ranks.gather(torch.stack(own) if own else None)
    assert all_sums is not None, "a step has rows"
    return all_sums.sum() / len(rows)


def _whole(step: LossInputs, parts: Sequence[PairLogProbs]) -> tuple[PairLogProbs, Tensor]:
    """Return the pairs of all ranks in the order of the step, and where this rank's stand, (n,).

    Args:
        step: of which they are.
        parts: those of each micro-batch of this rank.
    """
    ranks, loss, device = step.ranks, step.loss, step.running.device
    place_of = {row: place for place, row in enumerate(step.rows)}
    own = [place_of[row] for batch_rows in step.micro_batches for row in batch_rows]
    places = ranks.gather(torch.tensor(own, dtype=torch.int64))
    assert places is not None
    order = places.argsort().to(device)

    def joined(columns: list[Tensor]) -> Tensor:
        """Join a tensor of each micro-batch."""
        found = ranks.gather(torch.cat(columns).detach() if columns else None)
        assert found is not None, "a step has rows"
        return found.to(device)[order]

    names = _columns(loss)
    matrices = [torch.stack([getattr(part, name) for name in names], dim=1) for part in parts]
    columns = dict(zip(names, joined(matrices).unbind(dim=1), strict=True))
    if loss.sees_chains:
        columns["chain"] = joined([part.chain for part in parts])
    return step.known(PairLogProbs(**columns)), torch.tensor(own, device=device, dtype=torch.int64)


def _sloped(loss: Loss) -> list[str]:
    """Name the log-probs that a loss is differentiated by."""
    return ["chosen", "rejected", *(_STATISTICS if loss.token_statistic else ())]


def _columns(loss: Loss) -> list[str]:
    """Name the fields of ``PairLogProbs`` that a loss is given of each pair, but ``chain``."""
    statistics = _STATISTICS if loss.token_statistic else ()
    return [*PAIR_COLUMNS, *statistics, *(("draw",) if loss.draws else ())]
