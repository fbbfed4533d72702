"""Compare policies on the same examples.

Both policies decide every example, so what is resampled are differences within examples (or
sessions): most of the noise is common to both and cancels. Two questions are asked separately. How
large is the difference? A bootstrap interval. Could there be none? A permutation test: if the
policies were alike, their results could be swapped within any session without a trace.

Shapes: N examples, U units (sessions), F columns, B resamples.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dpo.data.kinds import PolicyKind
from dpo.errors import InputError
from dpo.eval.bootstrap import BootstrapOptions, ConfidenceInterval, Statistic, bootstrap
from dpo.eval.evaluation import (
    EvaluationOptions,
    EvaluationResult,
    evaluate_decided,
    prepare_log,
)
from dpo.eval.examples import as_examples
from dpo.eval.metrics import METRICS, Decided, Metric, Subject, decide_examples
from dpo.eval.policies import Action, Policy, RulesPolicy
from dpo.eval.resampling import Floats, make_units
from dpo.eval.significance import (
    McNemar,
    holm,
    mcnemar,
    smallest_detectable,
    swap_p_value,
)

SHOWN_DISAGREEMENTS = 50
Winner = Literal["A", "B", "tie"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of B minus that of A."""

    interval: ConfidenceInterval
    p_value: float
    """Two-sided, of the permutation test."""
    adjusted_p_value: float
    """The same after Holm's correction for having looked at every metric."""
    smallest_detectable: float
    """Difference that a sample like this one finds with a power of 80%."""
    is_better_higher: bool

    def is_significant(self, p_value: float) -> bool:
        """Tell whether the interval excludes zero and ``p_value`` is below its level."""
        return self.interval.excludes(0.0) and p_value <= 1.0 - self.interval.confidence


@dataclass(frozen=True, slots=True)
class Improvements:
    """B minus A."""

    accuracy: float
    avg_reward: float | None
    """None where the log does not tell the reward of one of the two."""
    f1: float


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An example on which the policies choose different actions."""

    id: str
    state: Mapping[str, object]
    logged_action: str
    reward: float
    action_a: str
    action_b: str


@dataclass(frozen=True, slots=True)
class PolicyComparison:
    """Two policies on the same examples."""

    policy_a: EvaluationResult
    policy_b: EvaluationResult
    metric: str
    """What the winner is decided by."""
    winner: Winner
    """"tie" unless the metric's interval excludes zero and the permutation test agrees."""
    verdict: str
    """Why, in a sentence; for a tie with the difference that could have been found."""
    improvements: Improvements
    differences: Mapping[str, Difference]
    """By metric; without those that cannot be estimated."""
    mcnemar: McNemar
    """Of accuracy; takes examples as independent."""
    disagreements: tuple[Disagreement, ...]
    """The first examples on which the policies differ."""
    disagreement_count: int
    """How many there are in all."""


def compare_policies(
    policy_a: Policy,
    policy_b: Policy,
    test_data: Iterable[object],
    options: EvaluationOptions | None = None,
    *,
    metric: str = "avg_reward",
) -> PolicyComparison:
    """Compare two policies on the same logged decisions.

    Args:
        policy_a: the one to start from.
        policy_b: the one that may be better.
        test_data: as in ``evaluate_policy``.
        options: None means the defaults.
        metric: one of ``METRICS``, which decides the winner.

    Raises:
        InputError: another metric, policies of different kinds, or as ``evaluate_policy``.

    Example:
        >>> from dpo import build_extraction_dataset, compare_policies
        >>> from dpo.data.kinds.extraction import EXTRACTION
        >>> from dpo.eval.policies import RulesPolicy, UniformPolicy
        >>> dataset = build_extraction_dataset("feedback.db", split_by="group")
        >>> chance, rules = UniformPolicy(EXTRACTION), RulesPolicy(EXTRACTION)
        >>> compare_policies(chance, rules, dataset.eval).winner
        'B'
    """
    check_metric(metric)
    options = options or EvaluationOptions()
    a, b = decide_together((policy_a, policy_b), test_data, options)
    evaluation_a, evaluation_b = evaluate_decided(a, options), evaluate_decided(b, options)
    differences = paired_differences(a, b, options.bootstrap)
    verdict = (
        judge(metric, differences[metric])
        if metric in differences
        else Verdict("tie", f"{metric} cannot be compared: {_why_not(a, b)}")
    )
    differing = [
        index
        for index, (left, right) in enumerate(zip(a.decisions, b.decisions, strict=True))
        if left.action != right.action
    ]
    value_a, value_b = evaluation_a.avg_reward, evaluation_b.avg_reward
    return PolicyComparison(
        policy_a=evaluation_a,
        policy_b=evaluation_b,
        metric=metric,
        winner=verdict.winner,
        verdict=verdict.reason,
        improvements=Improvements(
            accuracy=evaluation_b.accuracy - evaluation_a.accuracy,
            avg_reward=None if value_a is None or value_b is None else value_b - value_a,
            f1=evaluation_b.f1 - evaluation_a.f1,
        ),
        differences=differences,
        mcnemar=mcnemar(a.is_right, b.is_right),
        disagreements=tuple(_disagreement(a, b, i) for i in differing[:SHOWN_DISAGREEMENTS]),
        disagreement_count=len(differing),
    )


def compare_with_baseline(
    policy: Policy,
    test_data: Iterable[object],
    options: EvaluationOptions | None = None,
    *,
    metric: str = "avg_reward",
) -> PolicyComparison:
    """Compare a policy, as B, with the rules of its kind, as A.

    Raises:
        InputError: as ``compare_policies``.
    """
    return compare_policies(RulesPolicy(policy.kind), policy, test_data, options, metric=metric)


def paired_differences(a: Decided, b: Decided, options: BootstrapOptions) -> dict[str, Difference]:
    """Return B minus A of every metric that both allow.

    Raises:
        InputError: as ``bootstrap``.
    """
    names = [name for name in METRICS if not (name == "avg_reward" and (a.refusal or b.refusal))]
    metrics = {name: METRICS[name] for name in names}
    return metric_differences(metrics, a, b, options, groups=a.log.groups)


def metric_differences(
    metrics: Mapping[str, Metric[Subject]],
    a: Subject,
    b: Subject,
    options: BootstrapOptions,
    *,
    groups: Sequence[str] | None = None,
) -> dict[str, Difference]:
    """Return B minus A of each metric that is defined, p-values adjusted for their number.

    Raises:
        InputError: as ``bootstrap``.
    """
    found = {
        name: metric_difference(metric, a, b, options, groups=groups)
        for name, metric in metrics.items()
    }
    defined = {name: each for name, each in found.items() if not math.isnan(each.interval.mean)}
    adjusted = holm([each.p_value for each in defined.values()])
    return {
        name: replace(each, adjusted_p_value=p_value)
        for (name, each), p_value in zip(defined.items(), adjusted, strict=True)
    }


def metric_difference(
    metric: Metric[Subject],
    a: Subject,
    b: Subject,
    options: BootstrapOptions,
    *,
    groups: Sequence[str] | None = None,
) -> Difference:
    """Return B minus A of one metric; its p-value is not adjusted.

    Raises:
        InputError: as ``bootstrap``.
    """
    both = np.concatenate([metric.columns(a), metric.columns(b)], axis=1)  # (N, 2 F)
    statistic = difference_of(metric.statistic)
    interval = bootstrap(both, statistic, options, groups=groups)[0]
    p_value = swap_p_value(
        make_units(both, groups).table,
        metric.statistic,
        permutations=options.resamples,
        seed=options.seed,
    )
    return Difference(
        interval=interval,
        p_value=p_value,
        adjusted_p_value=p_value,
        smallest_detectable=smallest_detectable(interval),
        is_better_higher=metric.is_better_higher,
    )


def difference_of(statistic: Statistic) -> Statistic:
    """Return the statistic of A's and B's sums side by side (B, 2 F) that is B's minus A's."""

    def difference(sums: Floats) -> Floats:
        half = sums.shape[1] // 2
        return statistic(sums[:, half:]) - statistic(sums[:, :half])

    return difference


def check_metric(metric: str) -> None:
    """Refuse a name that is not in ``METRICS``.

    Raises:
        InputError: it is not.
    """
    if metric not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")


def decide_together(
    policies: Sequence[Policy], test_data: Iterable[object], options: EvaluationOptions
) -> list[Decided]:
    """Let every policy decide the same examples.

    Raises:
        InputError: policies of different kinds, or as ``evaluate_policy``.
    """
    kinds = list(dict.fromkeys(policy.kind.name for policy in policies))
    if len(kinds) > 1:
        raise InputError(f"policies of different kinds cannot be compared: {' and '.join(kinds)}")
    examples = as_examples(test_data, policies[0].kind)
    log = prepare_log(policies[0], examples, options)
    return [decide_examples(policy, examples, log) for policy in policies]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who wins, and why, in a sentence."""

    winner: Winner
    reason: str


def judge(metric: str, found: Difference) -> Verdict:
    """Name a winner only where the interval excludes zero and the permutation test agrees."""
    interval = found.interval
    what = f"{metric.replace('_', ' ')} of B minus A is {_signed(interval)}"
    if interval.standard_error == 0.0 and interval.mean == 0.0:
        return Verdict("tie", f"{what}: the policies are alike on every example")
    if not interval.excludes(0.0):
        return Verdict(
            "tie",
            f"{what}, which zero fits; a true difference of {found.smallest_detectable:.4f} would "
            "have been found with a power of 80%",
        )
    if not found.is_significant(found.p_value):
        return Verdict(
            "tie",
            f"{what}, but p = {found.p_value:.4f} in the permutation test: too few examples differ",
        )
    winner: Winner = "B" if (interval.mean > 0.0) == found.is_better_higher else "A"
    return Verdict(winner, f"{what}, p = {found.p_value:.4f}")


def _why_not(a: Decided, b: Decided) -> str:
    refusals = [
        f"{name} ({each.policy}): {each.refusal}"
        for name, each in (("A", a), ("B", b))
        if each.refusal
    ]
    return "; ".join(refusals) or "it is undefined on these examples"


def _signed(interval: ConfidenceInterval) -> str:
    ends = f"[{interval.lower:+.4f}, {interval.upper:+.4f}]"
    return f"{interval.mean:+.4f}, {interval.confidence:.0%} interval {ends}"


def _disagreement(a: Decided, b: Decided, index: int) -> Disagreement:
    kind, example = a.kind, a.examples[index]
    return Disagreement(
        id=example.id,
        state=kind.state_to_json(example.state),
        logged_action=_one_line(kind, example.expected_action),
        reward=example.reward,
        action_a=_one_line(kind, a.decisions[index].action),
        action_b=_one_line(kind, b.decisions[index].action),
    )


def _one_line(kind: PolicyKind, action: Action) -> str:
    return json.dumps(kind.action_to_json(action), ensure_ascii=False)
