"""Losses in which a pair's value depends on the whole step; the notation is in ``dpo.losses``.

The step is that of the optimizer, over all of its micro-batches: the trainer scores all pairs
first and differentiates afterwards, so no result depends on how the step is cut.

Shapes: P pairs of the step.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.losses.base import (
    MARGIN_AND_LABEL_PROB,
    NonNegative,
    PairLogProbs,
    Positive,
    ReferenceLoss,
    bradley_terry,
)
from dpo.tokenized_pairs import TokenizedPairs

_DECAY = 0.9  # of the moving averages of beta-DPO and alpha-DPO, as in their authors' code
_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Aot(ReferenceLoss):
    """``-(1-e) ls(beta d) - e ls(-beta d)``, ``d = sort(lw - ll) - sort(rw - rl)`` over the step.

    Alignment by optimal transport, paired: Melnyk et al., arXiv:2406.05882; ``e`` is
    ``label_smoothing``. A pair's value is that of the place of its ``lw - ll``.
    """

    sees_whole_step: ClassVar[bool] = True
    label_smoothing: Annotated[float, "[0, 0.5]"] = 0.0

    def quantiles(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return the two samples of which quantiles are compared, (P,) each."""
        policy = pairs.chosen - pairs.rejected
        return policy, pairs.reference_chosen - pairs.reference_rejected

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        upper, lower = self.quantiles(pairs)
        upper, order = upper.sort(stable=True)
        logit = self.beta * (upper - lower.sort().values)
        smoothing = self.label_smoothing
        values = -(1 - smoothing) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)
        return values[order.argsort()]

    def value_faults(self, pairs: TokenizedPairs) -> list[str]:
        """Return a fault if rows have weights of their own, which sorting would part."""
        differs = pairs.weights != pairs.weights[0]
        if not differs.any():
            return []
        return [
            f"{self} compares quantiles of the step, where a row's weight has no place: pair "
            f"{differs.argmax()} has another weight than pair 0; remove the column"
        ]


@dataclass(frozen=True)
class AotUnpaired(Aot):
    """AOT of ``d = sort(u) - sort(v)``: Melnyk et al., arXiv:2406.05882."""

    def quantiles(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return the two samples of which quantiles are compared, (P,) each."""
        return pairs.chosen_log_ratio, pairs.rejected_log_ratio


@dataclass(frozen=True)
class DrDpo(ReferenceLoss):
    """``-b log mean exp(ls(beta D - m) / b)``, the same for each pair of the step.

    Distributionally robust DPO: Wu et al., arXiv:2407.07880; ``b`` is the paper's beta',
    ``robustness``. The mean is by the rows' weights.
    """

    reads = MARGIN_AND_LABEL_PROB
    sees_whole_step: ClassVar[bool] = True
    robustness: Positive = 1.0

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        values = -bradley_terry(self.beta * pairs.log_ratio_gap, pairs) / self.robustness
        share = pairs.weight.log() - pairs.weight.sum().log()
        return (-self.robustness * (values + share).logsumexp(0)).expand_as(values)


@dataclass(frozen=True)
class BetaDpo(ReferenceLoss):
    """DPO with a ``beta`` that follows the step's rewards, over the pairs that are no outliers.

    ``-ls(beta_b D - m)`` with ``beta_b = beta (1 + alpha (mean M - M_0))``, at least 0.001, where
    ``M = beta D`` without gradient and ``M_0`` is its moving average: Wu et al., arXiv:2407.08639.
    A share ``keep`` of the pairs is drawn without replacement, by Gaussian weights around
    ``M_0``; the mean is over these.
    """

    reads = MARGIN_AND_LABEL_PROB
    sees_whole_step: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    running_start: ClassVar[tuple[float, ...]] = (0.0, 0.0)  # mean and deviation of M
    alpha: NonNegative = 0.6
    keep: Annotated[float, "(0, 1]"] = 0.8

    def update(self, pairs: PairLogProbs) -> Tensor:
        """Return the moving averages of mean and standard deviation of ``M``, (2,)."""
        return _moved(pairs.running, self.beta * pairs.log_ratio_gap)

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        gap = (self.beta * pairs.log_ratio_gap).detach()
        mean, deviation = pairs.running.unbind()
        log_weight = -0.5 * ((gap - mean) / deviation.clamp(min=_LEAST_DEVIATION)).square()
        count = max(1, int(self.keep * len(gap)))
        kept = _drawn(log_weight, pairs.draw, count)
        beta = self.beta * (1 + self.alpha * ((kept * gap).sum() / count - mean))
        values = bradley_terry(beta.clamp(min=1e-3) * pairs.log_ratio_gap, pairs)
        return kept * values * (len(gap) / count)


@dataclass(frozen=True)
class AlphaDpo(ReferenceLoss):
    """``-ls(beta [lw/n_w - ll/n_l - gamma_ratio - alpha z] - m)``, ``z`` without gradient.

    SimPO with a margin of each pair's own: ``z`` is its ``u/n_w - v/n_l``, standardised
    by moving averages of mean and deviation over the steps: Wu et al., arXiv:2410.10148.
    ``gamma_ratio`` is SimPO's ``gamma / beta``.
    """

    reads = MARGIN_AND_LABEL_PROB
    sees_whole_step: ClassVar[bool] = True
    running_start: ClassVar[tuple[float, ...]] = (0.0, 0.0)  # mean and deviation of the gap
    beta: Positive = 2.5
    gamma_ratio: NonNegative = 0.6
    alpha: NonNegative = 0.2

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``beta lw / n_w`` and ``beta ll / n_l``, (P,) each."""
        mean = pairs.per_token()
        return self.beta * mean.chosen, self.beta * mean.rejected

    def update(self, pairs: PairLogProbs) -> Tensor:
        """Return the moving averages of mean and standard deviation of the gaps, (2,)."""
        return _moved(pairs.running, pairs.per_token().log_ratio_gap)

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        mean, deviation = pairs.running.unbind()
        gap = pairs.per_token().log_ratio_gap.detach()
        standardised = (gap - mean) / deviation.clamp(min=_LEAST_DEVIATION)
        chosen, rejected = self.rewards(pairs)
        target = self.beta * (self.gamma_ratio + self.alpha * standardised)
        return bradley_terry(chosen - rejected - target, pairs)


@dataclass(frozen=True)
class Bco(ReferenceLoss):
    """``-ls(beta u - d) - ls(d - beta v)``, ``d`` the mean of all rewards so far, this step's too.

    Binary classifier optimization: Jung et al., arXiv:2404.04656. A row with one answer has
    one of the terms; the density-ratio weights of the paper come in the data (``dpo weigh``).
    """

    takes_unpaired: ClassVar[bool] = True
    sees_whole_step: ClassVar[bool] = True
    running_start: ClassVar[tuple[float, ...]] = (0.0, 0.0)  # sum and count of the rewards

    def update(self, pairs: PairLogProbs) -> Tensor:
        """Return sum and count of the rewards, (2,)."""
        chosen, rejected = self.rewards(pairs)
        count = pairs.has_chosen + pairs.has_rejected
        return pairs.running + torch.stack([(chosen + rejected).sum(), count.sum()]).detach()

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        total, count = pairs.running.unbind()
        shift = total / count.clamp(min=1)
        chosen, rejected = self.rewards(pairs)
        return -pairs.has_chosen * F.logsigmoid(chosen - shift) - pairs.has_rejected * F.logsigmoid(
            shift - rejected
        )


@dataclass(frozen=True)
class Kto(ReferenceLoss):
    """``a (1 - s(beta (u - z))) + b (1 - s(beta (z - v)))``, ``z = max(0, mismatch)``.

    Kahneman-Tversky optimization: Ethayarajh et al., arXiv:2402.01306. ``a`` is
    ``desirable_weight``, ``b`` ``undesirable_weight``; a row with one answer has one of the terms.
    ``z`` estimates the divergence from the reference: the mean log-ratio, over the step, of answers
    that belong to other prompts. The paper keeps ``a`` times the desirable answers between 1 and
    4/3 of ``b`` times the others.
    """

    takes_unpaired: ClassVar[bool] = True
    needs_mismatch: ClassVar[bool] = True
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0

    def zero(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return what chosen and rejected log-ratios are measured from, without gradient."""
        divergence = pairs.mismatch.detach().clamp(min=0)
        return divergence, divergence

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        of_chosen, of_rejected = self.zero(pairs)
        chosen = (self.beta * (of_chosen - pairs.chosen_log_ratio)).sigmoid()
        rejected = (self.beta * (pairs.rejected_log_ratio - of_rejected)).sigmoid()
        return (
            self.desirable_weight * pairs.has_chosen * chosen
            + self.undesirable_weight * pairs.has_rejected * rejected
        )


@dataclass(frozen=True)
class KtoPair(Kto):
    """KTO on pairs, which estimates the divergence from the step's own answers.

    ``z`` is ``max(0, mean v)`` for the chosen and ``max(0, mean u)`` for the rejected answers: the
    form that was first published, Ethayarajh et al., arXiv:2402.01306, without further texts.
    """

    takes_unpaired: ClassVar[bool] = False
    needs_mismatch: ClassVar[bool] = False
    sees_whole_step: ClassVar[bool] = True

    def zero(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return what chosen and rejected log-ratios are measured from, without gradient."""
        of_chosen = pairs.rejected_log_ratio.mean().detach().clamp(min=0)
        return of_chosen, pairs.chosen_log_ratio.mean().detach().clamp(min=0)


@dataclass(frozen=True)
class PlackettLuce(ReferenceLoss):
    """``-ls(r_k - log sum_{j > k} e^(r_j))`` for each choice ``k`` of a list, with ``r = beta u``.

    The likelihood of the whole ranking: Rafailov et al., arXiv:2305.18290, appendix A.3. A list of
    K answers is a chain of K - 1 pairs, each of them one choice: the best of those left.
    A step holds ``batch_size`` lists; its mean is over choices. On single pairs it is DPO.
    """

    sees_whole_step: ClassVar[bool] = True
    sees_chains: ClassVar[bool] = True

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        chosen, last = self.rewards(pairs)
        is_end = torch.ones_like(pairs.chain, dtype=torch.bool)
        is_end[:-1] = pairs.chain[1:] != pairs.chain[:-1]
        longest = int(pairs.chain.unique_consecutive(return_counts=True)[1].max())
        others = last  # log-sum-exp over the answers below the chosen one
        for _ in range(longest - 1):
            others = torch.where(is_end, last, torch.logaddexp(chosen, others).roll(-1))
        return -F.logsigmoid(chosen - others)


def _moved(running: Tensor, values: Tensor) -> Tensor:
    """Return the moving averages of mean and standard deviation, (2,), after ``values``."""
    found = torch.stack([values.mean(), values.std(correction=0)]).detach()
    return _DECAY * running + (1 - _DECAY) * found


def _drawn(log_weight: Tensor, draw: Tensor, count: int) -> Tensor:
    """Return 1 for ``count`` rows drawn without replacement by weight, 0 for others, (P,).

    The largest sums of log-weight and Gumbel noise: Kool et al., arXiv:1903.06059.
    """
    tiny = torch.finfo(log_weight.dtype).tiny
    noise = -(-draw.clamp(min=tiny).log()).clamp(min=tiny).log()
    places = (log_weight + noise).topk(count).indices
    return torch.zeros_like(log_weight).index_fill(0, places, 1.0)
