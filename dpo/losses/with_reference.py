"""Losses over log-ratios to a reference; the notation is in ``dpo.losses``."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.errors import InputError
from dpo.losses.base import (
    MARGIN,
    MARGIN_AND_LABEL_PROB,
    MAX_EXPONENT,
    NonNegative,
    PairLogProbs,
    Positive,
    ReferenceLoss,
    bradley_terry,
    negative_log_likelihood,
)
from dpo.tokenized_pairs import TokenizedPairs


@dataclass(frozen=True)
class Sigmoid(ReferenceLoss):
    """DPO, ``-ls(beta D - m)``: Rafailov et al., arXiv:2305.18290, eq. 7.

    With ``label_smoothing = e`` it is conservative DPO, ``-(1-e) ls(z) - e ls(-z)`` of the same
    logit ``z``: Mitchell 2023, https://ericmitchell.ai/cdpo.pdf. A row's ``label_prob = p`` is that
    row's own smoothing, ``e = 1 - p``. Both together are refused.
    """

    reads = MARGIN_AND_LABEL_PROB
    label_smoothing: Annotated[float, "[0, 0.5]"] = 0.0

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        if self.label_smoothing:
            pairs = replace(
                pairs, label_prob=torch.full_like(pairs.margin, 1 - self.label_smoothing)
            )
        return bradley_terry(self.beta * pairs.log_ratio_gap, pairs)

    def value_faults(self, pairs: TokenizedPairs) -> list[str]:
        """Return a fault if labels have probabilities and are smoothed as well."""
        if not self.label_smoothing or (pairs.label_probs == 1).all():
            return []
        return [
            f"loss.label_smoothing={self.label_smoothing} and the data's label_prob column "
            "both say how far to trust a label: set the option to 0 or remove the column"
        ]


@dataclass(frozen=True)
class Robust(ReferenceLoss):
    """Robust DPO, ``[-(1-e) ls(z) + e ls(-z)] / (1-2e)`` with ``z = beta D - m``.

    Unbiased if a share ``e = label_smoothing`` of the labels is flipped: Chowdhury et al.,
    arXiv:2403.00409.
    """

    reads = MARGIN
    label_smoothing: Annotated[float, "[0, 0.5)"] = 0.1

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        logit, e = self.beta * pairs.log_ratio_gap - pairs.margin, self.label_smoothing
        return (e * F.logsigmoid(-logit) - (1 - e) * F.logsigmoid(logit)) / (1 - 2 * e)


@dataclass(frozen=True)
class Hinge(ReferenceLoss):
    """``max(0, 1 - (beta D - m))``: RSO, Liu et al., arXiv:2309.06657; SLiC, arXiv:2305.10425."""

    reads = MARGIN

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        return F.relu(1 - (self.beta * pairs.log_ratio_gap - pairs.margin))


@dataclass(frozen=True)
class IpoSum(ReferenceLoss):
    """IPO over sequence sums, ``(D - (m + 1/2) / beta)^2``: Azar et al., arXiv:2310.12036, eq. 17.

    ``beta`` is the paper's tau. The margin adds to the gap in reward that is aimed at, 1/2.
    """

    reads = MARGIN

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        return (pairs.log_ratio_gap - (pairs.margin + 0.5) / self.beta).square()


@dataclass(frozen=True)
class Ipo(IpoSum):
    """IPO over log-ratios per token, ``(u/n_w - v/n_l - (m + 1/2) / beta)^2``.

    The form that the authors of arXiv:2310.12036 confirmed for practice.
    """

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        return super().__call__(pairs.per_token())


@dataclass(frozen=True)
class SigmoidNorm(ReferenceLoss):
    """Length-normalised DPO, ``-ls(beta (u/n_w - v/n_l) - m)``: Tulu 3, arXiv:2411.15124, eq. 6."""

    reads = MARGIN_AND_LABEL_PROB
    beta: Positive = 5.0

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        return bradley_terry(self.beta * pairs.per_token().log_ratio_gap, pairs)


@dataclass(frozen=True)
class Rpo(ReferenceLoss):
    """DPO plus the chosen answer's NLL, ``-ls(beta D - m) - alpha lw / n_w``.

    Iterative RPO: Pang et al., arXiv:2404.19733. Liu et al., arXiv:2405.16436, use alpha = 0.005.
    """

    reads = MARGIN_AND_LABEL_PROB
    alpha: NonNegative = 1.0

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        preference = bradley_terry(self.beta * pairs.log_ratio_gap, pairs)
        return preference + self.alpha * negative_log_likelihood(pairs)


@dataclass(frozen=True)
class ExoPair(ReferenceLoss):
    """``s(z) [ls(z) - log(1-e)] + s(-z) [ls(-z) - log e]`` with ``z = beta D - m``.

    EXO: reverse KL to the label smoothed by ``e = label_smoothing``; Ji et al., arXiv:2402.00856,
    eq. 16.
    """

    reads = MARGIN
    label_smoothing: Annotated[float, "(0, 0.5)"] = 1e-3

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        logit, e = self.beta * pairs.log_ratio_gap - pairs.margin, self.label_smoothing
        chosen = logit.sigmoid() * (F.logsigmoid(logit) - math.log1p(-e))
        return chosen + (-logit).sigmoid() * (F.logsigmoid(-logit) - math.log(e))


@dataclass(frozen=True)
class NcaPair(ReferenceLoss):
    """``-ls(beta u) - ls(-beta u) / 2 - ls(-beta v) / 2``: NCA, Chen et al., arXiv:2402.05369."""

    beta: Positive = 0.01

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@dataclass(frozen=True)
class SppoHard(ReferenceLoss):
    """``(u - 1/(2 beta))^2 + (v + 1/(2 beta))^2``: Wu et al., arXiv:2405.00675, eq. 4.7.

    SPPO where the chosen answer always wins and the rejected never.
    """

    beta: Positive = 1e-3

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        target = 0.5 / self.beta
        return (pairs.chosen_log_ratio - target).square() + (
            pairs.rejected_log_ratio + target
        ).square()


@dataclass(frozen=True)
class ApoZero(ReferenceLoss):
    """``1 - s(beta u) + s(beta v)``: D'Oosterlinck et al., arXiv:2408.06266, eq. 7.

    Raises the chosen and lowers the rejected: for a policy that is worse than the chosen answers.
    """

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        chosen, rejected = self.rewards(pairs)
        return (-chosen).sigmoid() + rejected.sigmoid()


@dataclass(frozen=True)
class ApoDown(ReferenceLoss):
    """``s(beta u) + 1 - s(beta D)``: D'Oosterlinck et al., arXiv:2408.06266, eq. 8.

    Lowers both, the rejected more: for a policy that is better than the chosen answers.
    """

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        chosen, rejected = self.rewards(pairs)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()


@dataclass(frozen=True)
class DiscoPop(ReferenceLoss):
    """``-(1-g) ls(x) + g e^-x`` with ``x = beta D - m`` and the gate ``g = s(x / tau)``.

    Log-ratio modulated loss: Lu et al., arXiv:2406.08414, eq. 5.
    """

    reads = MARGIN
    beta: Positive = 0.05
    tau: Positive = 0.05

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        logit = self.beta * pairs.log_ratio_gap - pairs.margin
        logistic = -(-logit / self.tau).sigmoid() * F.logsigmoid(logit)
        # One exponent: g e^-x alone would be 0 * inf far below zero.
        return logistic + (F.logsigmoid(logit / self.tau) - logit).clamp(max=MAX_EXPONENT).exp()


@dataclass(frozen=True)
class ChiPo(ReferenceLoss):
    """``-ls(clip(beta (f(u) - f(v)), -2R, 2R) - m)`` with ``f(z) = e^z + z``, ``R = reward_bound``.

    Chi-squared preference optimization: Huang et al., arXiv:2407.13399. ``e^z`` stops at z = 20.
    """

    reads = MARGIN_AND_LABEL_PROB
    reward_bound: Positive = 2.5

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``beta f(u)`` and ``beta f(v)``, (P,) each."""
        u, v = pairs.chosen_log_ratio, pairs.rejected_log_ratio
        return self.beta * (u.clamp(max=20).exp() + u), self.beta * (v.clamp(max=20).exp() + v)

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        chosen, rejected = self.rewards(pairs)
        bound = 2 * self.reward_bound
        return bradley_terry((chosen - rejected).clamp(-bound, bound), pairs)


@dataclass(frozen=True)
class RDpo(ReferenceLoss):
    """``-ls(beta D + alpha (n_w - n_l) - m)``: R-DPO, Park et al., arXiv:2403.19159.

    The sign of the length term follows from a reward that loses ``alpha`` per token.
    """

    reads = MARGIN_AND_LABEL_PROB
    alpha: NonNegative = 0.05

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        longer = pairs.chosen_tokens - pairs.rejected_tokens
        return bradley_terry(self.beta * pairs.log_ratio_gap + self.alpha * longer, pairs)


@dataclass(frozen=True)
class Dpop(ReferenceLoss):
    """``-ls(beta (D - penalty max(0, -u)) - m)``: DPOP, Pal et al., arXiv:2402.13228, eq. 3.

    ``penalty`` is the paper's lambda (50 there; 0.5 to 5 is common in practice): it keeps the
    chosen answer from becoming less likely than it is under the reference.
    """

    reads = MARGIN_AND_LABEL_PROB
    beta: Positive = 0.3
    penalty: NonNegative = 50.0

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        gap = pairs.log_ratio_gap - self.penalty * F.relu(-pairs.chosen_log_ratio)
        return bradley_terry(self.beta * gap, pairs)


@dataclass(frozen=True)
class Odpo(ReferenceLoss):
    """``-ls(beta D - alpha log m)``: DPO with an offset, Amini et al., arXiv:2402.10571.

    ``margin`` holds the gap between the answers' scores, above 0.
    """

    reads = MARGIN_AND_LABEL_PROB
    alpha: NonNegative = 1.0

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        offset = self.alpha * pairs.margin.log()
        return bradley_terry(self.beta * pairs.log_ratio_gap, replace(pairs, margin=offset))

    def value_faults(self, pairs: TokenizedPairs) -> list[str]:
        """Return a fault if a gap has no logarithm."""
        faulty = pairs.margins <= 0
        if not faulty.any():
            return []
        return [
            "odpo takes the logarithm of margin, the gap between the answers' scores: "
            f"{faulty.sum()} pairs have none above 0 (the first is pair {faulty.argmax()})"
        ]


@dataclass(frozen=True)
class CalDpo(ReferenceLoss):
    """``-ls(D) + [(u - 1/(2 beta))^2 + (v + 1/(2 beta))^2] / 2``: Xiao et al., arXiv:2412.14516.

    The first term has no ``beta``, as in the authors' code.
    """

    beta: Positive = 1e-3

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        target = 0.5 / self.beta
        chosen = (pairs.chosen_log_ratio - target).square()
        rejected = (pairs.rejected_log_ratio + target).square()
        return -F.logsigmoid(pairs.log_ratio_gap) + 0.5 * (chosen + rejected)


@dataclass(frozen=True)
class DpoShift(ReferenceLoss):
    """``-ls(beta (u - rejected_weight v) - m)``: Yang et al., arXiv:2502.07599.

    ``rejected_weight`` is the paper's lambda, 0.5 to 0.95 there. With ``final_rejected_weight`` it
    moves there in a straight line over the steps of the run: up (0.75 to 1 in the paper) or down
    (1 to 0.75).
    """

    reads = MARGIN_AND_LABEL_PROB
    rejected_weight: Annotated[float, "(0, 1]"] = 0.95
    final_rejected_weight: Annotated[float | None, "(0, 1]"] = None

    def at_progress(self, share: float) -> "DpoShift":
        """Return the loss with lambda as it is after ``share`` of the steps."""
        if self.final_rejected_weight is None:
            return self
        reached = (1 - share) * self.rejected_weight + share * self.final_rejected_weight
        return replace(self, rejected_weight=reached)

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        gap = pairs.chosen_log_ratio - self.rejected_weight * pairs.rejected_log_ratio
        return bradley_terry(self.beta * gap, pairs)


@dataclass(frozen=True)
class FDpo(ReferenceLoss):
    """``-ls(beta (f'(e^u) - f'(e^v)) - m)``: f-DPO, Wang et al., arXiv:2309.16240.

    ``f'(e^z)`` by ``divergence``: reverse_kl ``z`` (plain DPO), forward_kl ``1 - e^-z``,
    jensen_shannon ``log 2 + ls(z)``, alpha ``(e^((alpha-1) z) - 1) / (alpha - 1)``, where ``alpha``
    is 0.5 unless given.
    """

    reads = MARGIN_AND_LABEL_PROB
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "jensen_shannon"
    alpha: Annotated[float | None, "(0, 1)"] = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: ``alpha`` is given to another divergence, or an option is out of range.
        """
        super().__post_init__()
        if self.alpha is not None and self.divergence != "alpha":
            raise InputError(
                f"loss.alpha is read only with loss.divergence='alpha', not {self.divergence!r}"
            )

    def score(self, log_ratio: Tensor) -> Tensor:
        """Return ``f'(e^log_ratio)``; exponents stop at 80 so that float32 stays finite."""
        if self.divergence == "reverse_kl":
            return log_ratio
        if self.divergence == "jensen_shannon":
            return math.log(2) + F.logsigmoid(log_ratio)
        slope = -1.0 if self.divergence == "forward_kl" else (self.alpha or 0.5) - 1
        return (slope * log_ratio).clamp(max=MAX_EXPONENT).expm1() / slope

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``beta f'(e^u)`` and ``beta f'(e^v)``, (P,) each."""
        chosen, rejected = pairs.chosen_log_ratio, pairs.rejected_log_ratio
        return self.beta * self.score(chosen), self.beta * self.score(rejected)

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        chosen, rejected = self.rewards(pairs)
        return bradley_terry(chosen - rejected, pairs)
