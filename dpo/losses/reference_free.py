"""Losses over the policy's log-probs alone; the notation is in ``dpo.losses``."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.losses.base import (
    MARGIN,
    MARGIN_AND_LABEL_PROB,
    MAX_EXPONENT,
    Loss,
    NonNegative,
    PairLogProbs,
    Positive,
    ReferenceFreeLoss,
    bradley_terry,
    negative_log_likelihood,
)


@dataclass(frozen=True)
class Sft(Loss):
    """``-lw / n_w`` with pair weight ``weight * n_w``: the step's mean over the chosen tokens."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        return negative_log_likelihood(pairs)

    def pair_weights(self, pairs: PairLogProbs) -> Tensor:
        """Return ``weight * n_w``, (P,)."""
        return pairs.weight * pairs.chosen_tokens

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``lw`` and ``ll``, (P,) each."""
        return pairs.chosen, pairs.rejected


@dataclass(frozen=True)
class ReferenceFree(ReferenceFreeLoss):
    """``-ls(beta (lw - ll) - m)``: DPO with a uniform reference."""

    reads = MARGIN_AND_LABEL_PROB

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        return bradley_terry(self.beta * (pairs.chosen - pairs.rejected), pairs)


@dataclass(frozen=True)
class Cpo(ReferenceFreeLoss):
    """``-ls(beta (lw - ll) - m) - alpha lw / n_w``: Xu et al., arXiv:2401.08417."""

    reads = MARGIN_AND_LABEL_PROB
    alpha: NonNegative = 1.0

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        preference = bradley_terry(self.beta * (pairs.chosen - pairs.rejected), pairs)
        return preference + self.alpha * negative_log_likelihood(pairs)


@dataclass(frozen=True)
class SimPo(ReferenceFreeLoss):
    """``-ls(beta (lw/n_w - ll/n_l) - gamma - m)``: Meng et al., arXiv:2405.14734.

    The paper sweeps ``beta`` 2 to 2.5 and ``gamma / beta`` 0.3 to 0.5.
    """

    reads = MARGIN_AND_LABEL_PROB
    beta: Positive = 2.0
    gamma: NonNegative = 1.0

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``beta lw / n_w`` and ``beta ll / n_l``, (P,) each."""
        return super().rewards(pairs.per_token())

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        chosen, rejected = self.rewards(pairs)
        return bradley_terry(chosen - rejected - self.gamma, pairs)


@dataclass(frozen=True)
class AlphaPo(SimPo):
    """``-ls(beta (r(lw/n_w) - r(ll/n_l)) - gamma - m)``, ``r(x) = (1 - e^(-alpha x)) / alpha``.

    Gupta et al., arXiv:2501.03884; as ``alpha`` goes to 0 it becomes SimPO.
    """

    beta: Positive = 2.5
    gamma: NonNegative = 0.1
    alpha: Positive = 0.25

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``beta r`` of the chosen and the rejected answers, (P,) each."""
        chosen, rejected = (
            -(-self.alpha * log_prob).clamp(max=MAX_EXPONENT).expm1() * (self.beta / self.alpha)
            for log_prob in (pairs.per_token().chosen, pairs.per_token().rejected)
        )
        return chosen, rejected


@dataclass(frozen=True)
class Orpo(ReferenceFreeLoss):
    """``-a - beta ls(o)`` with ``a = lw/n_w``: Hong et al., arXiv:2403.07691, eq. 6.

    ``o = a - log(1 - e^a) - b + log(1 - e^b)``, with ``b = ll/n_l``, is the log odds ratio;
    ``beta`` is the paper's lambda.
    """

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``beta lw / n_w`` and ``beta ll / n_l``, (P,) each."""
        return super().rewards(pairs.per_token())

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        mean = pairs.per_token()
        log_odds_ratio = _log_odds(mean.chosen) - _log_odds(mean.rejected)
        return -mean.chosen - self.beta * F.logsigmoid(log_odds_ratio)


@dataclass(frozen=True)
class SlicHf(Loss):
    """``max(0, delta + m - lw + ll) - nll_weight lw``: SLiC-HF, Zhao et al., arXiv:2305.10425.

    ``nll_weight`` is the paper's lambda; log-probs are sums, as in HALOs.
    """

    needs_reference: ClassVar[bool] = False
    reads = MARGIN
    delta: NonNegative = 1.0
    nll_weight: NonNegative = 0.1

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        calibration = F.relu(self.delta + pairs.margin - pairs.chosen + pairs.rejected)
        return calibration - self.nll_weight * pairs.chosen

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``lw`` and ``ll``, (P,) each."""
        return pairs.chosen, pairs.rejected


@dataclass(frozen=True)
class Simper(Loss):
    """``e^(ll/n_l) - e^(lw/n_w)``, inverse perplexities: Xiao et al., arXiv:2502.00883."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        chosen, rejected = self.rewards(pairs)
        return rejected.exp() - chosen.exp()

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``lw / n_w`` and ``ll / n_l``, (P,) each."""
        mean = pairs.per_token()
        return mean.chosen, mean.rejected


def _log_odds(log_prob: Tensor) -> Tensor:
    """Return ``x - log(1 - e^x)``; x stops one round-off below 0, where the odds are infinite."""
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    near_zero = (-log_prob.expm1()).log()
    far = (-log_prob.exp()).log1p()
    return log_prob - torch.where(log_prob > -math.log(2), near_zero, far)
