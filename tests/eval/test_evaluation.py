"""Evaluating one policy: the document's example, and what each figure must depend on."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.data.builder import build_extraction_dataset
from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.records import decision_to_json
from dpo.data.simulate import simulate
from dpo.errors import InputError
from dpo.eval.bootstrap import BootstrapOptions
from dpo.eval.evaluation import EvaluationOptions, evaluate_policy
from dpo.eval.examples import EvaluationExample, as_examples
from dpo.eval.policies import ConstantPolicy, PolicyDecision, RulesPolicy, UniformPolicy
from dpo.eval.report_text import format_evaluation_report
from dpo.eval.rewards import reward_by_class, reward_distribution, reward_trend

EXTRACTION = KINDS["extraction"]
FEW = EvaluationOptions(bootstrap=BootstrapOptions(resamples=100))
BOOTSTRAP = BootstrapOptions(resamples=200)


def _examples(count: int = 300, seed: int = 0) -> list[EvaluationExample]:
    return as_examples(simulate("extraction", count, seed), EXTRACTION)


def _duplicate_states(expected: dict[str, Any]) -> list[dict[str, Any]]:
    """Two states whose content is stored already: the rules skip both."""
    state = next(each.state for each in _examples() if each.state.memory_state.similar_entry_exists)
    return [
        {"state": state, "expected_action": expected, "reward": reward} for reward in (0.9, 0.7)
    ]


def test_the_documents_example(tmp_path: Path) -> None:
    log = tmp_path / "feedback.jsonl"
    log.write_text(
        "".join(
            json.dumps(decision_to_json(each)) + "\n" for each in simulate("extraction", 900, 0)
        )
    )
    extraction_dataset = build_extraction_dataset(log, eval_split=0.4, remove_crossing="none")
    test_data = [
        {"state": ex.state, "expected_action": ex.action, "reward": ex.reward}
        for ex in extraction_dataset.eval
    ]
    evaluation = evaluate_policy(RulesPolicy(EXTRACTION), test_data, FEW)
    report = format_evaluation_report(evaluation)
    assert report.startswith("Policy Evaluation Report\n" + "=" * 50)
    assert f"  Accuracy:  {evaluation.accuracy:.2%}" in report
    assert 0 < evaluation.accuracy < 1


def test_agreeing_with_every_example_is_an_accuracy_of_one() -> None:
    evaluation = evaluate_policy(
        RulesPolicy(EXTRACTION), _duplicate_states({"decision": "skip"}), FEW
    )
    assert evaluation.accuracy == 1.0
    assert evaluation.f1 == 1.0
    assert evaluation.confusion_matrix == {"skip": {"skip": 2}}
    assert evaluation.logged_rewards.mean.mean == pytest.approx(0.8)
    assert evaluation.logged_rewards.std_dev == pytest.approx(0.1)


def test_agreeing_with_none_is_an_accuracy_of_zero() -> None:
    expected = {"decision": "store", "entryType": "tool"}
    evaluation = evaluate_policy(RulesPolicy(EXTRACTION), _duplicate_states(expected), FEW)
    assert evaluation.accuracy == 0.0
    assert evaluation.confusion_matrix["store"] == {"skip": 2, "store": 0}


def test_the_average_reward_belongs_to_the_policy() -> None:
    examples = _examples(1500)
    values = [
        evaluate_policy(policy, examples, FEW).avg_reward
        for policy in (RulesPolicy(EXTRACTION), UniformPolicy(EXTRACTION))
    ]
    assert values[0] is not None
    assert values[1] is not None
    assert values[0] > values[1] + 0.1


def test_a_reward_that_the_log_cannot_tell_is_none_with_a_reason() -> None:
    action = replace(EXTRACTION.actions()[2], priority=99)  # nobody ever tried it
    evaluation = evaluate_policy(ConstantPolicy(EXTRACTION, action), _examples(), FEW)
    assert evaluation.avg_reward is None
    assert evaluation.reward_std_dev is None
    assert evaluation.off_policy.refusal is not None


def test_agreement_with_punished_actions_is_told_apart() -> None:
    examples = _examples()
    imitator = _Imitator(examples)
    evaluation = evaluate_policy(imitator, examples, FEW)
    agreement = evaluation.agreement
    assert (agreement.good.mean, agreement.bad.mean, agreement.full_action.mean) == (1.0, 1.0, 1.0)
    assert agreement.good_count == sum(each.reward > 0 for each in examples)
    assert agreement.bad_count == sum(each.reward < 0 for each in examples)


def test_a_policy_that_has_seen_the_log_has_no_estimated_reward() -> None:
    examples = _examples()
    evaluation = evaluate_policy(_Imitator(examples), examples, FEW)
    assert evaluation.avg_reward is None
    assert evaluation.off_policy.refusal is not None
    assert "instead of 1: the propensities are wrong, or the" in evaluation.off_policy.refusal


class _Imitator:
    """Does what was logged."""

    kind: PolicyKind = EXTRACTION
    name = "imitator"

    def __init__(self, examples: list[EvaluationExample], fails: int = 0) -> None:
        self.answers = iter([each.expected_action for each in examples])
        self.fails = fails

    def decide(self, state: Any) -> PolicyDecision:
        answer = next(self.answers)
        self.fails -= 1
        if self.fails >= 0:
            raise ValueError("out of memory")
        return PolicyDecision(answer, 0.75)


class _Believer:
    """Always stores a tool, holding each of the actions to be as likely as any other."""

    kind: PolicyKind = EXTRACTION
    name = "believer"

    def decide(self, state: Any) -> PolicyDecision:
        actions = EXTRACTION.actions()
        beliefs = (1 / len(actions),) * len(actions)
        return PolicyDecision(actions[2], beliefs[2], beliefs=beliefs)


def test_calibration_is_about_the_class_so_beliefs_of_a_class_add_up() -> None:
    examples = _examples()
    evaluation = evaluate_policy(_Believer(), examples, FEW)
    (only,) = evaluation.calibration.bins
    assert only.confidence == pytest.approx(23 / 25)  # 23 of the 25 actions store
    right = np.mean([each.expected_action.decision == "store" for each in examples])
    expected = abs(right - 23 / 25)
    assert evaluation.calibration.expected_error.mean == pytest.approx(expected)


def test_failures_are_counted_by_reason_and_noted() -> None:
    examples = _examples()
    evaluation = evaluate_policy(_Imitator(examples, fails=3), examples, FEW)
    assert evaluation.fallbacks == {"ValueError: out of memory": 3}
    assert any("failed in 3 of 300 states" in note for note in evaluation.notes)


def test_sessions_are_drawn_whole_unless_told() -> None:
    examples = _examples()
    by_session = evaluate_policy(RulesPolicy(EXTRACTION), examples, FEW)
    independent = evaluate_policy(RulesPolicy(EXTRACTION), examples, replace(FEW, by_session=False))
    assert by_session.groups == len({each.session_id for each in examples})
    assert independent.groups == 300
    assert by_session.accuracy == independent.accuracy


def test_few_sessions_are_noted() -> None:
    evaluation = evaluate_policy(RulesPolicy(EXTRACTION), _examples(60), FEW)
    assert any("independent groups" in note for note in evaluation.notes)


def test_one_class_only_is_noted() -> None:
    evaluation = evaluate_policy(
        RulesPolicy(EXTRACTION), _duplicate_states({"decision": "skip"}), FEW
    )
    assert "every example has the class 'skip'" in evaluation.notes[0]


def test_stratified_intervals_are_shorter() -> None:
    examples = _examples(600)
    options = EvaluationOptions(bootstrap=BootstrapOptions(resamples=500), by_session=False)
    plain = evaluate_policy(RulesPolicy(EXTRACTION), examples, options)
    stratified = evaluate_policy(
        RulesPolicy(EXTRACTION), examples, replace(options, stratify_by_class=True)
    )
    errors = [
        each.classification.averages["accuracy"].standard_error for each in (plain, stratified)
    ]
    assert errors[1] < errors[0]


def test_empty_data_are_refused() -> None:
    with pytest.raises(InputError, match="test_data is empty"):
        evaluate_policy(RulesPolicy(EXTRACTION), [])


def test_one_session_is_refused() -> None:
    examples = [replace(each, session_id="s") for each in _examples(20)]
    with pytest.raises(InputError, match="all 20 examples come from one session"):
        evaluate_policy(RulesPolicy(EXTRACTION), examples)


def test_data_of_another_kind_are_refused() -> None:
    data = [{"state": {}, "expected_action": {"action": "keep"}, "reward": 0.0}]
    with pytest.raises(InputError, match="state: contextFeatures is missing"):
        evaluate_policy(RulesPolicy(EXTRACTION), data)


def test_strata_of_sessions_are_refused() -> None:
    with pytest.raises(InputError, match="stratify_by_class needs by_session=False"):
        EvaluationOptions(stratify_by_class=True)


def test_reward_distribution_by_hand() -> None:
    found = reward_distribution(np.array([0.5, 0.6, 0.7, 0.8, 0.9]), BOOTSTRAP)
    assert (found.min, found.median, found.max) == (0.5, 0.7, 0.9)
    assert (found.q1, found.q3) == pytest.approx((0.6, 0.8))
    assert found.mean.mean == pytest.approx(0.7)
    assert found.std_dev == pytest.approx(np.sqrt(0.02))
    assert len(found.histogram) == 10
    assert sum(each.count for each in found.histogram) == 5


def test_reward_by_class_by_hand() -> None:
    found = reward_by_class(np.array([1.0, 0.0, -1.0, -1.0]), ["a", "a", "b", "b"], BOOTSTRAP)
    assert {name: each.mean for name, each in found.items()} == {"a": 0.5, "b": -1.0}


START = datetime(2024, 1, 1, tzinfo=UTC)


def _times(count: int, days: float = 60.0) -> list[datetime]:
    return [START + timedelta(days=days * index / (count - 1)) for index in range(count)]


@pytest.mark.parametrize(
    ("slope", "direction"), [(0.3, "improving"), (-0.3, "declining"), (0.0, "stable")]
)
def test_trend_of_a_line_is_its_slope(slope: float, direction: str) -> None:
    months = np.linspace(0.0, 2.0, 200)
    noise = 0.1 * np.random.default_rng(0).normal(size=200)
    trend = reward_trend(slope * months + noise, _times(200), BOOTSTRAP)
    assert trend is not None
    assert trend.slope.mean == pytest.approx(slope, abs=0.05)
    assert trend.direction == direction


def test_windows_hold_every_example_once() -> None:
    times = _times(29, days=28.0)  # an exact multiple of the window: the last one counts too
    trend = reward_trend(np.arange(29) / 29, times, BOOTSTRAP)
    assert trend is not None
    assert [window.count for window in trend.windows] == [7, 7, 7, 7, 1]
    assert trend.windows[1].start == START + timedelta(days=7)


def test_there_is_no_trend_without_times() -> None:
    rewards = np.array([0.1, 0.2, 0.3])
    assert reward_trend(rewards, [START, None, START], BOOTSTRAP) is None
    assert reward_trend(rewards, [START] * 3, BOOTSTRAP) is None


def test_seeds_make_evaluations_equal() -> None:
    examples = _examples()
    first, second = (evaluate_policy(UniformPolicy(EXTRACTION), examples, FEW) for _ in range(2))
    assert first == second
