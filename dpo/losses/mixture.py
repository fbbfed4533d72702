"""A weighted sum of losses on the same pairs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpo.errors import InputError
from dpo.losses.base import Loss, PairLogProbs


@dataclass(frozen=True)
class Mixture(Loss):
    """``sum(c_i L_i)``, each term a mean over pairs by their weights; rewards are the first term's.

    A term that has pair weights of its own is averaged over pairs as well: ``sft`` is then the mean
    of ``-lw / n_w``, so that every answer counts the same, however long it is.

    Attributes:
        terms: each loss with its coefficient, above 0.

    Raises:
        InputError: there are fewer than two terms, or a coefficient is not above 0 and finite.
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
        # of this mixture, in place of those of the class
        object.__setattr__(self, "needs_reference", any(loss.needs_reference for loss in losses))
        object.__setattr__(self, "reads", frozenset().union(*(loss.reads for loss in losses)))

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the weighted sum for each pair, (P,)."""
        (first, coefficient), *others = self.terms
        total = coefficient * first(pairs)
        for loss, coefficient in others:
            total = total + coefficient * loss(pairs)
        return total

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return the rewards of the first term, (P,) each."""
        return self.terms[0][0].rewards(pairs)

    def check(self, *, margins: NDArray[np.float32], label_probs: NDArray[np.float32]) -> None:
        """Refuse a column that no term reads, and what a term refuses of those that it reads.

        Raises:
            InputError: as the terms do.
        """
        super().check(margins=margins, label_probs=label_probs)
        silent = {"margin": np.zeros_like(margins), "label_prob": np.ones_like(label_probs)}
        for loss, _ in self.terms:
            loss.check(
                margins=margins if "margin" in loss.reads else silent["margin"],
                label_probs=label_probs if "label_prob" in loss.reads else silent["label_prob"],
            )
