"""A weighted sum of losses on the same pairs.

Shapes: P pairs, S running statistics, T terms.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo.errors import InputError
from dpo.losses.base import Loss, PairLogProbs
from dpo.losses.token_level import TokenLoss
from dpo.tokenized_pairs import TokenizedPairs


@dataclass(frozen=True)
class Mixture(Loss):
    """``sum(c_i L_i)``, each term a mean over pairs by their weights; rewards are the first term's.

    A term that has pair weights of its own is averaged over pairs as well: ``sft`` is then the mean
    of ``-lw / n_w``, so that every answer counts the same, however long it is.

    Attributes:
        terms: each loss with its coefficient, above 0.

    Raises:
        InputError: there are fewer than two terms, a coefficient is not above 0 and finite, or
        terms look at single tokens in ways that do not go together.
    """

    terms: tuple[tuple[Loss, float], ...]

    def __post_init__(self) -> None:
        """Check the coefficients, and take over what the terms need and read."""
        if len(self.terms) < 2:
            raise InputError(f"a mixture of losses has two terms or more, got {len(self.terms)}")
        for loss, coefficient in self.terms:
            if not 0 < coefficient < float("inf"):
                raise InputError(f"the coefficient of {loss} must be above 0, got {coefficient}")
        losses = [loss for loss, _ in self.terms]
        for loss in losses:
            if isinstance(loss, TokenLoss):
                raise InputError(f"{loss} changes single tokens: it cannot be a term of a mixture")
        statistics = {loss.token_statistic for loss in losses} - {None}
        if len(statistics) > 1:
            raise InputError("wpo and tdpo cannot be terms of one mixture: each sums another thing")
        self._be(
            needs_reference=any(loss.needs_reference for loss in losses),
            needs_mismatch=any(loss.needs_mismatch for loss in losses),
            reads=frozenset().union(*(loss.reads for loss in losses)),
            takes_unpaired=all(loss.takes_unpaired for loss in losses),
            sees_whole_step=any(loss.sees_whole_step for loss in losses),
            sees_chains=any(loss.sees_chains for loss in losses),
            draws=any(loss.draws for loss in losses),
            token_statistic=next(iter(statistics), None),
            running_start=tuple(value for loss in losses for value in loss.running_start),
        )

    def _be(self, **traits: object) -> None:
        """Set the traits of this mixture in place of those of the class."""
        for name, value in traits.items():
            object.__setattr__(self, name, value)

    def _parts(self, pairs: PairLogProbs) -> list[PairLogProbs]:
        """Return for each term the pairs with its own running statistics."""
        sizes = [len(loss.running_start) for loss, _ in self.terms]
        if not sum(sizes):
            return [pairs] * len(sizes)
        return [replace(pairs, running=part) for part in pairs.running.split(sizes)]

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the weighted sum for each pair, (P,)."""
        return self.with_terms(pairs)[0]

    def with_terms(self, pairs: PairLogProbs) -> Tensor:
        """Return the weighted sum for each pair and, below it, the terms: (1 + T, P)."""
        parts = zip(self.terms, self._parts(pairs), strict=True)
        values = [loss(part) for (loss, _), part in parts]
        weighted = [share * value for (_, share), value in zip(self.terms, values, strict=True)]
        return torch.stack([torch.stack(weighted).sum(dim=0), *values])

    def at_progress(self, share: float) -> "Mixture":
        """Return the mixture of the terms as they are after ``share`` of the run's steps."""
        return Mixture(tuple((loss.at_progress(share), factor) for loss, factor in self.terms))

    def update(self, pairs: PairLogProbs) -> Tensor:
        """Return the running statistics of all terms, one after another, (S,)."""
        parts = zip(self.terms, self._parts(pairs), strict=True)
        return torch.cat([loss.update(part) for (loss, _), part in parts if loss.running_start])

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return the rewards of the first term, (P,) each."""
        return self.terms[0][0].rewards(pairs)

    def value_faults(self, pairs: TokenizedPairs) -> list[str]:
        """Return the faults that the terms find."""
        return [fault for loss, _ in self.terms for fault in loss.value_faults(pairs)]
