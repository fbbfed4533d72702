"""Comparing policies: winners, ties, and how often they are right."""

import functools
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.simulate import best_action, simulate, true_value
from dpo.errors import InputError
from dpo.eval.bootstrap import BootstrapOptions, ConfidenceInterval, ratio_of_sums
from dpo.eval.comparison import (
    Difference,
    compare_policies,
    compare_with_baseline,
    judge,
    metric_difference,
    metric_differences,
)
from dpo.eval.evaluation import EvaluationOptions
from dpo.eval.examples import EvaluationExample, as_examples
from dpo.eval.metrics import METRICS, Metric
from dpo.eval.policies import ConstantPolicy, PolicyDecision, RulesPolicy, UniformPolicy
from dpo.eval.report_text import format_comparison_report
from dpo.eval.resampling import Floats

EXTRACTION, CONSOLIDATION = KINDS["extraction"], KINDS["consolidation"]
SKIP = ConstantPolicy(EXTRACTION, EXTRACTION.actions()[0], "skip")
FEW = EvaluationOptions(bootstrap=BootstrapOptions(resamples=200))
MEAN: Metric[Floats] = Metric(
    lambda values: np.stack([values, np.ones(len(values))], axis=1), ratio_of_sums
)


def _examples(
    count: int = 300, seed: int = 0, kind: PolicyKind = EXTRACTION
) -> list[EvaluationExample]:
    return as_examples(simulate(kind.name, count, seed), kind)


class Best:
    """Knows the world of consolidation."""

    kind: PolicyKind = CONSOLIDATION
    name = "best"

    def decide(self, state: Any) -> PolicyDecision:
        return PolicyDecision(_best(state), 0.9)


@functools.cache
def _best(state: Any) -> Any:
    return best_action("consolidation", state)


def test_the_documents_example() -> None:
    rules, uniform = RulesPolicy(EXTRACTION), UniformPolicy(EXTRACTION)
    comparison = compare_policies(rules, uniform, _examples(800), FEW)
    assert comparison.winner == "A"
    assert comparison.improvements.accuracy == pytest.approx(
        comparison.policy_b.accuracy - comparison.policy_a.accuracy
    )
    assert comparison.improvements.avg_reward is not None
    assert comparison.improvements.avg_reward < 0
    assert comparison.improvements.f1 < 0
    report = format_comparison_report(comparison, "Baseline", "New Model")
    assert "Baseline vs New Model\nWinner: Baseline\n" in report


def test_a_policy_ties_with_itself() -> None:
    rules = RulesPolicy(EXTRACTION)
    comparison = compare_policies(rules, replace(rules, name="again"), _examples(), FEW)
    assert comparison.winner == "tie"
    assert comparison.improvements.avg_reward == 0.0
    assert "the policies are alike on every example" in comparison.verdict
    assert comparison.disagreement_count == 0
    assert comparison.mcnemar.p_value == 1.0


def test_differences_are_of_the_metrics_of_both() -> None:
    comparison = compare_policies(
        RulesPolicy(EXTRACTION), UniformPolicy(EXTRACTION), _examples(600), FEW
    )
    sides = [
        {
            "avg_reward": each.avg_reward or 0.0,
            "accuracy": each.accuracy,
            "f1": each.f1,
            "macro_f1": each.classification.averages["macro_f1"].mean,
            "full_action_agreement": each.agreement.full_action.mean,
            "good_agreement": each.agreement.good.mean,
            "bad_agreement": each.agreement.bad.mean,
            "calibration_error": each.calibration.expected_error.mean,
            "brier": each.calibration.brier.mean,
        }
        for each in (comparison.policy_a, comparison.policy_b)
    ]
    differences = {name: each.interval.mean for name, each in comparison.differences.items()}
    assert differences == pytest.approx({name: sides[1][name] - sides[0][name] for name in METRICS})


def test_swapping_the_policies_swaps_the_signs() -> None:
    rules, skip, examples = RulesPolicy(EXTRACTION), SKIP, _examples()
    there = compare_policies(rules, skip, examples, FEW, metric="accuracy")
    back = compare_policies(skip, rules, examples, FEW, metric="accuracy")
    found, other = (each.differences["accuracy"].interval for each in (there, back))
    assert found.mean == -other.mean
    assert (there.winner, back.winner) == ("A", "B")


def test_the_baseline_is_the_rules() -> None:
    comparison = compare_with_baseline(Best(), _examples(1000, kind=CONSOLIDATION), FEW)
    assert comparison.policy_a.policy == "rules"
    assert comparison.winner == "B"


def test_pairing_shortens_the_interval() -> None:
    generator = np.random.default_rng(0)
    common = generator.normal(size=400)
    a, b = (common + 0.1 * generator.normal(size=400) for _ in range(2))
    paired = metric_difference(MEAN, a, b, FEW.bootstrap)
    shuffled = metric_difference(MEAN, a, generator.permutation(b), FEW.bootstrap)
    assert paired.interval.standard_error < 0.2 * shuffled.interval.standard_error


def test_an_unusable_reward_is_a_tie_that_says_why() -> None:
    unheard = ConstantPolicy(EXTRACTION, replace(EXTRACTION.actions()[2], priority=99))
    comparison = compare_policies(RulesPolicy(EXTRACTION), unheard, _examples(), FEW)
    assert comparison.winner == "tie"
    assert comparison.verdict.startswith("avg_reward cannot be compared: B (constant): the log ")
    assert comparison.improvements.avg_reward is None
    assert "avg_reward" not in comparison.differences


def test_where_the_policies_differ_is_listed() -> None:
    examples = _examples(200)
    comparison = compare_policies(RulesPolicy(EXTRACTION), SKIP, examples, FEW)
    rules = RulesPolicy(EXTRACTION)
    differing = [each.id for each in examples if rules.decide(each.state).action != SKIP.action]
    assert comparison.disagreement_count == len(differing)
    assert [each.id for each in comparison.disagreements] == differing[:50]


def test_policies_of_two_kinds_are_refused() -> None:
    with pytest.raises(InputError, match="policies of different kinds cannot be compared: extr"):
        compare_policies(RulesPolicy(EXTRACTION), RulesPolicy(KINDS["retrieval"]), _examples())


def test_an_unknown_metric_is_refused() -> None:
    rules = RulesPolicy(EXTRACTION)
    with pytest.raises(InputError, match="metric must be one of avg_reward, accuracy, f1,"):
        compare_policies(rules, rules, _examples(), metric="speed")


def _difference(
    mean: float, half: float, p_value: float, *, is_better_higher: bool = True
) -> Difference:
    interval = ConfidenceInterval(
        mean, mean - half, mean + half, 0.95, "bca", 100, 50, 50, half / 2
    )
    return Difference(interval, p_value, p_value, 1.4 * half, is_better_higher)


@pytest.mark.parametrize(
    ("difference", "winner", "reason"),
    [
        (_difference(0.5, 0.1, 0.01), "B", "+0.5000, 95% interval [+0.4000, +0.6000], p = 0.0100"),
        (_difference(-0.5, 0.1, 0.01), "A", "-0.5000"),
        (_difference(-0.5, 0.1, 0.01, is_better_higher=False), "B", "-0.5000"),
        (_difference(0.1, 0.2, 0.3), "tie", "a true difference of 0.2800 would have been found"),
        (_difference(0.5, 0.1, 0.2), "tie", "p = 0.2000 in the permutation test: too few"),
    ],
)
def test_a_winner_needs_the_interval_and_the_test(
    difference: Difference, winner: str, reason: str
) -> None:
    verdict = judge("accuracy", difference)
    assert verdict.winner == winner
    assert reason in verdict.reason


def test_looking_at_more_metrics_raises_the_adjusted_p_values() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=50)
    b = a + generator.normal(0.3, 1.0, size=50)
    one = metric_differences({"x": MEAN}, a, b, FEW.bootstrap)["x"]
    three = metric_differences(dict.fromkeys("xyz", MEAN), a, b, FEW.bootstrap)["x"]
    assert three.p_value == one.p_value == one.adjusted_p_value
    assert three.adjusted_p_value == pytest.approx(min(3 * one.p_value, 1.0))


Draw = Callable[[np.random.Generator, float], tuple[Floats, Floats, list[str] | None]]


def _right_or_wrong(
    generator: np.random.Generator, gap: float
) -> tuple[Floats, Floats, list[str] | None]:
    """Paired 0/1 results of 300 examples; A is right in 70%."""
    luck = generator.random(300)
    own = generator.random((2, 300)) < 0.3  # where a policy's luck is its own
    draws = np.where(own, generator.random((2, 300)), luck)
    return (draws[0] < 0.7) * 1.0, (draws[1] < 0.7 + gap) * 1.0, None


def _sessions(
    generator: np.random.Generator, gap: float
) -> tuple[Floats, Floats, list[str] | None]:
    """Rewards of 80 sessions of 1 to 8 examples, in which the difference is shared."""
    session = np.repeat(np.arange(80), generator.integers(1, 9, size=80))
    a = generator.normal(size=len(session))
    shared = 0.4 * generator.normal(size=80)[session]
    b = a + gap + shared + 0.3 * generator.normal(size=len(session))
    return a, b, [str(each) for each in session]


def _rate(draw: Draw, gap: float, runs: int) -> dict[str, float]:
    """Share of runs that end with each winner."""
    wins = {"A": 0, "B": 0, "tie": 0}
    for run in range(runs):
        a, b, groups = draw(np.random.default_rng([run, 1]), gap)
        options = BootstrapOptions(resamples=400, seed=run)
        wins[judge("m", metric_difference(MEAN, a, b, options, groups=groups)).winner] += 1
    return {winner: count / runs for winner, count in wins.items()}


def _theory(draw: Draw, gap: float) -> float:
    """Power of a test of 5%: Phi(gap / error - 1.96), the error measured over many samples."""
    gaps = []
    for run in range(1500):
        a, b, _ = draw(np.random.default_rng([run, 2]), gap)
        gaps.append(b.mean() - a.mean())
    return NormalDist().cdf(float(np.mean(gaps) / np.std(gaps)) - 1.96)


RUNS = [100, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize(("draw", "gap"), [(_right_or_wrong, 0.07), (_sessions, 0.14)])
def test_winners_are_found_at_the_power_of_theory(draw: Draw, gap: float, runs: int) -> None:
    power = _theory(draw, gap)
    assert 0.5 < power < 0.95
    found = _rate(draw, gap, runs)
    # asking for the permutation test as well costs up to .06 of the power, and 400 swaps are coarse
    noise = 3 * np.sqrt(power * (1 - power) / runs)
    assert power - 0.08 - noise < found["B"] < power + 0.02 + noise
    assert found["A"] == 0.0


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("draw", [_right_or_wrong, _sessions])
def test_without_a_gap_winners_are_as_rare_as_stated(draw: Draw, runs: int) -> None:
    found = _rate(draw, 0.0, runs)
    assert found["A"] + found["B"] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_ignoring_sessions_would_name_winners_too_often() -> None:
    def independent(
        generator: np.random.Generator, gap: float
    ) -> tuple[Floats, Floats, list[str] | None]:
        a, b, _ = _sessions(generator, gap)
        return a, b, None

    assert _rate(independent, 0.0, 100)["tie"] < 0.87


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    a, b, groups = _sessions(np.random.default_rng(0), 0.0)
    found = metric_difference(MEAN, a, b, FEW.bootstrap, groups=groups)
    power = _rate(_sessions, found.smallest_detectable, 100)["B"]
    assert power == pytest.approx(0.8, abs=0.15)


@pytest.mark.slow
def test_the_true_difference_of_simulated_policies_is_covered() -> None:
    rules, best = RulesPolicy(CONSOLIDATION), Best()
    truth = true_value("consolidation", lambda state: best.decide(state).action) - true_value(
        "consolidation", lambda state: rules.decide(state).action
    )
    covered, winners = 0, []
    for seed in range(20):
        comparison = compare_policies(rules, best, _examples(1500, seed, CONSOLIDATION), FEW)
        interval = comparison.differences["avg_reward"].interval
        covered += interval.lower <= truth <= interval.upper
        winners.append(comparison.winner)
    assert covered >= 16  # 95% of 20 is 19; fewer than 16 has a chance of 0.3%
    assert "A" not in winners
    assert winners.count("B") >= 15


@pytest.mark.slow
def test_two_policies_of_equal_worth_tie() -> None:
    winners = [
        compare_policies(
            UniformPolicy(EXTRACTION, seed=1, name="one"),
            UniformPolicy(EXTRACTION, seed=2, name="two"),
            _examples(600, seed),
            FEW,
            metric="accuracy",
        ).winner
        for seed in range(40)
    ]
    assert winners.count("tie") >= 34
