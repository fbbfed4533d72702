"""What every loss has in common: its input, its interface and the checks of its options.

Shapes: P pairs, K answer tokens, S running statistics, T terms of a mixture.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Final, Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.errors import InputError
from dpo.tokenized_pairs import TokenizedPairs

MAX_EXPONENT = 80.0  # e^80 = 5.5e34 is finite in float32, with room for a sum over the step

Positive = Annotated[float, "(0, inf)"]
NonNegative = Annotated[float, "[0, inf)"]

TokenStatistic = Literal["typicality", "reference_kl"]
NOT_GIVEN: Final = torch.zeros(())


@dataclass(frozen=True, slots=True, eq=False)
class PairLogProbs:
    """What the losses see of P pairs; the fields are (P,), float32 in training.

    An unpaired row has one answer: the other has 0 tokens and log-probs of 0. Fields from
    ``chosen_statistic`` on are there for the losses that ask for them, and 0 for others.

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
        chosen_statistic: sum over the chosen answer's tokens of ``Loss.token_statistic``.
        rejected_statistic: the same of the rejected answers.
        draw: uniform random number in [0, 1) of the pair in this step.
        chain: int64, equal for neighbouring pairs of which each one's rejected answer is the chosen
            one of the next: together they rank a list of answers, the best first.
        mismatch: (), mean log-ratio over the step of answers to other prompts.
        running: (S,), the loss's running statistics.
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
    chosen_statistic: Tensor = NOT_GIVEN
    rejected_statistic: Tensor = NOT_GIVEN
    draw: Tensor = NOT_GIVEN
    chain: Tensor = NOT_GIVEN
    mismatch: Tensor = NOT_GIVEN
    running: Tensor = NOT_GIVEN

    @property
    def has_chosen(self) -> Tensor:
        """Return 1 where there is a chosen answer, else 0, (P,)."""
        return (self.chosen_tokens > 0).to(self.chosen.dtype)

    @property
    def has_rejected(self) -> Tensor:
        """Return 1 where there is a rejected answer, else 0, (P,)."""
        return (self.rejected_tokens > 0).to(self.rejected.dtype)

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


PAIR_COLUMNS: Final = tuple(
    field.name for field in fields(PairLogProbs) if field.default is not NOT_GIVEN
)


@dataclass(frozen=True)
class Loss(ABC):
    """One value per pair; the fields of a subclass are its options.

    The loss of an optimizer step is ``sum(w * loss(pairs)) / sum(w)`` over all pairs of the step,
    however it is split into micro-batches, with ``w = loss.pair_weights(pairs)``.

    Attributes:
        needs_reference: whether the reference's log-probs are read.
        needs_mismatch: whether ``mismatch`` is read.
        reads: which of the columns ``margin`` and ``label_prob`` are read.
        takes_unpaired: whether rows with one answer are understood.
        sees_whole_step: whether a pair's value depends on other pairs of the step: the loss is then
            called with all of them, in the order of the step.
        sees_chains: whether ``chain`` is read; a step then holds ``batch_size`` whole chains.
        draws: whether random numbers are read.
        token_statistic: what is summed over the tokens of an answer: "typicality", ``log p(token) -
            log sum p^2`` without gradient, or "reference_kl", the KL divergence of the policy's
            next-token distribution from the reference's.
        running_start: the running statistics before the first step, S numbers.
    """

    needs_reference: ClassVar[bool] = True
    needs_mismatch: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()
    takes_unpaired: ClassVar[bool] = False
    sees_whole_step: ClassVar[bool] = False
    sees_chains: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    token_statistic: ClassVar[TokenStatistic | None] = None
    running_start: ClassVar[tuple[float, ...]] = ()

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

    def with_terms(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair and, below it, those of a mixture's terms: (1 + T, P)."""
        return self(pairs)[None]

    @abstractmethod
    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards of the chosen and the rejected answers, (P,) each."""

    def pair_weights(self, pairs: PairLogProbs) -> Tensor:
        """Return the weight of each pair in the step's mean, (P,); depends on the data alone."""
        return pairs.weight

    def at_progress(self, share: float) -> "Loss":
        """Return the loss as it is after ``share`` of the run's steps, in [0, 1]; here the same.

        An evaluation measures by ``at_progress(1)`` at every step.
        """
        return self

    def update(self, pairs: PairLogProbs) -> Tensor:
        """Return the running statistics, (S,), from those in ``pairs`` and all pairs of a step."""
        return pairs.running

    def at_reference(self, pairs: PairLogProbs) -> Tensor:
        """Return the loss of each pair if the policy were the reference, (P,)."""
        return self(
            replace(pairs, chosen=pairs.reference_chosen, rejected=pairs.reference_rejected)
        )

    def check(self, pairs: TokenizedPairs) -> None:
        """Refuse a data set that says something which this loss would ignore.

        Raises:
            InputError: a column that the loss does not read says something, rows lack an answer
            that the loss compares, or the loss refuses the values of a column.
        """
        silence = {"margin": (pairs.margins, 0), "label_prob": (pairs.label_probs, 1)}
        for column, (values, nothing) in silence.items():
            speaks = values != nothing
            if column not in self.reads and speaks.any():
                raise InputError(
                    f"{speaks.sum()} pairs have a {column} (the first is pair {speaks.argmax()}), "
                    f"which {self} does not read: remove the column or choose a loss that reads it"
                )
        unpaired = pairs.is_unpaired
        if unpaired.any() and not self.takes_unpaired:
            raise InputError(
                f"{unpaired.sum()} rows have one answer (the first is row {unpaired.argmax()}), "
                f"where {self} compares two: choose a loss for unpaired rows, kto or bco"
            )
        if faults := self.value_faults(pairs):
            raise InputError("; ".join(faults))

    def value_faults(self, pairs: TokenizedPairs) -> list[str]:
        """Return what is wrong with the columns that this loss reads; nothing in general."""
        return []


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
