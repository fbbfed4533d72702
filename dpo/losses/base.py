"""What every loss has in common: its input, its interface and the checks of its options.

Shapes: P pairs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Literal, get_args, get_origin

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dpo.errors import InputError

MAX_EXPONENT = 80.0  # e^80 = 5.5e34 is finite in float32, with room for a sum over the step

Positive = Annotated[float, "(0, inf)"]
NonNegative = Annotated[float, "[0, inf)"]


@dataclass(frozen=True, slots=True, eq=False)
class PairLogProbs:
    """What the losses see of P pairs; every field is (P,), float32 in training.

    Attributes:
        chosen: sequence log-probs of the chosen answers, in nats.
        rejected: the same of the rejected answers.
        reference_chosen: the reference's, without gradient; zeros if the loss needs none.
        reference_rejected: the same of the rejected answers.
        chosen_tokens: counted tokens of the chosen answers, as floats.
        rejected_tokens: the same of the rejected answers.
        weight: weight of the row in the step's mean.
        margin: gap in reward that the pair should have.
        label_prob: probability that chosen is the better answer.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    weight: Tensor
    margin: Tensor
    label_prob: Tensor

    @property
    def chosen_log_ratio(self) -> Tensor:
        """Return ``u = lw - rw``, (P,)."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_log_ratio(self) -> Tensor:
        """Return ``v = ll - rl``, (P,)."""
        return self.rejected - self.reference_rejected

    @property
    def log_ratio_gap(self) -> Tensor:
        """Return ``D = u - v``, (P,)."""
        return self.chosen_log_ratio - self.rejected_log_ratio

    def per_token(self) -> "PairLogProbs":
        """Return the pairs with each of the four log-probs divided by its answer's token count."""
        chosen_tokens = self.chosen_tokens.clamp(min=1)
        rejected_tokens = self.rejected_tokens.clamp(min=1)
        return replace(
            self,
            chosen=self.chosen / chosen_tokens,
            rejected=self.rejected / rejected_tokens,
            reference_chosen=self.reference_chosen / chosen_tokens,
            reference_rejected=self.reference_rejected / rejected_tokens,
        )


@dataclass(frozen=True)
class Loss(ABC):
    """One value per pair; the fields of a subclass are its options.

    The loss of an optimizer step is ``sum(w * loss(pairs)) / sum(w)`` over all pairs of the step,
    however it is split into micro-batches, with ``w = loss.pair_weights(pairs)``.

    Attributes:
        needs_reference: whether the reference's log-probs are read.
        reads: which of the columns ``margin`` and ``label_prob`` are read.
    """

    needs_reference: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Check each option against its annotation.

        Raises:
            InputError: an option is outside its interval or not one of its choices.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                _check_option(field.name, value, field.type)

    @abstractmethod
    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair, (P,)."""

    @abstractmethod
    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards of the chosen and the rejected answers, (P,) each."""

    def pair_weights(self, pairs: PairLogProbs) -> Tensor:
        """Return the weight of each pair in the step's mean, (P,); depends on the data alone."""
        return pairs.weight

    def at_reference(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair if the policy were the reference, (P,)."""
        return self(
            replace(pairs, chosen=pairs.reference_chosen, rejected=pairs.reference_rejected)
        )

    def check(self, *, margins: NDArray[np.float32], label_probs: NDArray[np.float32]) -> None:
        """Refuse a data set that says something which this loss would ignore.

        Args:
            margins: the data set's margin column; 0 says nothing.
            label_probs: the data set's label_prob column; 1 says nothing.

        Raises:
            InputError: a column that the loss does not read says something.
        """
        for column, speaks in (("margin", margins != 0), ("label_prob", label_probs != 1)):
            if column not in self.reads and speaks.any():
                raise InputError(
                    f"{speaks.sum()} pairs have a {column} (the first is pair {speaks.argmax()}), "
                    f"which {self} does not read: remove the column or choose a loss that reads it"
                )


MARGIN = frozenset({"margin"})
MARGIN_AND_LABEL_PROB = frozenset({"margin", "label_prob"})


@dataclass(frozen=True)
class ReferenceLoss(Loss):
    """Base of the losses over log-ratios to a reference; rewards are ``beta u`` and ``beta v``."""

    beta: Positive = 0.1

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``beta u`` and ``beta v``, (P,) each."""
        return self.beta * pairs.chosen_log_ratio, self.beta * pairs.rejected_log_ratio


@dataclass(frozen=True)
class ReferenceFreeLoss(Loss):
    """Base of the losses over the policy's log-probs; rewards are ``beta lw`` and ``beta ll``."""

    needs_reference: ClassVar[bool] = False
    beta: Positive = 0.1

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return ``beta lw`` and ``beta ll``, (P,) each."""
        return self.beta * pairs.chosen, self.beta * pairs.rejected


def bradley_terry(logit: Tensor, pairs: PairLogProbs) -> Tensor:
    """Return ``-p ls(z) - (1-p) ls(-z)`` with ``z = logit - m``, (P,).

    The negative log-likelihood of the Bradley-Terry model under the row's soft label.
    """
    logit, p = logit - pairs.margin, pairs.label_prob
    return -p * F.logsigmoid(logit) - (1 - p) * F.logsigmoid(-logit)


def negative_log_likelihood(pairs: PairLogProbs) -> Tensor:
    """Return ``-lw / n_w``, (P,)."""
    return -pairs.per_token().chosen


def _check_option(name: str, value: object, annotation: object) -> None:
    """Check a value against ``Literal`` choices or the interval of an ``Annotated`` number."""
    if get_origin(annotation) is Literal and value not in get_args(annotation):
        raise InputError(
            f"loss.{name} must be one of {', '.join(get_args(annotation))}, got {value!r}"
        )
    for interval in getattr(annotation, "__metadata__", ()):
        if not _is_inside(value, interval):
            raise InputError(f"loss.{name} must be a number in {interval}, got {value!r}")


def _is_inside(value: object, interval: str) -> bool:
    """Say whether value is a number in an interval written as in mathematics: ``[0, 0.5)``."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below
