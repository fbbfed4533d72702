"""Pairs: what is compared, what is chosen, and that nothing degenerate comes out."""

import dataclasses
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import astuple
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.examples import Example, ExampleMetadata, Examples, ExampleTable
from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.kinds.consolidation import (
    CONSOLIDATION,
    ConsolidationAction,
    ConsolidationState,
    GroupFeatures,
    ScopeStats,
    UsageStats,
)
from dpo.data.kinds.extraction import (
    EXTRACTION,
    ContentFeatures,
    ContextFeatures,
    ExtractionAction,
    ExtractionState,
    MemoryState,
)
from dpo.data.pairs import PairFormation, PairOptions, form_pairs
from dpo.data.simulate import simulate, true_reward
from dpo.data.simulated_worlds import Chance, extraction_chances
from dpo.errors import InputError

ExtractionExample: TypeAlias = Example[ExtractionState, ExtractionAction]

STORE = ExtractionAction("store", "knowledge", 80)
SKIP = ExtractionAction("skip")
DEFER = ExtractionAction("defer")
ACTIONS = (STORE, SKIP, DEFER, ExtractionAction("store", "tool", 20))


def make_state(*, turn: int = 5, tokens: int = 250) -> ExtractionState:
    """A state; ``turn`` is part of the grouping key, ``tokens`` only of the prompt."""
    return ExtractionState(
        ContextFeatures(turn, tokens, 0, False, 3, 2),
        MemoryState(10, 0, False, 0),
        ContentFeatures(True, False, False, False, 0.5, 0.5),
    )


def example(
    action: ExtractionAction,
    reward: float,
    *,
    turn: int = 5,
    tokens: int = 250,
    name: str = "d",
    confidence: float | None = None,
) -> ExtractionExample:
    metadata = ExampleMetadata(name, "s", datetime(2024, 1, 1, tzinfo=UTC), confidence)
    return Example(make_state(turn=turn, tokens=tokens), action, reward, metadata)


def pairs_of(
    examples: Sequence[ExtractionExample], options: PairOptions | None = None
) -> PairFormation:
    return form_pairs(examples, EXTRACTION, options)


def actions_of(formation: PairFormation) -> list[tuple[str, str]]:
    parse = EXTRACTION.parse_response
    return [
        (parse(str(pair.chosen)).decision, parse(str(pair.rejected)).decision)
        for pair in formation.pairs
    ]


REWARDS = st.integers(-10, 10).map(lambda tenths: tenths / 10)
EXAMPLES = st.lists(
    st.builds(
        example,
        st.sampled_from(ACTIONS),
        REWARDS,
        turn=st.integers(1, 3),
        tokens=st.integers(1, 3),
        confidence=st.floats(0, 1),
    ),
    max_size=40,
)
OPTIONS = st.builds(
    PairOptions,
    match=st.sampled_from(["prompt", "group"]),
    margin=st.sampled_from([0.0, 0.1, 0.5]),
    strategy=st.sampled_from(["best-worst", "all", "adjacent"]),
    weight=st.sampled_from(["none", "margin", "confidence", "margin-confidence"]),
)


# --- properties ----------------------------------------------------------------------------------


@settings(max_examples=50)
@given(examples=EXAMPLES, options=OPTIONS)
def test_no_pair_is_degenerate_repeated_or_contradicted(
    examples: list[ExtractionExample], options: PairOptions
) -> None:
    pairs = [
        (pair.prompt, pair.chosen, pair.rejected) for pair in pairs_of(examples, options).pairs
    ]
    assert all(chosen != rejected for _, chosen, rejected in pairs)
    assert len({(prompt, frozenset(answers)) for prompt, *answers in pairs}) == len(pairs)


@settings(max_examples=50)
@given(examples=EXAMPLES, options=OPTIONS)
def test_every_pair_exceeds_the_margin_by_its_evidence(
    examples: list[ExtractionExample], options: PairOptions
) -> None:
    formation = pairs_of(examples, options)
    for pair, evidence in zip(formation.pairs, formation.evidence, strict=True):
        assert evidence.chosen_reward - evidence.rejected_reward == evidence.margin
        assert evidence.margin > options.margin
        assert evidence.chosen_ids
        assert evidence.rejected_ids
        assert pair.weight >= 0


@settings(max_examples=50)
@given(examples=EXAMPLES, options=OPTIONS)
def test_every_decision_is_counted_once(
    examples: list[ExtractionExample], options: PairOptions
) -> None:
    formation = pairs_of(examples, options)
    report = formation.report
    assert report.examples == len(examples)
    assert report.paired_examples + sum(astuple(report.unpaired_examples)) == len(examples)
    assert len(formation.unpaired) == sum(astuple(report.unpaired_examples))
    assert report.formed - report.duplicates - report.contradictions == report.unique
    assert report.unique == len(formation.pairs)


@settings(max_examples=50)
@given(examples=EXAMPLES, options=OPTIONS)
def test_matching_by_prompt_uses_only_decisions_of_that_prompt(
    examples: list[ExtractionExample], options: PairOptions
) -> None:
    seen = {
        (EXTRACTION.render_prompt(each.state), EXTRACTION.render_action(each.action))
        for each in examples
    }
    for pair in pairs_of(examples, options).pairs:
        assert (pair.prompt, pair.chosen) in seen
        if options.match == "prompt":
            assert (pair.prompt, pair.rejected) in seen


# --- the document's rule -------------------------------------------------------------------------


def test_better_action_is_chosen() -> None:
    formation = pairs_of([example(SKIP, 0.3), example(STORE, 0.9)])
    (pair,) = formation.pairs
    assert pair.prompt == EXTRACTION.render_prompt(make_state())
    assert pair.chosen == EXTRACTION.render_action(STORE)
    assert pair.rejected == EXTRACTION.render_action(SKIP)


@pytest.mark.parametrize(
    ("better", "worse"), [(0.6, 0.5), (0.3, 0.2), (0.1, 0.0), (0.8, 0.7), (0.5, 0.49), (0.4, 0.4)]
)
def test_difference_of_exactly_the_margin_makes_no_pair(better: float, worse: float) -> None:
    # In floats 0.8 - 0.7 is 0.10000000000000009 and 0.6 - 0.5 is 0.09999999999999998.
    assert not pairs_of([example(STORE, better), example(SKIP, worse)]).pairs


def test_margin_is_strict_without_a_tolerance_too() -> None:
    examples = [example(STORE, 0.75), example(SKIP, 0.25)]
    assert not pairs_of(examples, PairOptions(margin=0.5, tolerance=0.0)).pairs
    assert pairs_of(examples, PairOptions(margin=0.49, tolerance=0.0)).pairs


def test_contexts_come_in_the_order_of_their_first_example() -> None:
    examples = [
        example(action, reward, turn=turn)
        for turn in (7, 3, 5)
        for action, reward in ((STORE, 0.9), (SKIP, 0.1))
    ]
    table = Examples.of(examples, EXTRACTION)
    prompts = [EXTRACTION.render_prompt(make_state(turn=turn)) for turn in (7, 3, 5)]
    assert [pair.prompt for pair in pairs_of(table).pairs] == prompts
    assert [pair.prompt for pair in pairs_of(table[::-1]).pairs] == prompts[::-1]


def test_lone_context_forms_no_pair() -> None:
    formation = pairs_of([example(STORE, 0.9), example(SKIP, 0.2), example(STORE, 0.9, turn=10)])
    assert len(formation.pairs) == 1
    assert formation.report.unpaired_examples.one_action == 1


def test_no_examples_form_no_pairs() -> None:
    formation = pairs_of([])
    assert formation.report.examples == formation.report.unique == len(formation.unpaired) == 0


def test_same_action_with_different_rewards_forms_no_pair() -> None:
    formation = pairs_of([example(STORE, 1.0), example(STORE, -1.0)])
    assert not formation.pairs
    assert formation.report.unpaired_examples.one_action == 2


# --- evidence ------------------------------------------------------------------------------------


def test_decisions_for_one_action_are_averaged() -> None:
    # store: (1 + 0 - 0.4) / 3 = 0.2; skip: 0.5. One lucky store does not win.
    rewards = [example(STORE, reward, name=f"d{reward}") for reward in (1.0, 0.0, -0.4)]
    formation = pairs_of([*rewards, example(SKIP, 0.5, name="d4")])
    assert actions_of(formation) == [("skip", "store")]
    (evidence,) = formation.evidence
    assert evidence.margin == pytest.approx(0.3)
    assert evidence.chosen_ids == ("d4",)
    assert evidence.rejected_ids == ("d1.0", "d0.0", "d-0.4")
    assert evidence.group_key == EXTRACTION.group_key(make_state())


def test_decisions_that_rank_the_other_way_are_told() -> None:
    contradicted = pairs_of([example(STORE, 1.0), example(STORE, -1.0), example(SKIP, 0.5)])
    plain = pairs_of([example(STORE, 0.0), example(SKIP, 0.5)])
    assert [each.is_contradicted for each in contradicted.evidence] == [True]
    assert [each.is_contradicted for each in plain.evidence] == [False]
    assert contradicted.report.contradicted_by_single_decisions == 1


# --- strategies ----------------------------------------------------------------------------------

RANKED = [example(STORE, 0.9), example(DEFER, 0.5), example(SKIP, 0.1)]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("best-worst", [("store", "skip")]),
        ("all", [("store", "skip"), ("defer", "skip"), ("store", "defer")]),
        ("adjacent", [("defer", "skip"), ("store", "defer")]),
    ],
)
def test_strategy_chooses_among_ranked_actions(
    strategy: str, expected: list[tuple[str, str]]
) -> None:
    # 0.5 - 0.1 = 0.4 and 0.9 - 0.5 = 0.4 are equal but for round-off, which orders them.
    formation = pairs_of(RANKED, PairOptions(strategy=strategy))
    assert sorted(actions_of(formation)) == sorted(expected)


def test_limit_keeps_the_widest_pairs() -> None:
    formation = pairs_of(RANKED, PairOptions(strategy="all", max_pairs_per_context=1))
    assert actions_of(formation) == [("store", "skip")]
    assert formation.report.unpaired_examples.not_selected == 1


def test_action_within_the_margin_of_all_others_is_named() -> None:
    formation = pairs_of([example(STORE, 0.5), example(SKIP, 0.45)])
    assert formation.report.unpaired_examples.within_margin == 2


# --- similar states ------------------------------------------------------------------------------


def test_similar_states_pair_only_on_demand() -> None:
    examples = [example(STORE, 0.9, tokens=1), example(SKIP, 0.1, tokens=2)]
    assert not pairs_of(examples).pairs
    (pair,) = pairs_of(examples, PairOptions(match="group")).pairs
    assert pair.prompt == EXTRACTION.render_prompt(make_state(tokens=1))


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "expected"),
    # margin 0.9 - 0.1; confidences 0.5 and 0.9 of the two decisions: their mean is 0.7
    [("none", 1.0), ("margin", 0.8), ("confidence", 0.7), ("margin-confidence", 0.56)],
)
def test_weight_comes_from_margin_and_confidence(weight: Any, expected: float) -> None:
    examples = [example(STORE, 0.9, confidence=0.5), example(SKIP, 0.1, confidence=0.9)]
    (pair,) = pairs_of(examples, PairOptions(weight=weight)).pairs
    assert pair.weight == pytest.approx(expected)


def test_weight_by_confidence_needs_confidences() -> None:
    examples = [example(STORE, 0.9, confidence=0.5), example(SKIP, 0.1)]
    with pytest.raises(InputError, match=r"in 1 of 1 pairs one is missing; use weight 'none'"):
        pairs_of(examples, PairOptions(weight="confidence"))


# --- unpaired decisions --------------------------------------------------------------------------


def test_unpaired_decisions_keep_label_and_reason() -> None:
    formation = pairs_of(
        [
            example(STORE, reward, turn=turn, name=f"d{turn}")
            for turn, reward in enumerate((0.5, 0.0, -0.5))
        ]
    )
    assert [(each.label, each.reward, each.id) for each in formation.unpaired] == [
        (True, 0.5, "d0"),
        (None, 0.0, "d1"),
        (False, -0.5, "d2"),
    ]
    assert {each.reason for each in formation.unpaired[1:]} == {"one_action"}
    assert formation.report.unlabelled_examples == 1
    assert formation.unpaired[0].completion == EXTRACTION.render_action(STORE)


# --- what a policy can answer --------------------------------------------------------------------


def consolidation_decisions(*actions: tuple[ConsolidationAction, float]) -> list[Any]:
    return [
        dataclasses.replace(consolidation_example(0.8, "keep", reward, f"d{index}"), action=action)
        for index, (action, reward) in enumerate(actions)
    ]


def test_ids_of_entries_are_in_the_examples_but_in_no_answer() -> None:
    first, second = (
        ConsolidationAction("merge", (entry,), merge_strategy="union") for entry in ("e1", "e2")
    )
    decisions = consolidation_decisions(
        (first, 0.9), (second, 0.7), (ConsolidationAction("keep"), 0)
    )
    formation = form_pairs(decisions, CONSOLIDATION)
    ((pair, evidence),) = zip(formation.pairs, formation.evidence, strict=True)
    assert pair.chosen == CONSOLIDATION.render_action(
        ConsolidationAction("merge", merge_strategy="union")
    )
    assert evidence.chosen_ids == ("d0", "d1")
    assert evidence.chosen_reward == pytest.approx(0.8)
    kept = Examples.of(decisions, CONSOLIDATION)
    assert [each.action for each in kept] == [each.action for each in decisions]
    assert [json.loads(kept.line(row))["action"].get("targetEntries") for row in range(3)] == [
        ["e1"],
        ["e2"],
        None,
    ]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_answers_are_those_a_policy_chooses_among(kind: PolicyKind) -> None:
    table = ExampleTable(kind)
    for decision in simulate(kind.name, 400, 0, situations=10, exploration=1):
        table.append_decision(decision, "here")
    formation = form_pairs(table.all(), kind, PairOptions(strategy="all"))
    listed = {kind.render_action(action) for action in kind.actions()}
    assert formation.pairs
    assert {text for pair in formation.pairs for text in (pair.chosen, pair.rejected)} <= listed
    assert formation.report.beyond_actions == 0


def test_pairs_with_an_action_beyond_those_are_counted() -> None:
    unlisted = ExtractionAction("store", "knowledge", 33)
    formation = form_pairs(
        [example(unlisted, 0.9), example(STORE, 0.5), example(SKIP, 0.1)],
        EXTRACTION,
        PairOptions(strategy="all"),
    )
    assert (formation.report.unique, formation.report.beyond_actions) == (3, 2)


def test_a_kind_that_lists_no_actions_has_none_beyond_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(EXTRACTION), "actions", lambda _: ())
    report = form_pairs([example(STORE, 0.5), example(SKIP, 0)], EXTRACTION).report
    assert (report.unique, report.beyond_actions) == (1, 0)


# --- contradictions between contexts -------------------------------------------------------------


def consolidation_example(
    similarity: float, action: Any, reward: float, name: str
) -> Example[ConsolidationState, ConsolidationAction]:
    """An example whose prompt shows two decimals of the similarity, and whose key cuts at .1."""
    group = GroupFeatures(2, similarity, similarity, similarity, ("tool",))
    state = ConsolidationState(group, UsageStats(0, 0.0, 0.0, 0), ScopeStats("project", 10, 0.0))
    metadata = ExampleMetadata(name, "s", datetime(2024, 1, 1, tzinfo=UTC))
    return Example(state, ConsolidationAction(action), reward, metadata)


# Both similarities are shown as 0.70, but the grouping key puts them below and above 0.7.
BELOW, ABOVE = 0.699, 0.701
MERGE_WINS = [("merge", 0.9), ("keep", 0.1)]
KEEP_WINS = [("merge", 0.1), ("keep", 0.9)]


def grouped(*rows: tuple[float, list[tuple[str, float]]]) -> PairFormation:
    examples = [
        consolidation_example(similarity, action, reward, f"{similarity}-{action}")
        for similarity, results in rows
        for action, reward in results
    ]
    return form_pairs(examples, CONSOLIDATION, PairOptions(match="group"))


def test_same_pair_from_two_groups_is_kept_once() -> None:
    formation = grouped((BELOW, MERGE_WINS), (ABOVE, MERGE_WINS))
    assert len(formation.pairs) == formation.report.duplicates == 1
    assert formation.report.unpaired_examples.dropped == 2


def test_contradiction_is_resolved_by_the_number_of_decisions() -> None:
    formation = grouped((BELOW, MERGE_WINS), (ABOVE, KEEP_WINS), (ABOVE, KEEP_WINS))
    (pair,) = formation.pairs
    assert CONSOLIDATION.parse_response(str(pair.chosen)).action == "keep"
    assert (formation.report.formed, formation.report.contradictions) == (2, 1)


def test_contradiction_of_equal_evidence_is_dropped() -> None:
    formation = grouped((BELOW, MERGE_WINS), (ABOVE, KEEP_WINS))
    assert not formation.pairs
    assert (formation.report.formed, formation.report.contradictions) == (2, 2)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "turn"}, "match must be one of prompt, group, got 'turn'"),
        ({"strategy": "best"}, "strategy must be one of best-worst, all, adjacent, got 'best'"),
        ({"weight": "reward"}, "weight must be one of none, margin, confidence, margin-confidence"),
        ({"margin": -0.1}, r"margin must be in \[0, 2\), the width of the rewards, got -0.1"),
        ({"margin": float("nan")}, r"margin must be in \[0, 2\)"),
        ({"tolerance": 1.0}, r"tolerance must be in \[0, 0.001\], got 1.0"),
        ({"max_pairs_per_context": 3}, "max_pairs_per_context has no effect"),
        ({"strategy": "all", "max_pairs_per_context": 0}, "max_pairs_per_context must be >= 1"),
    ],
)
def test_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PairOptions(**options)


# --- on the simulator, whose true rewards are known ----------------------------------------------


def means_of(chances: list[Chance], action: ExtractionAction, decisions: int) -> dict[float, float]:
    """Return the distribution of the mean reward of independent decisions: value -> probability."""
    single: dict[float, float] = defaultdict(float)
    for chance in chances:
        single[EXTRACTION.reward(chance.outcome, action).value] += chance.probability
    sums = {0.0: 1.0}
    for _ in range(decisions):
        longer: dict[float, float] = defaultdict(float)
        for (total, first), (value, second) in itertools.product(sums.items(), single.items()):
            longer[round(total + value, 9)] += first * second
        sums = longer
    return {total / decisions: probability for total, probability in sums.items()}


def chance_above(one: dict[float, float], other: dict[float, float], margin: float) -> float:
    """Return P(one > other + margin) of independent values."""
    values = np.array(sorted(one))
    tail = np.append(np.cumsum([one[value] for value in values][::-1])[::-1], 0.0)
    first_above = np.searchsorted(values, np.array(list(other)) + margin, side="right")
    return float(tail[first_above] @ np.array(list(other.values())))


class Expected(NamedTuple):
    """Expected numbers of pairs of one context."""

    wrong: float
    formed: float


def expected_pairs(
    state: ExtractionState, tried: Counter[ExtractionAction], margin: float
) -> Expected:
    """Add up, over all couples of actions, the chance that their means lie apart by the margin."""
    arms = [
        (
            true_reward("extraction", state, action),
            means_of(extraction_chances(state, action), action, decisions),
        )
        for action, decisions in tried.items()
    ]
    arms.sort(key=lambda arm: arm[0])
    wrong = formed = 0.0
    for (low, worse), (high, better) in itertools.combinations(arms, 2):
        reversed_chance = chance_above(worse, better, margin)
        formed += reversed_chance + chance_above(better, worse, margin)
        wrong += reversed_chance if high - low > 1e-9 else 0.0
    return Expected(wrong, formed)


def test_worse_actions_are_preferred_as_rarely_as_the_noise_allows() -> None:
    # Every pair above the margin is formed, so the expected number of wrong pairs is exact.
    # Contexts are independent: their deviations from it give the standard error of the sum.
    options = PairOptions(strategy="all")
    table = ExampleTable(EXTRACTION)
    for decision in simulate(
        "extraction", 2500, 1, situations=50, exploration=1.0, session_correlation=0.0
    ):
        table.append_decision(decision, "simulation")
    tried: dict[ExtractionState, Counter[ExtractionAction]] = defaultdict(Counter)
    for each in table.all():
        tried[each.state][each.action] += 1
    state_of = {EXTRACTION.render_prompt(state): state for state in tried}
    wrong: Counter[ExtractionState] = Counter()
    pairs = form_pairs(table.all(), EXTRACTION, options).pairs
    for pair in pairs:
        state = state_of[str(pair.prompt)]
        better, worse = (
            true_reward("extraction", state, EXTRACTION.parse_response(str(answer)))
            for answer in (pair.chosen, pair.rejected)
        )
        wrong[state] += better < worse - 1e-9
    expected = {
        state: expected_pairs(state, actions, options.threshold) for state, actions in tried.items()
    }
    deviations = [wrong[state] - expected[state].wrong for state in tried]
    standard_error = math.sqrt(sum(deviation**2 for deviation in deviations))
    expected_wrong = sum(each.wrong for each in expected.values())
    assert abs(sum(wrong.values()) - expected_wrong) < 4 * standard_error
    assert len(pairs) == pytest.approx(sum(each.formed for each in expected.values()), rel=0.05)
    right = 1 - sum(wrong.values()) / len(pairs)
    assert right > 1 - (expected_wrong + 4 * standard_error) / len(pairs) > 0.6
