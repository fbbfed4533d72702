import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dpo.data.kinds import KINDS
from dpo.data.records import Decision, decision_from_json, decision_to_json
from dpo.data.simulate import (
    best_action,
    simulate,
    simulated_situations,
    true_reward,
    true_value,
)
from dpo.data.simulated_worlds import WORLDS
from dpo.errors import InputError

every_kind = pytest.mark.parametrize("kind_name", KINDS)


@functools.cache
def expected_reward(kind_name: str, state: str, action: str) -> float:
    kind = KINDS[kind_name]
    return true_reward(
        kind_name,
        kind.parse_state(json.loads(state), "state"),
        kind.parse_action(json.loads(action), "action"),
    )


def residual(decision: Decision) -> float:
    """Return how far the decision's reward lies from the expected one."""
    state, action = json.dumps(decision.state), json.dumps(decision.action)
    assert decision.reward is not None
    return decision.reward - expected_reward(decision.policy, state, action)


def constant(action: Any) -> Callable[[Any], Any]:
    return lambda state: action


@every_kind
def test_decisions_are_valid_records_and_named_a_simulation(kind_name: str) -> None:
    kind = KINDS[kind_name]
    for decision in simulate(kind_name, 200, 3):
        action = kind.parse_action(decision.action, "action")
        assert decision.outcome is not None
        assert decision.reward == kind.reward(decision.outcome, action).value
        assert decision.id.startswith(f"simulated-{kind_name}-3-")
        assert decision.session_id.startswith(f"simulated-{kind_name}-3-session-")
        assert kind.state_to_json(kind.parse_state(decision.state, "state")) == decision.state
        assert decision_from_json(decision_to_json(decision), "row") == decision


@every_kind
def test_the_same_seed_gives_the_same_decisions_and_another_seed_others(kind_name: str) -> None:
    first = list(simulate(kind_name, 100, 0))

    assert first == list(simulate(kind_name, 100, 0))
    assert [each.action for each in first] != [each.action for each in simulate(kind_name, 100, 1)]


@every_kind
def test_all_seeds_share_one_pool_of_situations(kind_name: str) -> None:
    kind = KINDS[kind_name]
    pool = [kind.state_to_json(state) for state in simulated_situations(kind_name, 20)]

    met = simulate(kind_name, 300, 5, situations=20)

    assert all(decision.state in pool for decision in met)
    assert simulated_situations(kind_name, 30)[:20] == simulated_situations(kind_name, 20)


@every_kind
def test_every_situation_has_a_prompt_of_its_own(kind_name: str) -> None:
    prompts = {KINDS[kind_name].render_prompt(state) for state in simulated_situations(kind_name)}

    assert len(prompts) == 300


@every_kind
def test_what_the_rules_answer_can_be_chosen(kind_name: str) -> None:
    kind = KINDS[kind_name]
    for state in simulated_situations(kind_name, 2000):
        assert kind.baseline(state).action in kind.actions()


@every_kind
def test_chances_are_probabilities_of_outcomes_the_action_can_have(kind_name: str) -> None:
    world = WORLDS[kind_name]
    for state in simulated_situations(kind_name, 40):
        for action in world.kind.actions():
            chances = world.chances(state, action)
            assert math.isclose(sum(chance.probability for chance in chances), 1)
            assert all(chance.probability >= 0 for chance in chances)
            assert all(
                -1 <= world.kind.reward(chance.outcome, action).value <= 1 for chance in chances
            )


def state_of(kind_name: str, groups: dict[str, Any]) -> Any:
    return KINDS[kind_name].parse_state(groups, "state")


A_RULE = {
    "contextFeatures": {
        "turnNumber": 4,
        "tokenCount": 240,
        "toolCallCount": 0,
        "hasError": False,
        "userTurnCount": 2,
        "assistantTurnCount": 2,
    },
    "memoryState": {
        "totalEntries": 40,
        "recentExtractions": 0,
        "similarEntryExists": False,
        "sessionCaptureCount": 0,
    },
    "contentFeatures": {
        "hasDecision": False,
        "hasRule": True,
        "hasFact": False,
        "hasCommand": False,
        "noveltyScore": 0.5,
        "complexity": 0.4,
    },
}
A_TECHNICAL_QUERY = {
    "queryFeatures": {
        "queryLength": 60,
        "hasKeywords": True,
        "queryComplexity": 0.5,
        "semanticCategory": "technical",
    },
    "contextFeatures": {
        "turnNumber": 3,
        "conversationDepth": 4,
        "recentToolCalls": 0,
        "hasErrors": False,
    },
    "memoryStats": {"totalEntries": 300, "recentRetrievals": 3, "avgRetrievalSuccess": 0.6},
}
ALIKE_TOOLS = {
    "groupFeatures": {
        "groupSize": 3,
        "avgSimilarity": 0.85,
        "minSimilarity": 0.8,
        "maxSimilarity": 0.9,
        "entryTypes": ["tool"],
    },
    "usageStats": {
        "totalRetrievals": 20,
        "avgRetrievalRank": 4.0,
        "successRate": 0.45,
        "lastAccessedDaysAgo": 20,
    },
    "scopeStats": {"scopeType": "project", "totalEntriesInScope": 50, "duplicateRatio": 0.2},
}


@pytest.mark.parametrize(
    ("kind_name", "groups", "action", "reward"),
    [
        # need .05 + .6, right type and priority: found .65, of which .9 serves
        # .35 * -.4 + .65 * (.1 * -.1 + .9 * (.25 * .4 + .75 * 1))
        (
            "extraction",
            A_RULE,
            {"decision": "store", "entryType": "guideline", "priority": 50},
            0.35075,
        ),
        ("extraction", A_RULE, {"decision": "skip"}, -0.39),  # .65 * 3 * -.2
        ("extraction", A_RULE, {"decision": "defer"}, -0.4),  # late: missed all the same
        # need .5: .52 * 1 + .144 * -.1 + .336 * -.9
        ("retrieval", A_TECHNICAL_QUERY, {"shouldRetrieve": False}, 0.2032),
        # found .35 + .65 * .6 = .74, distracted .1 * log2(6) = .2585: .37 * 1
        # + (.5 * .7415 + .13 * .1) * .8 + .5 * .2585 * -.9 + .13 * .9 * -.7
        (
            "retrieval",
            A_TECHNICAL_QUERY,
            {"shouldRetrieve": True, "types": ["tool", "guideline"], "maxResults": 15},
            0.478779,
        ),
        # .85 * 1 + .15 * (.3 * .4 + .7 * -.9)
        ("consolidation", ALIKE_TOOLS, {"action": "merge", "mergeStrategy": "weighted"}, 0.7735),
        ("consolidation", ALIKE_TOOLS, {"action": "dedupe"}, -0.53),  # .1 * .55 + .9 * -.65
        ("consolidation", ALIKE_TOOLS, {"action": "archive"}, -0.646),  # .08 * .55 + .92 * -.75
        ("consolidation", ALIKE_TOOLS, {"action": "abstract"}, -0.2835),  # .15 + .85 * -.51
        ("consolidation", ALIKE_TOOLS, {"action": "keep"}, -0.08),  # .1 * .2 + .5 * -.2
    ],
)
def test_the_true_reward_follows_from_the_documented_chances(
    kind_name: str, groups: dict[str, Any], action: dict[str, Any], reward: float
) -> None:
    chosen = KINDS[kind_name].parse_action(action, "action")

    assert true_reward(kind_name, state_of(kind_name, groups), chosen) == pytest.approx(
        reward, abs=1e-6
    )


HIDDEN = {
    "extraction": {"user_turn_count": 99, "assistant_turn_count": 98, "session_capture_count": 97},
    "retrieval": {"last_retrieval_time": 1},
    "consolidation": {},
}


@pytest.mark.parametrize(("kind_name", "hidden"), HIDDEN.items())
def test_only_what_the_prompt_shows_matters(kind_name: str, hidden: dict[str, Any]) -> None:
    kind = KINDS[kind_name]
    for state in simulated_situations(kind_name, 20):
        groups = {
            field.name: dataclasses.replace(
                group, **{name: hidden[name] for name in hidden if hasattr(group, name)}
            )
            for field in dataclasses.fields(state)
            if (group := getattr(state, field.name))
        }
        other = dataclasses.replace(state, **groups)
        assert kind.render_prompt(other) == kind.render_prompt(state)
        for action in kind.actions():
            assert true_reward(kind_name, other, action) == true_reward(kind_name, state, action)


@every_kind
def test_rewards_scatter_around_the_true_reward(kind_name: str) -> None:
    residuals = [residual(each) for each in simulate(kind_name, 2000, 1, session_correlation=0)]

    standard_error = statistics.stdev(residuals) / math.sqrt(len(residuals))

    assert abs(statistics.mean(residuals)) < 4 * standard_error
    assert statistics.stdev(residuals) > 0.1  # there is noise to learn through


def test_sessions_share_their_luck_and_the_true_reward_stays() -> None:
    def session_means(correlation: float) -> list[float]:
        by_session = defaultdict(list)
        for each in simulate("retrieval", 2500, 2, situations=20, session_correlation=correlation):
            by_session[each.session_id].append(residual(each))
        return [statistics.mean(rewards) for rewards in by_session.values() if len(rewards) > 3]

    alone, together = session_means(0.0), session_means(0.8)

    assert statistics.variance(together) > 2 * statistics.variance(alone)
    assert abs(statistics.mean(together)) < 4 * statistics.stdev(together) / math.sqrt(
        len(together)
    )


@every_kind
def test_propensities_are_the_frequencies_of_the_actions(kind_name: str) -> None:
    kind, count = KINDS[kind_name], 4000
    propensities: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for each in simulate(kind_name, count, 4, situations=1, exploration=0.6):
        text = kind.render_action(kind.parse_action(each.action, "action"))
        assert each.propensity is not None
        assert propensities.setdefault(text, each.propensity) == each.propensity
        seen[text] += 1

    assert math.isclose(sum(propensities.values()), 1)  # every action was seen
    for text, propensity in propensities.items():
        spread = math.sqrt(count * propensity * (1 - propensity))
        assert abs(seen[text] - count * propensity) < 4.5 * spread


@every_kind
def test_without_exploration_the_agent_follows_the_rules(kind_name: str) -> None:
    kind = KINDS[kind_name]
    for each in simulate(kind_name, 100, 0, exploration=0):
        state = kind.parse_state(each.state, "state")
        assert each.action == kind.action_to_json(kind.baseline(state).action)
        assert each.propensity == 1


@every_kind
def test_with_nothing_but_exploration_all_actions_are_as_likely(kind_name: str) -> None:
    chances = {each.propensity for each in simulate(kind_name, 300, 0, exploration=1)}

    assert chances == {1 / len(KINDS[kind_name].actions())}


@every_kind
def test_prompts_come_back_with_other_actions_in_other_sessions(kind_name: str) -> None:
    actions, sessions = defaultdict(set), defaultdict(set)
    for each in simulate(kind_name, 6000, 0):
        situation = str(each.state)
        actions[situation].add(str(each.action))
        sessions[situation].add(each.session_id)

    assert len(actions) == 300
    assert statistics.median(map(len, actions.values())) >= 5
    assert statistics.median(map(len, sessions.values())) >= 10


@every_kind
def test_the_rules_are_better_than_chance_and_can_be_beaten(kind_name: str) -> None:
    kind = KINDS[kind_name]
    best = true_value(kind_name, lambda state: best_action(kind_name, state))
    rules = true_value(kind_name, lambda state: kind.baseline(state).action)
    chance = statistics.mean(true_value(kind_name, constant(action)) for action in kind.actions())

    assert best > rules + 0.1
    assert rules > chance + 0.1


@every_kind
def test_every_class_is_the_best_one_somewhere(kind_name: str) -> None:
    kind = KINDS[kind_name]
    classes = {
        kind.action_class(best_action(kind_name, state))
        for state in simulated_situations(kind_name, 100)
    }

    assert classes == set(kind.classes)


def test_the_true_value_of_the_rules_is_what_they_earn() -> None:
    kind = KINDS["consolidation"]
    earned = [
        each.reward or 0.0
        for each in simulate("consolidation", 5000, 0, exploration=0, session_correlation=0)
    ]

    expected = true_value("consolidation", lambda state: kind.baseline(state).action)

    standard_error = statistics.stdev(earned) / math.sqrt(len(earned))
    assert abs(statistics.mean(earned) - expected) < 4 * standard_error


def test_situations_become_common_or_rare_over_time() -> None:
    def shift(drift: float) -> float:
        decisions = list(simulate("retrieval", 8000, 0, situations=10, drift=drift))
        early = Counter(str(each.state) for each in decisions[:2000])
        late = Counter(str(each.state) for each in decisions[-2000:])
        return sum(abs(early[state] - late[state]) for state in early | late) / 2000

    assert shift(0.0) < 0.15
    assert shift(2.0) > 0.3


def test_decisions_lie_in_the_given_time_and_sessions_in_order() -> None:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    decisions = list(simulate("extraction", 500, 0, start=start, days=10))

    starts = [
        next(session).decided_at
        for _, session in itertools.groupby(decisions, key=lambda each: each.session_id)
    ]
    assert starts == sorted(starts)
    assert starts[0] == start
    assert start + timedelta(days=9) < starts[-1] < start + timedelta(days=10)
    assert 3 < len(decisions) / len(starts) < 12


def test_explored_actions_pass_a_confidence_filter_too() -> None:
    kept = [each for each in simulate("extraction", 2000, 0) if (each.confidence or 0) >= 0.7]

    assert all(0 <= (each.confidence or 0) <= 1 for each in kept)
    assert len({str(each.action) for each in kept}) > 15


def test_decisions_come_one_by_one_however_many_are_asked_for() -> None:
    assert len(list(itertools.islice(simulate("extraction", 10**12, 0), 10))) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind_name": "chat"}, "no simulated world for 'chat', only extraction, retrieval"),
        ({"decisions": 0}, "decisions must be at least 1, .* got 0, 365 and 1.0"),
        ({"days": 0}, "days above 0 .* got 5, 0 and 1.0"),
        ({"drift": math.nan}, "drift within 50 of 0, got 5, 365 and nan"),
        ({"drift": 2000.0}, "drift within 50 of 0, got 5, 365 and 2000"),
        ({"exploration": 1.5}, r"exploration must be in \[0, 1\], got 1.5"),
        ({"session_correlation": -1}, r"session_correlation must be in \[0, 1\], got -1"),
        ({"situations": 0}, r"situations must be in \[1, 5000\], got 0"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"kind_name": "extraction", "decisions": 5, "seed": 0}

    with pytest.raises(InputError, match=message):
        simulate(**{**arguments, **changes})
