"""Rankings and A/B tests."""

from dataclasses import replace

import numpy as np
import pytest

from dpo.data.kinds import KINDS
from dpo.data.simulate import simulate
from dpo.errors import InputError
from dpo.eval.bootstrap import BootstrapOptions
from dpo.eval.evaluation import EvaluationOptions, evaluate_policy
from dpo.eval.examples import EvaluationExample, as_examples
from dpo.eval.policies import ConstantPolicy, RulesPolicy, UniformPolicy
from dpo.eval.ranking import ab_test, rank_policies
from dpo.eval.report_text import format_ab_test_report, format_ranking

KIND = KINDS["consolidation"]
FEW = EvaluationOptions(bootstrap=BootstrapOptions(resamples=200))
RULES, UNIFORM = RulesPolicy(KIND), UniformPolicy(KIND)
UNHEARD = ConstantPolicy(KIND, replace(KIND.actions()[0], merge_strategy=None), "unheard")


def _examples(count: int = 500, seed: int = 0) -> list[EvaluationExample]:
    return as_examples(simulate(KIND.name, count, seed), KIND)


def test_a_ranking_orders_by_the_metric() -> None:
    examples = _examples()
    ranking = rank_policies([UNIFORM, UNHEARD, RULES], examples, FEW)
    assert [each.policy for each in ranking.policies] == ["rules", "uniform", "unheard"]
    best, second, last = ranking.policies
    assert best.estimate is not None
    alone = evaluate_policy(RULES, examples, FEW).avg_reward
    assert best.estimate.mean == pytest.approx(alone)
    assert best.behind_best is None
    assert second.behind_best is not None
    assert second.behind_best.interval.lower > 0
    assert not second.is_tied_with_best
    assert last.refusal is not None


def test_what_is_better_lower_is_ranked_so() -> None:
    ranking = rank_policies([UNIFORM, RULES], _examples(), FEW, metric="brier")
    means = [each.estimate.mean for each in ranking.policies if each.estimate]
    assert means == sorted(means)


def test_p_values_are_adjusted_for_the_number_of_policies() -> None:
    twin = UniformPolicy(KIND, seed=0, name="twin")
    ranking = rank_policies([RULES, UniformPolicy(KIND), twin], _examples(), FEW)
    gaps = [each.behind_best for each in ranking.policies if each.behind_best]
    assert all(gap.adjusted_p_value >= 2 * gap.p_value - 1e-12 for gap in gaps[:1])


def test_equal_policies_tie_with_the_best() -> None:
    ranking = rank_policies([RULES, RulesPolicy(KIND, "again")], _examples(), FEW)
    assert [each.is_tied_with_best for each in ranking.policies] == [True, True]
    assert "(tie)" in format_ranking(ranking)


def test_a_ranking_without_any_estimate_says_why() -> None:
    other = replace(UNHEARD, name="other")
    text = format_ranking(rank_policies([UNHEARD, other], _examples(), FEW))
    assert "not estimable" in text
    assert "unheard: the log rarely took the actions that the policy takes" in text


@pytest.mark.parametrize("policies", [[RULES], [RULES, RULES]])
def test_too_few_or_equal_names_are_refused(policies: list[RulesPolicy]) -> None:
    with pytest.raises(InputError, match="a ranking needs two or more policies of different names"):
        rank_policies(policies, _examples(20), FEW)


def test_an_ab_test_finds_a_large_difference() -> None:
    test = ab_test(RULES, UNIFORM, _examples(800), FEW)
    assert test.winner == "A"
    assert test.difference.mean == pytest.approx(test.b.mean - test.a.mean)
    assert test.p_value < 0.02
    assert test.effect_size is not None
    assert test.effect_size < 0
    assert test.examples_a + test.examples_b == 800
    report = format_ab_test_report(test)
    assert "Winner: Policy A" in report
    assert "Cohen's d" in report
    assert "Recommendation: use Policy A" in report


def test_an_ab_test_of_a_policy_with_itself_is_rarely_won() -> None:
    examples = _examples(300)
    winners = [
        ab_test(
            RULES,
            RULES,
            examples,
            EvaluationOptions(bootstrap=BootstrapOptions(resamples=100, seed=seed)),
            metric="accuracy",
        ).winner
        for seed in range(20)
    ]
    assert winners.count("tie") >= 16


def test_an_unclear_ab_test_says_so() -> None:
    report = format_ab_test_report(ab_test(RULES, RULES, _examples(300), FEW, metric="accuracy"))
    assert "Winner: No clear winner" in report


def test_the_split_ratio_is_the_share_of_a() -> None:
    test = ab_test(RULES, UNIFORM, _examples(), FEW, metric="accuracy", split_ratio=0.25)
    assert test.examples_a / 500 == pytest.approx(0.25, abs=0.08)


def test_effect_size_by_hand() -> None:
    options = EvaluationOptions(bootstrap=BootstrapOptions(resamples=2000), by_session=False)
    test = ab_test(RULES, UNIFORM, _examples(), options, metric="accuracy")
    variances = [each.mean * (1 - each.mean) for each in (test.a, test.b)]
    expected = test.difference.mean / np.sqrt(sum(variances) / 2)
    assert test.effect_size == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.5])
def test_a_split_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="split_ratio must be between 0 and 1, both excluded"):
        ab_test(RULES, UNIFORM, _examples(20), FEW, split_ratio=ratio)


def test_a_side_without_sessions_is_refused() -> None:
    with pytest.raises(InputError, match="leaves a side fewer than two"):
        ab_test(RULES, UNIFORM, _examples(200), FEW, split_ratio=0.01)


def test_a_policy_without_an_estimate_is_refused() -> None:
    with pytest.raises(InputError, match="avg_reward of unheard cannot be estimated: the log"):
        ab_test(RULES, UNHEARD, _examples(200), FEW)
