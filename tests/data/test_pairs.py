"""Pairs: what is compared, what is chosen, and that nothing degenerate comes out."""

from collections.abc import Sequence
from dataclasses import astuple
from datetime import UTC, datetime
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.examples import Example, ExampleMetadata
from dpo.data.kinds.extraction import (
    EXTRACTION,
    ContentFeatures,
    ContextFeatures,
    ExtractionAction,
    ExtractionState,
    MemoryState,
)
from dpo.data.pairs import PairFormation, PairOptions, form_pairs

ExtractionExample: TypeAlias = Example[ExtractionState, ExtractionAction]

STORE = ExtractionAction("store", "knowledge", 80)
SKIP = ExtractionAction("skip")
DEFER = ExtractionAction("defer")
ACTIONS = (STORE, SKIP, DEFER, ExtractionAction("store", "tool", 20))


def state(*, turn: int = 5, tokens: int = 250) -> ExtractionState:
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
    return Example(state(turn=turn, tokens=tokens), action, reward, metadata)


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


@given(examples=EXAMPLES, options=OPTIONS)
def test_no_pair_is_degenerate_repeated_or_contradicted(
    examples: list[ExtractionExample], options: PairOptions
) -> None:
    pairs = [
        (pair.prompt, pair.chosen, pair.rejected) for pair in pairs_of(examples, options).pairs
    ]
    assert all(chosen != rejected for _, chosen, rejected in pairs)
    assert len({(prompt, frozenset(answers)) for prompt, *answers in pairs}) == len(pairs)


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
    assert pair.prompt == EXTRACTION.render_prompt(state())
    assert pair.chosen == EXTRACTION.render_action(STORE)
    assert pair.rejected == EXTRACTION.render_action(SKIP)


@pytest.mark.parametrize(
    ("better", "worse"), [(0.6, 0.5), (0.3, 0.2), (0.1, 0.0), (0.8, 0.7), (0.5, 0.49), (0.4, 0.4)]
)
def test_difference_of_exactly_the_margin_makes_no_pair(better: float, worse: float) -> None:
    # In floats 0.8 - 0.7 is 0.10000000000000009 and 0.6 - 0.5 is 0.09999999999999998.
    assert not pairs_of([example(STORE, better), example(SKIP, worse)]).pairs


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
    assert evidence.group_key == EXTRACTION.group_key(state())


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
    assert pair.prompt == EXTRACTION.render_prompt(state(tokens=1))
