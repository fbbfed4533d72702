"""The figures that policies are compared by, each a statistic of sums over examples.

To add one, add an entry to ``METRICS``: what to sum for each example, and how to make the figure
from the sums. It then has intervals, differences, p-values and a place in the ranking.

Shapes: N examples, F columns, B resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from dpo.data.kinds import PolicyKind
from dpo.errors import InputError
from dpo.eval.bootstrap import Statistic, ratio_of_sums
from dpo.eval.calibration import brier_score, calibration_columns, expected_error
from dpo.eval.classification import confusion_columns, statistic_of
from dpo.eval.examples import EvaluationExample
from dpo.eval.off_policy import (
    DecisionLog,
    arm_key,
    importance_weights,
    overlap_refusal,
    policy_chances,
    robust_columns,
    robust_value,
)
from dpo.eval.policies import Policy, PolicyDecision, decide_all
from dpo.eval.resampling import Floats

Subject = TypeVar("Subject")  # what a metric measures: decisions, or scored pairs


@dataclass(frozen=True, slots=True)
class Decided:
    """What one policy decided on the examples, beside what the log did."""

    policy: str
    kind: PolicyKind
    examples: Sequence[EvaluationExample]
    decisions: Sequence[PolicyDecision]
    log: DecisionLog
    chances: Floats
    """(N, A) chance with which the policy takes each of the log's arms."""
    expected: tuple[str, ...]
    """(N,) class of the logged action."""
    predicted: tuple[str, ...]
    """(N,) class of the policy's action."""
    refusal: str | None
    """Why the policy's reward cannot be estimated from this log; None when it can."""

    @property
    def is_right(self) -> Floats:
        """(N,) 1 where the classes agree."""
        pairs = zip(self.expected, self.predicted, strict=True)
        return np.array([expected == predicted for expected, predicted in pairs], dtype=np.float64)

    @property
    def confidences(self) -> Floats:
        """(N,) the policy's confidence in the class of its action.

        That is what ``is_right`` is about: a model's beliefs in all actions of the class add up.
        """
        classes = [self.kind.action_class(action) for action in self.kind.actions()]
        member = {name: np.array([each == name for each in classes]) for name in set(classes)}
        return np.array(
            [
                decision.confidence
                if decision.beliefs is None
                else min(float(np.dot(decision.beliefs, member[name])), 1.0)
                for decision, name in zip(self.decisions, self.predicted, strict=True)
            ]
        )


def decide_examples(
    policy: Policy, examples: Sequence[EvaluationExample], log: DecisionLog
) -> Decided:
    """Let the policy decide every example.

    Raises:
        InputError: the policy is of another kind than the log, or failed in every state.
    """
    kind = log.kind
    if policy.kind.name != kind.name:
        raise InputError(
            f"policy {policy.name!r} is of kind {policy.kind.name}, the examples are of {kind.name}"
        )
    decisions = decide_all(policy, [example.state for example in examples])
    chances = policy_chances(log, decisions)
    return Decided(
        policy=policy.name,
        kind=kind,
        examples=examples,
        decisions=decisions,
        log=log,
        chances=chances,
        expected=tuple(kind.action_class(example.expected_action) for example in examples),
        predicted=tuple(kind.action_class(decision.action) for decision in decisions),
        refusal=overlap_refusal(importance_weights(log, chances)),
    )


@dataclass(frozen=True, slots=True)
class Metric(Generic[Subject]):
    """One figure: ``statistic`` of the sums of ``columns``."""

    columns: Callable[[Subject], Floats]
    """(N, F) of what is measured."""
    statistic: Statistic
    is_better_higher: bool = True


def _value(decided: Decided) -> Floats:
    return robust_columns(decided.log, decided.chances)


def _confusion(decided: Decided) -> Floats:
    return confusion_columns(decided.expected, decided.predicted, decided.kind.classes)


def _calibration(decided: Decided) -> Floats:
    return calibration_columns(decided.confidences, decided.is_right)


def _full_agreement(decided: Decided) -> Floats:
    kind = decided.kind
    same = [
        arm_key(kind, example.expected_action, "action") == arm_key(kind, decision.action, "action")
        for example, decision in zip(decided.examples, decided.decisions, strict=True)
    ]
    return np.stack([np.array(same, dtype=np.float64), np.ones(len(same))], axis=1)


def _good_agreement(decided: Decided) -> Floats:
    good = (decided.log.rewards > 0.0).astype(np.float64)
    return np.stack([good * decided.is_right, good], axis=1)


def _bad_agreement(decided: Decided) -> Floats:
    bad = (decided.log.rewards < 0.0).astype(np.float64)
    return np.stack([bad * decided.is_right, bad], axis=1)


METRICS: dict[str, Metric[Decided]] = {
    "avg_reward": Metric(_value, robust_value),
    "accuracy": Metric(_confusion, statistic_of("accuracy")),
    "f1": Metric(_confusion, statistic_of("f1")),
    "macro_f1": Metric(_confusion, statistic_of("macro_f1")),
    "full_action_agreement": Metric(_full_agreement, ratio_of_sums),
    "good_agreement": Metric(_good_agreement, ratio_of_sums),
    "bad_agreement": Metric(_bad_agreement, ratio_of_sums, is_better_higher=False),
    "calibration_error": Metric(_calibration, expected_error, is_better_higher=False),
    "brier": Metric(_calibration, brier_score, is_better_higher=False),
}
