"""Losses that look at single tokens of the answers; the notation is in ``dpo.losses``.

Shapes: P pairs, K answer tokens.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dpo.losses.base import NOT_GIVEN, PairLogProbs, TokenStatistic
from dpo.losses.with_reference import Sigmoid


@dataclass(frozen=True, slots=True, eq=False)
class AnswerTokens:
    """K answer tokens; every field is (K,).

    Attributes:
        log_probs: under the policy, in nats.
        reference: under the reference.
        answer: int64, the answer that the token belongs to, ascending.
        place: int64, the token's index in its answer.
        shorter: int64, the tokens of the shorter answer of the pair.
        draw: uniform random numbers in [0, 1), for a loss that draws.
    """

    log_probs: Tensor
    reference: Tensor
    answer: Tensor
    place: Tensor
    shorter: Tensor
    draw: Tensor = NOT_GIVEN


@dataclass(frozen=True)
class TokenLoss(Sigmoid):
    """Base of the losses that are DPO over token log-probs changed before they are summed."""

    @abstractmethod
    def adjust(self, tokens: AnswerTokens) -> AnswerTokens:
        """Return the tokens with the log-probs that are to be summed."""


@dataclass(frozen=True)
class LdDpo(TokenLoss):
    """DPO in which tokens beyond the length of the shorter answer count ``alpha``.

    LD-DPO: Liu et al., arXiv:2409.06411; policy and reference alike.
    """

    alpha: Annotated[float, "[0, 1]"] = 0.5

    def adjust(self, tokens: AnswerTokens) -> AnswerTokens:
        """Scale the log-probs of the longer answer's tail."""
        factor = torch.where(tokens.place < tokens.shorter, 1.0, self.alpha)
        return _scaled(tokens, factor)


@dataclass(frozen=True)
class SamPo(TokenLoss):
    """DPO over as many tokens of the longer answer, drawn at random, as the shorter one has.

    SamPO: Lu et al., arXiv:2406.10957. The draw follows from seed, step and row.
    """

    draws: ClassVar[bool] = True

    def adjust(self, tokens: AnswerTokens) -> AnswerTokens:
        """Leave out what is not drawn."""
        order = (tokens.answer.double() + tokens.draw).argsort()
        # The tokens of an answer stay in its place, so the k-th of them is its k-th smallest draw.
        rank = torch.empty_like(tokens.place).scatter_(0, order, tokens.place)
        return _scaled(tokens, (rank < tokens.shorter).to(tokens.log_probs.dtype))


@dataclass(frozen=True)
class Humanline(TokenLoss):
    """DPO over token log-ratios clamped into ``[low, high]``: Liu et al., arXiv:2509.24207.

    The method also moves the reference, as ``train.reference_sync_every`` does.
    """

    low: Annotated[float, "(-inf, 0)"] = -1.0
    high: Annotated[float, "(0, inf)"] = 1.5

    def adjust(self, tokens: AnswerTokens) -> AnswerTokens:
        """Clamp the log-ratios; a clamped token has no gradient."""
        log_ratio = (tokens.log_probs - tokens.reference).clamp(self.low, self.high)
        return replace(tokens, log_probs=tokens.reference + log_ratio)


@dataclass(frozen=True)
class Wpo(Sigmoid):
    """DPO weighted by how likely the policy itself would write the pair's answers.

    ``-o_w o_l ls(beta D - m)`` with ``o = exp(mean_t [log p(y_t) - log sum_a p(a)^2])``, without
    gradient: Zhou et al., arXiv:2406.11827, eq. 2, relative to what the policy itself would draw.
    """

    token_statistic: ClassVar[TokenStatistic | None] = "typicality"

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        chosen = pairs.chosen_statistic / pairs.chosen_tokens.clamp(min=1)
        rejected = pairs.rejected_statistic / pairs.rejected_tokens.clamp(min=1)
        return (chosen + rejected).exp().detach() * super().__call__(pairs)


@dataclass(frozen=True)
class Tdpo1(Sigmoid):
    """``-ls(beta [D - (K_l - K_w)] - m)``, with ``K(y) = sum_t KL(reference || policy)``.

    Token-level DPO: Zeng et al., arXiv:2404.11999.
    """

    token_statistic: ClassVar[TokenStatistic | None] = "reference_kl"

    def divergence(self, pairs: PairLogProbs) -> Tensor:
        """Return what is taken from ``D``, (P,)."""
        return pairs.rejected_statistic - pairs.chosen_statistic

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""
        # taken from D by way of one of its terms: the rejected answer's log-prob
        return super().__call__(replace(pairs, rejected=pairs.rejected + self.divergence(pairs)))


@dataclass(frozen=True)
class Tdpo2(Tdpo1):
    """``-ls(beta [D - alpha (K_l - sg K_w)] - m)``; ``sg`` stops the gradient.

    Zeng et al., arXiv:2404.11999.
    """

    alpha: Annotated[float, "[0, inf)"] = 0.5

    def divergence(self, pairs: PairLogProbs) -> Tensor:
        """Return what is taken from ``D``, (P,)."""
        return self.alpha * (pairs.rejected_statistic - pairs.chosen_statistic.detach())


def _scaled(tokens: AnswerTokens, factor: Tensor) -> AnswerTokens:
    return replace(tokens, log_probs=tokens.log_probs * factor, reference=tokens.reference * factor)
