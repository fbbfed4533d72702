"""Off-policy value: by hand, against known truths, and refused where the log does not tell."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dpo.data.kinds import KINDS
from dpo.data.simulate import simulate, true_value
from dpo.errors import InputError
from dpo.eval.bootstrap import BootstrapOptions
from dpo.eval.examples import EvaluationExample, as_examples
from dpo.eval.nuisance import expected_rewards, make_folds, state_features
from dpo.eval.off_policy import (
    DecisionLog,
    OffPolicyValue,
    arm_key,
    effective_size,
    estimate_value,
    make_log,
    policy_chances,
    robust_columns,
    robust_value,
)
from dpo.eval.policies import ConstantPolicy, PolicyDecision, RulesPolicy, UniformPolicy
from dpo.eval.resampling import Floats

EXTRACTION, CONSOLIDATION = KINDS["extraction"], KINDS["consolidation"]
FEW = BootstrapOptions(resamples=200)


def _log(
    taken: Sequence[int],
    rewards: Sequence[float],
    propensities: Sequence[float],
    expected: Floats | None = None,
) -> DecisionLog:
    return DecisionLog(
        kind=EXTRACTION,
        apart="action",
        arms=("a", "b", "other"),
        taken=np.array(taken),
        rewards=np.array(rewards),
        propensities=np.array(propensities),
        propensity_source="logged",
        expected=np.zeros((len(taken), 3)) if expected is None else expected,
        groups=tuple(map(str, range(len(taken)))),
    )


def _examples(kind: str, count: int, seed: int, *, keep: bool = True) -> list[EvaluationExample]:
    examples = as_examples(simulate(kind, count, seed), KINDS[kind])
    return [each if keep else replace(each, propensity=None) for each in examples]


def test_estimates_by_hand() -> None:
    # always arm a; the log took a half of the time. Weights 2, 0, 2, 0, ...
    log = _log([0, 1] * 100, [1.0, -1.0] * 100, [0.5] * 200)
    chances = np.array([[1.0, 0.0, 0.0]] * 200)
    found = estimate_value(log, chances, FEW)
    assert found.refusal is None
    assert found.ips is not None
    assert found.snips is not None
    assert found.ips.mean == pytest.approx(1.0)
    assert found.snips.mean == pytest.approx(1.0)
    assert found.direct == 0.0
    assert (found.coverage, found.largest_weight, found.cut_share) == (1.0, 2.0, 0.0)
    assert found.effective_sample_size == pytest.approx(100.0)
    assert found.reward_std_dev == pytest.approx(0.0)


def test_unequal_weights_a_cut_one_and_a_model_by_hand() -> None:
    # arm a always: 98 weights of 1.25, one of 20 that is cut at sqrt(100), one of 0
    expected = np.tile([0.3, 0.1, 0.0], (100, 1))
    log = _log([0] * 99 + [1], [0.5] * 98 + [-1.0, 0.25], [0.8] * 98 + [0.05, 0.2], expected)
    found = estimate_value(log, np.array([[1.0, 0.0, 0.0]] * 100), FEW)
    assert found.ips is not None
    assert found.snips is not None
    assert found.doubly_robust is not None
    weights, rewards = 98 * 1.25 + 10.0, 98 * 1.25 * 0.5 - 10.0
    assert found.largest_weight == pytest.approx(20.0)
    assert found.cut_share == 0.01
    assert found.coverage == 1.0
    assert found.effective_sample_size == pytest.approx(weights**2 / (98 * 1.25**2 + 100))
    assert found.direct == pytest.approx(0.3)
    assert found.ips.mean == pytest.approx(rewards / 100)
    assert found.snips.mean == pytest.approx(rewards / weights)
    errors = 98 * 1.25 * (0.5 - 0.3) + 10 * (-1.0 - 0.3)
    assert found.doubly_robust.mean == pytest.approx(0.3 + errors / weights)
    around = rewards / weights
    squares = 98 * 1.25 * (0.5 - around) ** 2 + 10 * (-1.0 - around) ** 2
    assert found.reward_std_dev == pytest.approx(np.sqrt(squares / weights))


def test_doubly_robust_value_by_hand() -> None:
    # direct .2 and .3; where the log took the same arm, reward .5 against .2 in the model; the
    # weight of 2 is cut at sqrt(2)
    expected = np.array([[0.2, 0.0, 0.0], [0.3, 0.1, 0.0]])
    log = _log([0, 1], [0.5, 0.9], [0.5, 0.5], expected)
    columns = robust_columns(log, np.array([[1.0, 0.0, 0.0]] * 2))
    cut = np.sqrt(2)
    assert columns[0].tolist() == pytest.approx([0.2, 1.0, cut * 0.3, cut])
    assert columns[1].tolist() == pytest.approx([0.3, 1.0, 0.0, 0.0])
    assert robust_value(columns.sum(axis=0)[None])[0, 0] == pytest.approx(0.25 + 0.3)


def test_a_policy_like_the_log_earns_what_the_log_earned() -> None:
    rewards = np.random.default_rng(0).uniform(-1, 1, size=100)
    log = _log([0, 1] * 50, rewards.tolist(), [0.5] * 100)
    found = estimate_value(log, np.array([[0.5, 0.5, 0.0]] * 100), FEW)
    assert found.ips is not None
    assert found.snips is not None
    assert found.doubly_robust is not None
    means = [found.ips.mean, found.snips.mean, found.doubly_robust.mean]
    assert means == pytest.approx([rewards.mean()] * 3)
    assert found.reward_std_dev == pytest.approx(rewards.std())


def test_doubly_robust_needs_no_chances_where_the_model_is_exact() -> None:
    generator = np.random.default_rng(3)
    expected = generator.uniform(-1, 1, size=(400, 3))
    taken = generator.integers(0, 2, size=400)
    rewards = expected[np.arange(400), taken]
    log = _log(
        taken.tolist(), rewards.tolist(), generator.uniform(0.2, 0.9, 400).tolist(), expected
    )
    chances = np.tile([1.0, 0.0, 0.0], (400, 1))
    columns = robust_columns(log, chances)
    assert columns[:, 2] == pytest.approx(np.zeros(400))
    assert robust_value(columns.sum(axis=0)[None])[0, 0] == pytest.approx(expected[:, 0].mean())


def test_too_few_matching_decisions_are_refused() -> None:
    log = _log([0] * 10 + [1] * 90, [0.5] * 100, [0.1] * 10 + [0.9] * 90)
    found = estimate_value(log, np.array([[1.0, 0.0, 0.0]] * 100), FEW)
    assert found.refusal is not None
    assert "effective sample size 10.0 of 100 examples, at least 30 are needed" in found.refusal
    figures = (found.doubly_robust, found.direct, found.ips, found.snips, found.reward_std_dev)
    assert figures == (None,) * 5


def test_choices_that_the_log_could_not_make_are_refused() -> None:
    # the log always takes a; the policy takes b half of the time
    log = _log([0] * 200, [0.5] * 200, [1.0] * 200)
    found = estimate_value(log, np.array([[0.5, 0.5, 0.0]] * 200), FEW)
    assert found.coverage == 0.5
    assert found.refusal == (
        "the log could have made only 50% of the policy's choices, at least 90% are needed"
    )


def test_a_deterministic_log_tells_nothing_about_a_policy_that_differs() -> None:
    rules, examples = RulesPolicy(EXTRACTION), _examples("extraction", 300, 0, keep=False)
    logged = [replace(each, expected_action=rules.decide(each.state).action) for each in examples]
    log = make_log(logged, EXTRACTION, [each.session_id for each in logged])
    constant = ConstantPolicy(EXTRACTION, EXTRACTION.actions()[1])
    decisions = [constant.decide(each.state) for each in logged]
    assert log.propensity_source == "estimated"
    assert estimate_value(log, policy_chances(log, decisions), FEW).refusal is not None


def test_no_matching_decision_at_all_is_refused() -> None:
    log = _log([0] * 50, [0.5] * 50, [0.5] * 50)
    found = estimate_value(log, np.array([[0.0, 1.0, 0.0]] * 50), FEW)
    assert (found.effective_sample_size, found.coverage) == (0.0, 0.0)
    assert found.refusal is not None


def test_effective_size_of_equal_weights_is_their_number() -> None:
    assert effective_size(np.full(7, 3.0)) == pytest.approx(7.0)


def test_ids_do_not_tell_actions_apart() -> None:
    one = CONSOLIDATION.parse_action({"action": "keep", "targetEntries": ["x"]}, "")
    two = CONSOLIDATION.parse_action({"action": "keep", "targetEntries": ["y"]}, "")
    assert arm_key(CONSOLIDATION, one, "action") == arm_key(CONSOLIDATION, two, "action")


def test_arms_are_actions_or_their_classes() -> None:
    low = EXTRACTION.parse_action({"decision": "store", "entryType": "tool", "priority": 20}, "")
    high = EXTRACTION.parse_action({"decision": "store", "entryType": "tool", "priority": 80}, "")
    assert arm_key(EXTRACTION, low, "action") != arm_key(EXTRACTION, high, "action")
    assert arm_key(EXTRACTION, low, "class") == arm_key(EXTRACTION, high, "class") == "store"


def test_unknown_arms_are_refused() -> None:
    with pytest.raises(InputError, match="arms must be one of action, class, got 'type'"):
        make_log(_examples("extraction", 5, 0), EXTRACTION, list("abcde"), arms="type")  # type: ignore[arg-type]


def test_one_group_is_refused() -> None:
    with pytest.raises(InputError, match="off-policy values need at least two groups, got 1"):
        make_log(_examples("extraction", 5, 0), EXTRACTION, ["s"] * 5)


def test_chances_are_those_of_the_decisions() -> None:
    examples = _examples("extraction", 40, 0)
    log = make_log(examples, EXTRACTION, [each.session_id for each in examples])
    uniform = UniformPolicy(EXTRACTION).decide(examples[0].state)
    unheard = replace(EXTRACTION.actions()[2], priority=99)
    decisions = [uniform, PolicyDecision(unheard, 1.0)]
    chances = policy_chances(log, decisions)
    assert chances.sum(axis=1).tolist() == pytest.approx([1.0, 1.0])
    assert chances[0, :25].tolist() == pytest.approx([1 / 25] * 25)
    assert chances[1, log.arms.index("other")] == 1.0


def test_weighting_alone_is_not_given_where_propensities_are_estimated() -> None:
    examples = _examples("extraction", 400, 0, keep=False)
    log = make_log(examples, EXTRACTION, [each.session_id for each in examples])
    rules = RulesPolicy(EXTRACTION)
    chances = policy_chances(log, [rules.decide(each.state) for each in examples])
    found = estimate_value(log, chances, FEW)
    assert found.doubly_robust is not None
    assert found.ips is None
    assert found.snips is None
    found = estimate_value(replace(log, propensity_source="logged"), chances, FEW)
    assert found.ips is not None


def test_estimated_chances_of_rare_actions_are_not_too_small() -> None:
    """An overfitted model of the log gave actions that it rarely took 1.6 times their weight."""
    examples = _examples("extraction", 2000, 1000)
    logged = np.array([each.propensity for each in examples], dtype=np.float64)
    bare = [replace(each, propensity=None) for each in examples]
    log = make_log(bare, EXTRACTION, [each.session_id for each in bare])
    ratios = logged / log.propensities
    is_rare = logged < 0.1
    assert 0.85 < ratios[is_rare].mean() < 1.15
    assert 0.85 < ratios[~is_rare].mean() < 1.3


def test_one_missing_propensity_makes_all_of_them_estimates() -> None:
    examples = _examples("extraction", 100, 0)
    groups = [each.session_id for each in examples]
    assert make_log(examples, EXTRACTION, groups).propensity_source == "logged"
    examples[3] = replace(examples[3], propensity=None)
    assert make_log(examples, EXTRACTION, groups).propensity_source == "estimated"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_logged", [True, False])
def test_the_simulated_value_of_the_rules_is_found(kind: str, is_logged: bool) -> None:
    examples = _examples(kind, 1500, 3, keep=is_logged)
    log = make_log(examples, KINDS[kind], [each.session_id for each in examples])
    rules = RulesPolicy(KINDS[kind])
    chances = policy_chances(log, [rules.decide(each.state) for each in examples])
    found = estimate_value(log, chances, FEW).doubly_robust
    truth = true_value(kind, lambda state: rules.decide(state).action)
    assert found is not None
    assert abs(found.mean - truth) < 3 * found.standard_error
    assert found.standard_error < (0.05 if is_logged else 0.15)


ARMS, FEATURES = 4, 3
WORLD = np.random.default_rng(5).normal(size=(FEATURES, ARMS))
TARGET = np.random.default_rng(7).normal(size=(FEATURES, ARMS))


def _target(features: Floats) -> Floats:
    best = (features @ TARGET).argmax(axis=1)
    chances: Floats = np.eye(ARMS)[best]
    return chances


def _world_rewards(features: Floats) -> Floats:
    return np.array(0.7 * np.tanh(features @ WORLD), dtype=np.float64)


def _bandit_value(seed: int, count: int) -> OffPolicyValue:
    """Estimate the target policy from a log that takes every arm with a chance of 0.1 or more."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, FEATURES))
    scores = np.exp(features @ WORLD)
    chances = 0.4 / ARMS + 0.6 * scores / scores.sum(axis=1, keepdims=True)
    taken = (generator.random((count, 1)) > chances.cumsum(axis=1)).sum(axis=1)
    rows = np.arange(count)
    means = _world_rewards(features)[rows, taken]
    rewards = np.where(generator.random(count) < (means + 1) / 2, 1.0, -1.0)
    inputs = state_features([dict(enumerate_names(row)) for row in features])
    folds = make_folds(rows.tolist(), seed)
    expected = expected_rewards(inputs, taken, rewards, folds, arm_count=ARMS + 1)
    log = replace(
        _log(taken.tolist(), rewards.tolist(), chances[rows, taken].tolist(), expected),
        arms=(*map(str, range(ARMS)), "other"),
    )
    policy = np.concatenate([_target(features), np.zeros((count, 1))], axis=1)
    return estimate_value(log, policy, BootstrapOptions(resamples=400, seed=seed))


def enumerate_names(row: Floats) -> list[tuple[str, float]]:
    return [(f"x{index}", float(value)) for index, value in enumerate(row)]


def _bandit_truth() -> float:
    features = np.random.default_rng(0).normal(size=(400_000, FEATURES))
    return float((_target(features) * _world_rewards(features)).sum(axis=1).mean())


@pytest.mark.parametrize(
    ("runs", "count"), [(40, 600), pytest.param(400, 1500, marks=pytest.mark.slow)]
)
def test_intervals_cover_the_true_value_at_their_rate(runs: int, count: int) -> None:
    truth = _bandit_truth()
    found = [_bandit_value(seed, count) for seed in range(runs)]
    intervals = [each.doubly_robust for each in found]
    covered = [each is not None and each.lower <= truth <= each.upper for each in intervals]
    errors = [each.mean - truth for each in intervals if each is not None]
    # 95%, less the three standard errors that so few runs leave
    assert np.mean(covered) > 0.945 - 3 * np.sqrt(0.95 * 0.05 / runs)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(runs)
