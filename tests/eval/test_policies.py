"""Policies: the rules, a constant, a uniform draw, fallback and the names of the command line."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.simulate import simulated_situations
from dpo.errors import InputError
from dpo.eval.policies import (
    ConstantPolicy,
    PolicyDecision,
    RulesPolicy,
    UniformPolicy,
    check_decision,
    decide_all,
    decide_with_fallback,
    load_policy,
)

EXTRACTION = KINDS["extraction"]
STATES = simulated_situations("extraction", 20)


class Broken:
    """Fails where ``fails`` says so."""

    kind: PolicyKind = EXTRACTION
    name = "broken"

    def __init__(self, fails: Sequence[Any], confidence: float = 0.5) -> None:
        self.fails = fails
        self.confidence = confidence

    def decide(self, state: Any) -> PolicyDecision:
        if state in self.fails:
            raise RuntimeError("no answer")
        return PolicyDecision(EXTRACTION.actions()[0], self.confidence)


class Batched(Broken):
    """Counts how it is asked."""

    def __init__(self, fails: Sequence[Any]) -> None:
        super().__init__(fails)
        self.batches = 0

    def decide_batch(self, states: Sequence[Any]) -> list[PolicyDecision]:
        self.batches += 1
        return [self.decide(state) for state in states]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_rules_answer_as_the_baseline_of_their_kind(kind: PolicyKind) -> None:
    for state in simulated_situations(kind.name, 20):
        answer, decision = kind.baseline(state), RulesPolicy(kind).decide(state)
        assert (decision.action, decision.confidence) == (answer.action, answer.confidence)
        assert decision.reason == answer.reason


def test_a_constant_takes_its_action() -> None:
    action = EXTRACTION.actions()[1]
    assert ConstantPolicy(EXTRACTION, action).decide(STATES[0]) == PolicyDecision(action, 1.0)


def test_uniform_draws_every_action_and_tells_its_chances() -> None:
    policy = UniformPolicy(EXTRACTION, seed=1)
    decisions = [policy.decide(STATES[0]) for _ in range(1700)]
    counts = Counter(decision.action for decision in decisions)
    assert set(counts) == set(EXTRACTION.actions())
    assert max(counts.values()) < 2 * min(counts.values())
    assert decisions[0].probabilities == (1 / 25,) * 25


def test_uniform_draws_depend_on_the_seed_only() -> None:
    first, second = (UniformPolicy(EXTRACTION, seed=3) for _ in range(2))
    assert [first.decide(s).action for s in STATES] == [second.decide(s).action for s in STATES]


def test_the_rules_answer_where_a_policy_fails_and_say_why() -> None:
    decision = decide_with_fallback(Broken(STATES), STATES[0])
    assert decision.action == EXTRACTION.baseline(STATES[0]).action
    assert decision.fallback_reason == "RuntimeError: no answer"


def test_another_fallback_can_be_named() -> None:
    constant = ConstantPolicy(EXTRACTION, EXTRACTION.actions()[1])
    decision = decide_with_fallback(Broken(STATES), STATES[0], fallback=constant)
    assert decision.action == constant.action


def test_a_policy_that_answers_needs_no_fallback() -> None:
    assert decide_with_fallback(Broken([]), STATES[0]).fallback_reason is None


def test_a_confidence_that_is_none_is_a_failure() -> None:
    decision = decide_with_fallback(Broken([], confidence=1.5), STATES[0])
    assert decision.fallback_reason is not None
    assert "confidence must be in [0, 1], got 1.5" in decision.fallback_reason


def test_batches_are_used_where_a_policy_has_them() -> None:
    policy = Batched([])
    assert len(decide_all(policy, STATES)) == len(STATES)
    assert policy.batches == 1


def test_one_failure_in_a_batch_costs_one_decision() -> None:
    reasons = [each.fallback_reason for each in decide_all(Batched(STATES[:1]), STATES)]
    assert reasons == ["RuntimeError: no answer"] + [None] * (len(STATES) - 1)


def test_a_policy_that_fails_everywhere_is_refused() -> None:
    message = "policy 'broken' failed in all 20 states, 20 times by RuntimeError: no answer"
    with pytest.raises(InputError, match=message):
        decide_all(Broken(STATES), STATES)


@pytest.mark.parametrize("probabilities", [(1.0,), (0.5,) + (0.0,) * 16, (-0.1, 1.1) + (0.0,) * 15])
def test_probabilities_that_are_none_are_refused(probabilities: tuple[float, ...]) -> None:
    decision = PolicyDecision(EXTRACTION.actions()[0], 0.5, probabilities)
    with pytest.raises(InputError, match="probabilities must be 25 shares that add up to 1"):
        check_decision(RulesPolicy(EXTRACTION), decision)


def test_command_line_names_make_policies() -> None:
    assert isinstance(load_policy("rules", EXTRACTION), RulesPolicy)
    assert isinstance(load_policy("uniform", EXTRACTION), UniformPolicy)
    constant = load_policy("constant:defer", EXTRACTION)
    assert constant.decide(STATES[0]).action.decision == "defer"


def test_a_name_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    message = "is no policy: expected rules, uniform, constant:CLASS with CLASS one of"
    with pytest.raises(InputError, match=message):
        load_policy(str(missing), EXTRACTION)


def test_a_constant_of_an_unknown_class_is_refused() -> None:
    with pytest.raises(InputError, match="extraction has no class 'merge', expected one of"):
        load_policy("constant:merge", EXTRACTION)
