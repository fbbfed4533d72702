import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import pytest

from dpo.data.kinds.base import EntryType
from dpo.data.kinds.extraction import (
    EXTRACTION,
    ContentFeatures,
    ContextFeatures,
    ExtractionAction,
    ExtractionState,
    MemoryState,
    SessionMetrics,
    build_state,
    content_features,
)
from dpo.errors import InputError

STORE = ExtractionAction("store", "knowledge", 80)
SKIP, DEFER = ExtractionAction("skip"), ExtractionAction("defer")

PLAIN = ExtractionState(
    ContextFeatures(
        turn_number=5,
        token_count=250,
        tool_call_count=2,
        has_error=False,
        user_turn_count=3,
        assistant_turn_count=2,
    ),
    MemoryState(
        total_entries=40,
        recent_extractions=1,
        similar_entry_exists=False,
        session_capture_count=0,
    ),
    ContentFeatures(
        has_decision=False,
        has_rule=False,
        has_fact=False,
        has_command=False,
        novelty_score=0.5,
        complexity=0.5,
    ),
)


def state(**changes: Any) -> ExtractionState:
    """Return PLAIN with some fields, of whichever group, changed."""
    groups = {
        field.name: dataclasses.replace(
            group, **{name: changes[name] for name in changes if hasattr(group, name)}
        )
        for field in dataclasses.fields(PLAIN)
        if (group := getattr(PLAIN, field.name))
    }
    return dataclasses.replace(PLAIN, **groups)


def test_json_names_are_those_of_the_document() -> None:
    assert EXTRACTION.state_to_json(PLAIN) == {
        "contextFeatures": {
            "turnNumber": 5,
            "tokenCount": 250,
            "toolCallCount": 2,
            "hasError": False,
            "userTurnCount": 3,
            "assistantTurnCount": 2,
        },
        "memoryState": {
            "totalEntries": 40,
            "recentExtractions": 1,
            "similarEntryExists": False,
            "sessionCaptureCount": 0,
        },
        "contentFeatures": {
            "hasDecision": False,
            "hasRule": False,
            "hasFact": False,
            "hasCommand": False,
            "noveltyScore": 0.5,
            "complexity": 0.5,
        },
    }
    assert EXTRACTION.action_to_json(STORE) == {
        "decision": "store",
        "entryType": "knowledge",
        "priority": 80,
    }


def test_the_prompt_is_the_document_template() -> None:
    prompt = EXTRACTION.render_prompt(state(has_error=True, novelty_score=0.625, has_fact=True))

    assert prompt == (
        "Context:\n"
        "- Turn: 5\n"
        "- Tokens: 250\n"
        "- Tool calls: 2\n"
        "- Has error: true\n"
        "\n"
        "Memory State:\n"
        "- Total entries: 40\n"
        "- Recent extractions: 1\n"
        "- Similar entry exists: false\n"
        "\n"
        "Content Features:\n"
        "- Has decision: false\n"
        "- Has rule: false\n"
        "- Has fact: true\n"
        "- Has command: false\n"
        "- Novelty: 0.63\n"  # a tie, and away from zero
        "- Complexity: 0.50\n"
        "\n"
        "What action should be taken?"
    )


def test_a_response_is_pretty_json_in_the_order_of_the_fields() -> None:
    assert EXTRACTION.render_action(STORE) == (
        '{\n  "decision": "store",\n  "entryType": "knowledge",\n  "priority": 80\n}'
    )
    assert EXTRACTION.render_action(SKIP) == '{\n  "decision": "skip"\n}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"decision": "keep"}, 'decision must be one of store, skip, defer, got "keep"'),
        ({"decision": "store", "priority": 101}, r"priority must be .* in \[0, 100\], got 101"),
        ({"decision": "store", "entryType": "rule"}, "entryType must be one of tool, guideline"),
    ],
)
def test_actions_outside_the_enums_and_ranges_are_refused(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EXTRACTION.parse_action(data, "row 1")


def test_the_class_is_the_decision() -> None:
    assert [EXTRACTION.action_class(each) for each in (STORE, SKIP, DEFER)] == [
        "store",
        "skip",
        "defer",
    ]


def test_similar_states_share_turn_and_flags() -> None:
    assert EXTRACTION.group_key(PLAIN) == (5, False, False, False, False, False, False)
    assert EXTRACTION.group_key(state(token_count=9, novelty_score=1.0)) == EXTRACTION.group_key(
        PLAIN
    )


def store(entry_type: EntryType, priority: int) -> ExtractionAction:
    return ExtractionAction("store", entry_type, priority)


@pytest.mark.parametrize(
    ("changes", "action", "confidence", "reason"),
    [
        ({"similar_entry_exists": True, "has_error": True}, SKIP, 0.9, "duplicate_content"),
        ({"has_error": True, "has_rule": True}, store("knowledge", 75), 0.85, "error_occurred"),
        (
            {"has_rule": True, "has_command": True},
            store("guideline", 70),
            0.8,
            "strong_content_signal",
        ),
        (
            {"has_command": True, "has_decision": True},
            store("tool", 60),
            0.8,
            "strong_content_signal",
        ),
        (
            {"has_decision": True, "novelty_score": 0.71},
            store("knowledge", 65),
            0.8,
            "strong_content_signal",
        ),
        ({"has_decision": True, "novelty_score": 0.7}, SKIP, 0.6, "low_value_content"),
        ({"turn_number": 2}, DEFER, 0.7, "early_conversation"),
        ({"turn_number": 2, "has_fact": True}, SKIP, 0.6, "low_value_content"),
        ({"turn_number": 3}, SKIP, 0.6, "low_value_content"),
        (
            {"novelty_score": 0.9, "complexity": 0.7, "has_fact": True},
            store("knowledge", 90),
            0.75,
            "high_novelty",
        ),
        (
            {"novelty_score": 0.65, "complexity": 0.51},
            store("experience", 65),
            0.75,
            "high_novelty",
        ),
        (
            {"session_capture_count": 6, "novelty_score": 0.3},
            SKIP,
            0.8,
            "capture_rate_limit",
        ),
        ({}, SKIP, 0.6, "low_value_content"),
    ],
)
def test_the_first_rule_that_matches_answers(
    changes: dict[str, Any], action: ExtractionAction, confidence: float, reason: str
) -> None:
    answer = EXTRACTION.baseline(state(**changes))

    assert (answer.action, answer.confidence, answer.reason) == (action, confidence, reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"novelty_score": 0.6, "complexity": 0.6},
        {"novelty_score": 0.9, "complexity": 0.5},
        {"session_capture_count": 5, "novelty_score": 0.3},
        {"session_capture_count": 6, "novelty_score": 0.5},
    ],
)
def test_at_its_threshold_a_rule_does_not_match(changes: dict[str, Any]) -> None:
    assert EXTRACTION.baseline(state(**changes)).reason == "low_value_content"


def test_low_middle_and_high_can_be_chosen_for_every_type() -> None:
    stores = EXTRACTION.actions()[2:]

    assert EXTRACTION.actions()[:2] == (SKIP, DEFER)
    assert len(stores) == len(set(stores)) == 23
    for entry_type in get_args(EntryType):
        priorities = {action.priority for action in stores if action.entry_type == entry_type}
        assert priorities >= {20, 50, 80}


def stored(retrievals: int, successes: int, failures: int, days: int) -> dict[str, Any]:
    return {
        "retrievalCount": retrievals,
        "successCount": successes,
        "failureCount": failures,
        "daysSinceCreation": days,
    }


@pytest.mark.parametrize(
    ("outcome", "value"),
    [
        (stored(0, 0, 0, 10), -0.4),  # -.3 unused, -.1 stored
        (stored(0, 0, 0, 40), -0.56),  # (-.3 - .4) * .8
        (stored(15, 12, 3, 20), 1.0),  # .8 + .5, cut
        (stored(10, 2, 8, 15), 0.5),  # .8 - .3
        (stored(10, 8, 2, 100), 0.65),  # (.8 + .5) * .5
        (stored(2, 1, 1, 0), 0.4),  # .2 + .2
        (stored(2, 0, 0, 0), 0.2),  # used, never judged
        (stored(9, 0, 0, 31), 0.4),  # .5 * .8
        (stored(2, 0, 2, 0), -0.1),  # .2 - .3
        (stored(1, 0, 0, 0), 0.2),
        (stored(3, 0, 0, 0), 0.5),
        (stored(10, 0, 0, 0), 0.8),
        (stored(10, 7, 3, 0), 1.0),  # .8 + .2: 7 of 10 is not above .7
        (stored(3, 7, 3, 0), 0.7),  # .5 + .2
        (stored(3, 4, 6, 0), 0.2),  # .5 - .3: 4 of 10 is not above .4
        (stored(0, 0, 0, 30), -0.4),  # neither late nor decayed yet
        (stored(3, 0, 0, 90), 0.4),  # .5 * .8
    ],
)
def test_an_entry_is_rewarded_by_its_use(outcome: dict[str, Any], value: float) -> None:
    assert EXTRACTION.reward(outcome, STORE).value == pytest.approx(value, abs=1e-12)


def test_a_reward_shows_its_components() -> None:
    assert EXTRACTION.reward(stored(10, 8, 2, 100), STORE).components == {
        "usage": 0.8,
        "success": 0.5,
        "storage": 0.0,
        "decay": 0.5,
    }


@pytest.mark.parametrize(
    ("outcome", "explanation"),
    [
        (stored(0, 0, 0, 10), "Entry never retrieved - wasted storage"),
        (stored(8, 7, 1, 10), "Entry retrieved 8 times with 88% success - valuable"),  # 87.5
        (stored(10, 2, 8, 15), "Entry retrieved 10 times with low success rate - possibly harmful"),
        (stored(3, 0, 0, 1), "Entry retrieved 3 times - useful"),
    ],
)
def test_a_reward_is_explained(outcome: dict[str, Any], explanation: str) -> None:
    assert EXTRACTION.reward(outcome, STORE).explanation == explanation


@pytest.mark.parametrize(
    ("missed", "action", "value", "explanation"),
    [
        (0, SKIP, 0.0, "Skipped and never missed"),
        (2, SKIP, -0.4, "Skipped and missed 2 times"),
        (9, SKIP, -1.0, "Skipped and missed 9 times"),
        (0, DEFER, -0.01, "Deferred and never missed"),
        (9, DEFER, -1.0, "Deferred and missed 9 times"),
    ],
)
def test_what_was_not_stored_is_judged_by_how_often_it_was_missed(
    missed: int, action: ExtractionAction, value: float, explanation: str
) -> None:
    reward = EXTRACTION.reward({"missedCount": missed}, action)

    assert reward.value == pytest.approx(value, abs=1e-12)
    assert reward.explanation == explanation


@pytest.mark.parametrize(
    ("outcome", "action", "message"),
    [
        ({"missedCount": 1}, STORE, "outcome of store: retrievalCount is missing;.*missedCount"),
        (stored(1, 1, 0, 1), SKIP, "outcome of skip: missedCount is missing;.*retrievalCount"),
        ({"missedCount": -1}, DEFER, "outcome of defer: missedCount must be .* >= 0, got -1"),
    ],
)
def test_an_outcome_that_the_action_cannot_have_is_refused(
    outcome: dict[str, Any], action: ExtractionAction, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        EXTRACTION.reward(outcome, action)


def features_of(*turns: str) -> ContentFeatures:
    return build_state(turns, metrics=METRICS, memory=PLAIN.memory_state).content_features


METRICS = SessionMetrics(
    turn_count=2,
    user_turn_count=1,
    assistant_turn_count=1,
    tool_call_count=3,
    error_count=1,
    total_tokens=150,
)


def test_counters_are_copied_and_errors_become_a_flag() -> None:
    context = build_state(["Hi"], metrics=METRICS, memory=PLAIN.memory_state).context_features

    assert context == ContextFeatures(2, 150, 3, True, 1, 1)


def test_without_errors_there_is_no_error_flag() -> None:
    metrics = dataclasses.replace(METRICS, error_count=0)

    assert not build_state(
        [], metrics=metrics, memory=PLAIN.memory_state
    ).context_features.has_error


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("You should always write tests", lambda found: found.has_rule),
        ("We decided on SQLite because it is simple", lambda found: found.has_decision),
        ("Run `npm test` first", lambda found: found.has_command),
        ("then docker build .", lambda found: found.has_command),
        ("The service uses port 80", lambda found: found.has_fact),
    ],
)
def test_keywords_set_the_flags(text: str, flag: Callable[[ContentFeatures], bool]) -> None:
    assert flag(features_of(text))


def test_a_keyword_inside_another_word_is_none() -> None:
    found = features_of("This causes mischief in all houses; the conversion is fine")

    assert found == ContentFeatures(
        has_decision=False,
        has_rule=False,
        has_fact=False,
        has_command=False,
        novelty_score=0.5,
        complexity=0.0,
    )


def test_only_the_last_three_turns_are_read() -> None:
    assert not features_of("You must", "two", "three", "four").has_rule
    assert features_of("one", "You must", "three", "four").has_rule


def test_identifiers_raise_the_novelty() -> None:
    assert features_of("The TokenStore and the HttpClient").novelty_score == 0.5 + 0.05 * 2
    assert features_of("the tokenstore and the httpclient").novelty_score == 0.5


def test_novelty_adds_up_length_identifiers_and_code_and_stops_at_one() -> None:
    assert content_features("x" * 500).novelty_score == 0.5
    assert content_features("x" * 501).novelty_score == 0.7
    assert content_features("x" * 1000).novelty_score == 0.7
    assert content_features("```\n```" * 9).novelty_score == 0.7
    assert content_features("TokenStore " * 9).novelty_score == 0.8
    assert content_features("x" * 1001 + "```\n```").novelty_score == 0.5 + 0.2 + 0.1 + 0.1
    assert content_features("TokenStore " * 200 + "```\n``` " * 3).novelty_score == 1.0


def test_complexity_of_an_async_example_is_exactly_a_half() -> None:
    example = "async function load(ids: Id[]) { interface Row { id: Id } }"

    assert content_features(example).complexity == 0.1 + 0.1 + 0.1 + 0.2 == 0.5


@pytest.mark.parametrize(
    ("words", "complexity"),
    [(50, 0.0), (51, 0.2), (100, 0.2), (101, 0.4), (200, 0.4), (201, 0.5)],
)
def test_complexity_grows_with_the_words(words: int, complexity: float) -> None:
    assert content_features("word " * words).complexity == complexity


@pytest.mark.parametrize(("pieces", "complexity"), [(3, 0.0), (4, 0.1), (6, 0.1), (7, 0.2)])
def test_complexity_grows_with_the_sentences(pieces: int, complexity: float) -> None:
    assert content_features("x. " * (pieces - 1)).complexity == complexity


def test_complexity_stops_at_one() -> None:
    rich = "async function f(a: {b: [c]}): type. " * 100

    assert content_features(rich).complexity == 1.0
