"""Several policies in one table, and policies on different halves of the examples (an A/B test).

Shapes: N examples, U units (sessions), F columns.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpo.errors import InputError
from dpo.eval.bootstrap import BootstrapOptions, ConfidenceInterval, bootstrap
from dpo.eval.comparison import (
    Difference,
    Winner,
    check_metric,
    decide_together,
    difference_of,
    metric_difference,
)
from dpo.eval.evaluation import EvaluationOptions
from dpo.eval.metrics import METRICS, Decided
from dpo.eval.policies import Policy
from dpo.eval.resampling import make_units
from dpo.eval.significance import holm, relabel_p_value


@dataclass(frozen=True, slots=True)
class RankedPolicy:
    """One line of a ranking."""

    policy: str
    estimate: ConfidenceInterval | None
    """The metric; None where ``refusal`` says why."""
    behind_best: Difference | None
    """The best policy minus this one; p-values are adjusted for the number of policies. None for
    the best itself and where there is no estimate."""
    is_tied_with_best: bool
    """Whether the difference could be chance; said a little too rarely, since the best is chosen by
    the same data."""
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Policies from the best to the worst, those without an estimate last."""

    metric: str
    examples: int
    policies: tuple[RankedPolicy, ...]


def rank_policies(
    policies: Sequence[Policy],
    test_data: Iterable[object],
    options: EvaluationOptions | None = None,
    *,
    metric: str = "avg_reward",
) -> Ranking:
    """Rank policies by one metric on the same logged decisions.

    Raises:
        InputError: fewer than two policies, two of one name, or as ``compare_policies``.
    """
    check_metric(metric)
    names = [policy.name for policy in policies]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"a ranking needs two or more policies of different names, got {names}")
    options = options or EvaluationOptions()
    every = decide_together(policies, test_data, options)
    usable = [each for each in every if not _is_refused(each, metric)]
    everything = np.ones(len(every[0].examples), dtype=np.bool_)
    estimates = {
        each.policy: _estimate(each, metric, options.bootstrap, everything) for each in usable
    }
    sign = 1.0 if METRICS[metric].is_better_higher else -1.0
    usable.sort(key=lambda each: -sign * estimates[each.policy].mean)
    found = [
        metric_difference(
            METRICS[metric], each, usable[0], options.bootstrap, groups=each.log.groups
        )
        for each in usable[1:]
    ]
    adjusted = holm([each.p_value for each in found])
    behind: list[Difference | None] = [None] if usable else []
    behind += [
        replace(each, adjusted_p_value=p_value)
        for each, p_value in zip(found, adjusted, strict=True)
    ]
    lines = [
        RankedPolicy(
            policy=each.policy,
            estimate=estimates[each.policy],
            behind_best=gap,
            is_tied_with_best=gap is None or not gap.is_significant(gap.adjusted_p_value),
        )
        for each, gap in zip(usable, behind, strict=True)
    ]
    lines += [
        RankedPolicy(each.policy, None, None, is_tied_with_best=False, refusal=each.refusal)
        for each in every
        if _is_refused(each, metric)
    ]
    return Ranking(metric, len(every[0].examples), tuple(lines))


@dataclass(frozen=True, slots=True)
class ABTest:
    """Two policies, each on sessions of its own."""

    metric: str
    examples_a: int
    examples_b: int
    a: ConfidenceInterval
    b: ConfidenceInterval
    difference: ConfidenceInterval
    """B minus A, each side resampled on its own."""
    p_value: float
    """Two-sided, of labelling the sessions again at random."""
    effect_size: float | None
    """Cohen's d: the difference over the pooled standard deviation of one example, as the standard
    errors imply it; None where that is 0 or unknown."""
    winner: Winner
    """"tie" unless the interval excludes zero and the p-value agrees."""


def ab_test(
    policy_a: Policy,
    policy_b: Policy,
    test_data: Iterable[object],
    options: EvaluationOptions | None = None,
    *,
    metric: str = "avg_reward",
    split_ratio: float = 0.5,
) -> ABTest:
    """Deal the sessions to two policies at random and compare the results.

    ``compare_policies`` sees much smaller differences on the same data, since it lets both decide
    every example. This is for rehearsing a live test, where that cannot be.

    Args:
        policy_a: decides the first part.
        policy_b: decides the rest.
        test_data: as in ``evaluate_policy``.
        options: None means the defaults.
        metric: one of ``METRICS``.
        split_ratio: share of the sessions that A gets, in (0, 1).

    Raises:
        InputError: a ratio that leaves a side fewer than two sessions, a policy whose reward cannot
            be estimated, or as ``compare_policies``.
    """
    check_metric(metric)
    if not 0.0 < split_ratio < 1.0:
        raise InputError(f"split_ratio must be between 0 and 1, both excluded, got {split_ratio}")
    options = options or EvaluationOptions()
    a, b = decide_together((policy_a, policy_b), test_data, options)
    for each in (a, b):
        if _is_refused(each, metric):
            raise InputError(f"{metric} of {each.policy} cannot be estimated: {each.refusal}")
    kind, ways, groups = METRICS[metric], options.bootstrap, a.log.groups
    is_b = _deal(groups, split_ratio, ways.seed)  # (N,)
    as_a, as_b = kind.columns(a), kind.columns(b)  # (N, F)
    seen = np.where(is_b[:, None], as_b, as_a)  # (N, F): what the example's own side makes of it
    sides = np.concatenate([seen * ~is_b[:, None], seen * is_b[:, None]], axis=1)  # (N, 2 F)
    statistic = difference_of(kind.statistic)
    difference = bootstrap(sides, statistic, ways, groups=groups, strata=is_b.tolist())[0]
    p_value = relabel_p_value(
        make_units(seen, groups).table,
        make_units(is_b[:, None].astype(np.float64), groups).table[:, 0] > 0.0,
        kind.statistic,
        permutations=ways.resamples,
        seed=ways.seed,
    )
    winner: Winner = "tie"
    if difference.excludes(0.0) and p_value <= 1.0 - difference.confidence:
        winner = "B" if (difference.mean > 0.0) == kind.is_better_higher else "A"
    own_a, own_b = _estimate(a, metric, ways, ~is_b), _estimate(b, metric, ways, is_b)
    return ABTest(
        metric=metric,
        examples_a=own_a.n,
        examples_b=own_b.n,
        a=own_a,
        b=own_b,
        difference=difference,
        p_value=p_value,
        effect_size=_effect_size(own_a, own_b),
        winner=winner,
    )


def _deal(groups: Sequence[str], split_ratio: float, seed: int) -> NDArray[np.bool_]:
    """Deal whole groups to two sides at random: (N,), true for the second side."""
    names = list(dict.fromkeys(groups))
    first = round(len(names) * split_ratio)
    if min(first, len(names) - first) < 2:
        raise InputError(
            f"split_ratio {split_ratio} of {len(names)} sessions leaves a side fewer than two"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = {names[index] for index in order[first:]}
    return np.array([group in chosen for group in groups])


def _effect_size(a: ConfidenceInterval, b: ConfidenceInterval) -> float | None:
    spread = math.sqrt((a.standard_error**2 * a.n + b.standard_error**2 * b.n) / 2.0)
    return (b.mean - a.mean) / spread if spread > 0.0 else None


def _is_refused(decided: Decided, metric: str) -> bool:
    return metric == "avg_reward" and decided.refusal is not None


def _estimate(
    decided: Decided, metric: str, options: BootstrapOptions, keep: NDArray[np.bool_]
) -> ConfidenceInterval:
    columns = METRICS[metric].columns(decided)[keep]
    groups = [group for group, is_kept in zip(decided.log.groups, keep, strict=True) if is_kept]
    return bootstrap(columns, METRICS[metric].statistic, options, groups=groups)[0]
