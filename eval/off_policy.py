"""What a policy would have earned, estimated from what another policy did (off-policy evaluation).

The log tells what the logged action earned, never what another one would have. Four estimates:

- *direct*: a model of the reward, fitted on the log, asked about the policy's actions;
- *IPS*: logged rewards, weighted by how much likelier the policy takes the logged action than the
  log did, weights cut at sqrt(N) (Ionides 2008);
- *SNIPS*: the same over the sum of the weights instead of N (Swaminathan & Joachims 2015);
- *doubly robust*: direct, plus the weighted mean error of the model on the log (Dudik et al. 2011,
  self-normalised as SNIPS is); right if either the chances or the model are.

No number is given where the log says too little about the policy's choices (see ``refusal``).

Shapes: N examples, A arms (the actions, or action classes, that are told apart), P features.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dpo.data.kinds import PolicyKind
from dpo.errors import InputError
from dpo.eval.bootstrap import DEFAULTS, BootstrapOptions, ConfidenceInterval, bootstrap, divide
from dpo.eval.examples import EvaluationExample
from dpo.eval.nuisance import (
    estimated_propensities,
    expected_rewards,
    make_folds,
    state_features,
)
from dpo.eval.policies import Action, PolicyDecision
from dpo.eval.resampling import Floats, Integers
from dpo.files import JSON

Arms = Literal["action", "class"]
PropensitySource = Literal["logged", "estimated"]

ARMS: tuple[Arms, ...] = get_args(Arms)
OTHER = "other"  # what a policy does that is neither offered nor in the log
MIN_EFFECTIVE = 30.0  # effective sample size below which no number is given
MIN_COVERAGE = 0.9  # share of the policy's choices that the log must have been able to make
MAX_MEAN_WEIGHT = 1.5  # weights average 1 if the chances are right and the policy is ignorant


@dataclass(frozen=True, slots=True)
class DecisionLog:
    """The log as every policy's estimate needs it; made once by ``make_log`` and shared."""

    kind: PolicyKind
    """Of the decisions."""
    apart: Arms
    """What makes two arms different."""
    arms: tuple[str, ...]
    """A keys: the arms that occur in the log, those that the kind offers, and ``OTHER``."""
    taken: Integers
    """(N,) index of the arm the log took."""
    rewards: Floats
    """(N,) what it earned."""
    propensities: Floats
    """(N,) the chance with which the log took it, in (0, 1]."""
    propensity_source: PropensitySource
    """Whether all chances were logged, or all are estimated because some were not."""
    expected: Floats
    """(N, A) cross-fitted expected reward of each arm."""
    groups: tuple[str, ...]
    """(N,) keys of the groups (sessions) within which examples are not independent."""


@dataclass(frozen=True, slots=True)
class OffPolicyValue:
    """Estimates of a policy's mean reward; all None where ``refusal`` says why."""

    doubly_robust: ConfidenceInterval | None
    """The estimate to use; the other three are shown so that disagreement is seen."""
    direct: float | None
    """Without an interval: the error of a reward model does not show in its own predictions."""
    ips: ConfidenceInterval | None
    """None as well where propensities are estimated: its interval would know nothing of their
    error, which the doubly robust estimate corrects to first order."""
    snips: ConfidenceInterval | None
    """None where ``ips`` is."""
    reward_std_dev: float | None
    """Standard deviation of the rewards under the policy, self-normalised."""
    effective_sample_size: float
    """(sum of weights)^2 / (sum of squared weights): examples that the estimate rests on."""
    coverage: float
    """Mean weight, at most 1: the share of the policy's choices that the log could have made."""
    largest_weight: float
    """Before weights are cut at sqrt(N)."""
    cut_share: float
    """Share of the examples whose weight was cut."""
    propensity_source: PropensitySource
    refusal: str | None = None
    """Why there are no numbers: what is too small, and by how much."""


def make_log(
    examples: Sequence[EvaluationExample],
    kind: PolicyKind,
    groups: Sequence[str],
    *,
    arms: Arms = "action",
    seed: int = 0,
) -> DecisionLog:
    """Prepare logged decisions: arms, chances, and cross-fitted expected rewards.

    Args:
        examples: N logged decisions.
        kind: theirs.
        groups: (N,) keys; examples of one group (session) are not independent.
        arms: "action" tells all actions apart (ids left out), "class" only their classes, which
            needs rewards that depend on the class alone, and logged chances of classes if any.
        seed: of the folds of the cross-fitting.

    Raises:
        InputError: fewer than two groups, or another value of ``arms``.
    """
    if arms not in ARMS:
        raise InputError(f"arms must be one of {', '.join(ARMS)}, got {arms!r}")
    if len(set(groups)) < 2:
        raise InputError(f"off-policy values need at least two groups, got {len(set(groups))}")
    keys = [arm_key(kind, example.expected_action, arms) for example in examples]
    offered = [arm_key(kind, action, arms) for action in kind.actions()]
    names = tuple(dict.fromkeys([*offered, *keys, OTHER]))
    index = {name: i for i, name in enumerate(names)}
    taken = np.array([index[key] for key in keys], dtype=np.int64)  # (N,)
    rewards = np.array([example.reward for example in examples], dtype=np.float64)
    features = state_features(_with_rules(example, kind, arms) for example in examples)  # (N, P)
    folds = make_folds(groups, seed)
    logged = [example.propensity for example in examples if example.propensity is not None]
    is_logged = len(logged) == len(examples)
    return DecisionLog(
        kind=kind,
        apart=arms,
        arms=names,
        taken=taken,
        rewards=rewards,
        propensities=(
            np.array(logged)
            if is_logged
            else estimated_propensities(features, taken, folds, arm_count=len(names))
        ),
        propensity_source="logged" if is_logged else "estimated",
        expected=expected_rewards(features, taken, rewards, folds, arm_count=len(names)),
        groups=tuple(groups),
    )


def _with_rules(example: EvaluationExample, kind: PolicyKind, arms: Arms) -> dict[str, JSON]:
    """Return a state with what the rules say of it: logs are often made by them."""
    baseline = kind.baseline(example.state)
    return {
        **kind.state_to_json(example.state),
        "rule": baseline.reason,
        "baseline": arm_key(kind, baseline.action, arms),
    }


@functools.lru_cache(maxsize=4096)
def arm_key(kind: PolicyKind, action: Action, arms: Arms) -> str:
    """Return what tells the action apart: its class, or its JSON without ids.

    Ids are the fields that none of ``kind.actions()`` sets.
    """
    if arms == "class":
        return kind.action_class(action)
    fields = kind.action_to_json(action)
    return json.dumps({name: fields[name] for name in sorted(fields.keys() & _offered(kind))})


@functools.cache
def _offered(kind: PolicyKind) -> frozenset[str]:
    return frozenset(name for action in kind.actions() for name in kind.action_to_json(action))


def policy_chances(log: DecisionLog, decisions: Sequence[PolicyDecision]) -> Floats:
    """Return the chance with which the policy takes each arm, for each example: (N, A)."""
    index = {name: i for i, name in enumerate(log.arms)}
    offered = [index[arm_key(log.kind, action, log.apart)] for action in log.kind.actions()]
    chances = np.zeros((len(decisions), len(log.arms)))
    for row, decision in zip(chances, decisions, strict=True):
        if decision.probabilities is None:
            row[index.get(arm_key(log.kind, decision.action, log.apart), index[OTHER])] = 1.0
        else:
            np.add.at(row, offered, decision.probabilities)
    return chances


def estimate_value(
    log: DecisionLog, chances: Floats, options: BootstrapOptions = DEFAULTS
) -> OffPolicyValue:
    """Estimate the mean reward of the policy that takes arms with ``chances`` (N, A).

    Raises:
        InputError: as ``bootstrap``.
    """
    uncut = importance_weights(log, chances)
    weights = np.minimum(uncut, np.sqrt(len(uncut)))
    refusal = overlap_refusal(uncut)
    intervals: list[ConfidenceInterval | None] = [None] * 3
    direct = deviation = None
    if refusal is None:
        columns = np.concatenate(
            [robust_columns(log, chances), (weights * log.rewards)[:, None]], axis=1
        )  # (N, 5)
        intervals = list(bootstrap(columns, _estimates, options, groups=log.groups))
        direct = float((chances * log.expected).sum(axis=1).mean())
        around = weights @ log.rewards / weights.sum()
        deviation = float(np.sqrt(weights @ (log.rewards - around) ** 2 / weights.sum()))
    robust, ips, snips = intervals
    if log.propensity_source == "estimated":
        ips = snips = None
    return OffPolicyValue(
        doubly_robust=robust,
        direct=direct,
        ips=ips,
        snips=snips,
        reward_std_dev=deviation,
        effective_sample_size=effective_size(weights),
        coverage=min(float(weights.mean()), 1.0),
        largest_weight=float(uncut.max()),
        cut_share=float((uncut > weights).mean()),
        propensity_source=log.propensity_source,
        refusal=refusal,
    )


def robust_columns(log: DecisionLog, chances: Floats) -> Floats:
    """Return what ``robust_value`` needs: direct estimate, 1, weighted error, weight: (N, 4)."""
    rows = np.arange(len(log.taken))
    weights = np.minimum(importance_weights(log, chances), np.sqrt(len(rows)))
    direct = (chances * log.expected).sum(axis=1)
    errors = log.rewards - log.expected[rows, log.taken]
    return np.stack([direct, np.ones(len(rows)), weights * errors, weights], axis=1)


def robust_value(sums: Floats) -> Floats:
    """Map sums of ``robust_columns`` (B, 4) to the doubly robust estimate: (B, 1)."""
    return divide(sums[:, :1], sums[:, 1:2]) + divide(sums[:, 2:3], sums[:, 3:4])


def _estimates(sums: Floats) -> Floats:
    """Map (B, 5) sums to the doubly robust, IPS and SNIPS estimates: (B, 3)."""
    count, weights, weighted = sums[:, 1:2], sums[:, 3:4], sums[:, 4:5]
    return np.concatenate([robust_value(sums), weighted / count, divide(weighted, weights)], axis=1)


def importance_weights(log: DecisionLog, chances: Floats) -> Floats:
    """Return chance of the policy over chance of the log, for the arm taken: (N,), not cut."""
    return np.asarray(chances[np.arange(len(log.taken)), log.taken] / log.propensities)


def effective_size(weights: Floats) -> float:
    """Return the number of equally weighted examples with the same variance (Kish 1965)."""
    squares = float(weights @ weights)
    return float(weights.sum()) ** 2 / squares if squares > 0.0 else 0.0


def overlap_refusal(uncut: Floats) -> str | None:
    """Say why weights (N,) are too few or too uneven for an estimate; None if they are not."""
    weights = np.minimum(uncut, np.sqrt(len(uncut)))
    effective, coverage = effective_size(weights), float(weights.mean())
    error = float(weights.std()) / np.sqrt(len(weights))
    if effective < MIN_EFFECTIVE:
        return (
            f"the log rarely took the actions that the policy takes: effective sample size "
            f"{effective:.1f} of {len(weights)} examples, at least {MIN_EFFECTIVE:.0f} are needed"
        )
    if coverage + 2.0 * error < MIN_COVERAGE:
        return (
            f"the log could have made only {coverage:.0%} of the policy's choices, "
            f"at least {MIN_COVERAGE:.0%} are needed"
        )
    if coverage - 3.0 * error > MAX_MEAN_WEIGHT:
        return (
            f"the weights average {coverage:.2f} instead of 1: the propensities are wrong, or the "
            "policy has seen what the log did here"
        )
    return None
