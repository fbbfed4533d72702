import dataclasses
from typing import Any

import pytest

from dpo.data.kinds.base import EntryType
from dpo.data.kinds.retrieval import (
    MAX_RESULTS,
    RETRIEVAL,
    ContextFeatures,
    MemoryStats,
    QueryFeatures,
    RetrievalAction,
    RetrievalState,
    build_state,
    query_features,
)
from dpo.errors import InputError

PLAIN = RetrievalState(
    QueryFeatures(
        query_length=45,
        has_keywords=False,
        query_complexity=0.4,
        semantic_category="general",
    ),
    ContextFeatures(turn_number=3, conversation_depth=4, recent_tool_calls=1, has_errors=False),
    MemoryStats(total_entries=100, recent_retrievals=0, avg_retrieval_success=0.5),
)


def state(**changes: Any) -> RetrievalState:
    """Return PLAIN with some fields, of whichever group, changed."""
    groups = {
        field.name: dataclasses.replace(
            group, **{name: changes[name] for name in changes if hasattr(group, name)}
        )
        for field in dataclasses.fields(PLAIN)
        if (group := getattr(PLAIN, field.name))
    }
    return dataclasses.replace(PLAIN, **groups)


SKIP = RetrievalAction(should_retrieve=False)


def retrieve(max_results: int, *types: EntryType) -> RetrievalAction:
    return RetrievalAction(
        should_retrieve=True, scope="project", types=types or None, max_results=max_results
    )


def test_json_names_are_those_of_the_document() -> None:
    assert RETRIEVAL.state_to_json(state(last_retrieval_time=1704067200000)) == {
        "queryFeatures": {
            "queryLength": 45,
            "hasKeywords": False,
            "queryComplexity": 0.4,
            "semanticCategory": "general",
        },
        "contextFeatures": {
            "turnNumber": 3,
            "conversationDepth": 4,
            "recentToolCalls": 1,
            "hasErrors": False,
        },
        "memoryStats": {
            "totalEntries": 100,
            "recentRetrievals": 0,
            "avgRetrievalSuccess": 0.5,
            "lastRetrievalTime": 1704067200000,
        },
    }
    assert RETRIEVAL.action_to_json(retrieve(12, "tool", "guideline")) == {
        "shouldRetrieve": True,
        "scope": "project",
        "types": ["tool", "guideline"],
        "maxResults": 12,
    }


def test_the_prompt_is_the_document_template() -> None:
    prompt = RETRIEVAL.render_prompt(
        state(has_keywords=True, query_complexity=0.125, last_retrieval_time=1)
    )

    assert prompt == (
        "Query Features:\n"
        "- Length: 45\n"
        "- Has keywords: true\n"
        "- Complexity: 0.13\n"  # a tie, and away from zero
        "- Category: general\n"
        "\n"
        "Context:\n"
        "- Turn: 3\n"
        "- Depth: 4\n"
        "- Recent tool calls: 1\n"
        "- Has errors: false\n"
        "\n"
        "Memory Stats:\n"
        "- Total entries: 100\n"
        "- Recent retrievals: 0\n"
        "- Avg success: 0.50\n"
        "\n"
        "Should retrieve from memory?"
    )


def test_a_response_lists_its_types_on_lines_of_their_own() -> None:
    assert RETRIEVAL.render_action(retrieve(12, "tool", "guideline")) == (
        '{\n  "shouldRetrieve": true,\n  "scope": "project",\n'
        '  "types": [\n    "tool",\n    "guideline"\n  ],\n  "maxResults": 12\n}'
    )
    assert RETRIEVAL.render_action(SKIP) == '{\n  "shouldRetrieve": false\n}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shouldRetrieve": "yes"}, 'shouldRetrieve must be true or false, got "yes"'),
        ({"shouldRetrieve": True, "maxResults": 0}, "maxResults must be a whole number >= 1"),
        ({"shouldRetrieve": True, "scope": "team"}, "scope must be one of global, org, project"),
        ({"shouldRetrieve": True, "types": ["rule"]}, "types must be a list, each one of tool"),
    ],
)
def test_actions_outside_the_enums_and_ranges_are_refused(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RETRIEVAL.parse_action(data, "row 1")


def test_a_category_of_another_label_set_is_refused() -> None:
    data: dict[str, Any] = RETRIEVAL.state_to_json(PLAIN)
    data["queryFeatures"]["semanticCategory"] = "debugging"

    with pytest.raises(InputError, match=r"queryFeatures.semanticCategory must be one of social"):
        RETRIEVAL.parse_state(data, "row 1")


def test_the_class_is_the_text_of_should_retrieve() -> None:
    assert [RETRIEVAL.action_class(each) for each in (retrieve(5), SKIP)] == ["true", "false"]


def test_similar_states_share_length_in_tens_keywords_and_category() -> None:
    assert RETRIEVAL.group_key(state(query_length=50)) == (5, False, "general")
    assert RETRIEVAL.group_key(state(query_length=52, turn_number=9)) == (5, False, "general")
    assert RETRIEVAL.group_key(state(query_length=49)) == (4, False, "general")


@pytest.mark.parametrize(
    ("changes", "action", "confidence", "reason"),
    [
        (
            {"has_keywords": True, "query_complexity": 0.8, "has_errors": True},
            retrieve(20),
            0.95,
            "complex_query_with_keywords",
        ),
        ({"has_errors": True}, retrieve(15, "knowledge", "tool"), 0.9, "error_recovery"),
        ({"query_length": 15, "query_complexity": 0.2}, SKIP, 0.85, "simple_query"),
        (
            {"avg_retrieval_success": 0.85, "recent_retrievals": 3},
            retrieve(15),
            0.8,
            "recent_success",
        ),
        ({"conversation_depth": 25}, retrieve(10), 0.75, "deep_conversation"),
        ({"recent_tool_calls": 5}, retrieve(12, "tool", "guideline"), 0.8, "tool_heavy"),
        ({"total_entries": 0}, SKIP, 0.7, "low_utility_memory"),
        (
            {"avg_retrieval_success": 0.2, "recent_retrievals": 10},
            SKIP,
            0.7,
            "low_utility_memory",
        ),
        (
            {"avg_retrieval_success": 0.29, "recent_retrievals": 6},
            SKIP,
            0.7,
            "low_utility_memory",
        ),
        ({}, retrieve(15), 0.6, "default_retrieve"),
        ({"has_keywords": True, "query_complexity": 0.6}, retrieve(15), 0.6, "default_retrieve"),
    ],
)
def test_the_first_rule_that_matches_answers(
    changes: dict[str, Any], action: RetrievalAction, confidence: float, reason: str
) -> None:
    answer = RETRIEVAL.baseline(state(**changes))

    assert (answer.action, answer.confidence, answer.reason) == (action, confidence, reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"has_keywords": True, "query_complexity": 0.6},
        {"query_length": 20, "query_complexity": 0.2},
        {"query_length": 15, "query_complexity": 0.3},
        {"query_length": 15, "query_complexity": 0.2, "has_keywords": True},
        {"avg_retrieval_success": 0.7, "recent_retrievals": 3},
        {"avg_retrieval_success": 0.85, "recent_retrievals": 0},
        {"conversation_depth": 10},
        {"recent_tool_calls": 3},
        {"avg_retrieval_success": 0.3, "recent_retrievals": 10},
        {"avg_retrieval_success": 0.2, "recent_retrievals": 5},
        {"total_entries": 1},
    ],
)
def test_at_its_threshold_a_rule_does_not_match(changes: dict[str, Any]) -> None:
    assert RETRIEVAL.baseline(state(**changes)).reason == "default_retrieve"


def test_one_recent_retrieval_is_enough_for_recent_success() -> None:
    answer = RETRIEVAL.baseline(state(avg_retrieval_success=0.71, recent_retrievals=1))

    assert answer.reason == "recent_success"


def test_few_some_and_many_can_be_retrieved_of_all_types() -> None:
    retrievals = RETRIEVAL.actions()[1:]

    assert RETRIEVAL.actions()[0] == SKIP
    assert len(retrievals) == len(set(retrievals)) == 12
    assert {action.scope for action in retrievals} == {"project"}
    for types in MAX_RESULTS:
        assert {each.max_results for each in retrievals if each.types == types} >= {5, 15, 30}


@pytest.mark.parametrize(
    "changes",
    [
        {"has_keywords": True, "query_complexity": 0.8},
        {"has_errors": True},
        {"avg_retrieval_success": 0.85, "recent_retrievals": 3},
        {"conversation_depth": 25},
        {"recent_tool_calls": 5},
    ],
)
def test_an_empty_memory_is_never_searched(changes: dict[str, Any]) -> None:
    answer = RETRIEVAL.baseline(state(total_entries=0, **changes))

    assert (answer.action, answer.reason) == (SKIP, "low_utility_memory")


def ended(outcome_type: str, **scores: float) -> dict[str, Any]:
    return {"taskOutcomeType": outcome_type, **scores}


@pytest.mark.parametrize(
    ("outcome", "action", "value"),
    [
        # 1 + .5 - .1 + .3 = 1.7, cut
        (ended("success", contributionScore=0.8, relevanceScore=0.9), retrieve(10), 1.0),
        (ended("success", contributionScore=0.05), retrieve(10), 0.8),  # 1 - .1 - .1
        (ended("success"), SKIP, 1.0),  # 1 + .3, cut
        (ended("failure"), SKIP, -0.9),  # -.5 - .4
        (ended("partial"), SKIP, -0.1),  # .3 - .4
        (ended("unknown"), SKIP, 0.0),
        (ended("partial", contributionScore=0.3), retrieve(10), 0.4),  # .3 + .2 - .1
        (ended("failure", contributionScore=-0.3), retrieve(10), -0.9),  # -.5 - .3 - .1
        (ended("unknown", relevanceScore=0.6), retrieve(10), -0.1),  # -.1 - .1 + .1
        (ended("failure", contributionScore=-0.3, retrievedCount=25), retrieve(30), -1.0),
    ],
)
def test_a_task_is_rewarded_by_its_end_and_what_the_memory_gave(
    outcome: dict[str, Any], action: RetrievalAction, value: float
) -> None:
    assert RETRIEVAL.reward(outcome, action).value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "component", "value"),
    [
        ({"contributionScore": 0.51}, "contribution", 0.5),
        ({"contributionScore": 0.5}, "contribution", 0.2),
        ({"contributionScore": 0.21}, "contribution", 0.2),
        ({"contributionScore": 0.2}, "contribution", -0.1),
        ({"contributionScore": -0.2}, "contribution", -0.1),
        ({"contributionScore": -0.21}, "contribution", -0.3),
        ({"relevanceScore": 0.81}, "relevance", 0.3),
        ({"relevanceScore": 0.8}, "relevance", 0.1),
        ({"relevanceScore": 0.51}, "relevance", 0.1),
        ({"relevanceScore": 0.5}, "relevance", 0.0),
        ({"retrievedCount": 20}, "cost", -0.1),
        ({"retrievedCount": 21}, "cost", -0.2),
    ],
)
def test_a_score_counts_by_its_band(scores: dict[str, float], component: str, value: float) -> None:
    reward = RETRIEVAL.reward(ended("success", **scores), retrieve(30))

    assert reward.components[component] == value


def test_a_reward_shows_its_components() -> None:
    outcome = ended("partial", contributionScore=0.2, relevanceScore=0.9, retrievedCount=21)

    assert RETRIEVAL.reward(outcome, retrieve(30)).components == {
        "outcome": 0.3,
        "contribution": -0.1,
        "cost": -0.2,
        "relevance": 0.3,
    }


def test_a_skip_shows_its_components() -> None:
    assert RETRIEVAL.reward(ended("success"), SKIP).components == {
        "outcome": 1.0,
        "contribution": 0.3,
    }


@pytest.mark.parametrize(
    ("outcome", "action", "explanation"),
    [
        (
            ended("success", contributionScore=0.6),
            retrieve(5),
            "Retrieval helped task success (contribution: 60%)",
        ),
        (
            ended("failure", contributionScore=0.6),
            retrieve(5),
            "Retrieved but task failed - retrieval did not help",
        ),
        (
            ended("success", contributionScore=0.3),
            retrieve(5),
            "Retrieved but had minimal impact on outcome",
        ),
        (ended("success"), retrieve(5), "Retrieved but had minimal impact on outcome"),
        (ended("success"), SKIP, "Skipped retrieval and succeeded - it was not needed"),
        (ended("failure"), SKIP, "Skipped retrieval and failed - might have helped"),
        (ended("partial"), SKIP, "Skipped retrieval and succeeded in part - it might have helped"),
        (ended("unknown"), SKIP, "Skipped retrieval and the task's end is unknown"),
    ],
)
def test_a_reward_is_explained(
    outcome: dict[str, Any], action: RetrievalAction, explanation: str
) -> None:
    assert RETRIEVAL.reward(outcome, action).explanation == explanation


@pytest.mark.parametrize(
    ("outcome", "action", "message"),
    [
        (ended("success", contributionScore=0.5), SKIP, "not retrieving: contributionScore is not"),
        (ended("won"), SKIP, "outcome of not retrieving: taskOutcomeType must be one of success"),
        (ended("success", contributionScore=2), retrieve(5), r"retrieving: contrib.* \[-1, 1\]"),
    ],
)
def test_an_outcome_that_the_action_cannot_have_is_refused(
    outcome: dict[str, Any], action: RetrievalAction, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        RETRIEVAL.reward(outcome, action)


def test_figures_of_session_and_memory_are_kept_zeros_too() -> None:
    context = ContextFeatures(0, 0, 0, has_errors=False)
    memory = MemoryStats(0, 0, 0.0)

    built = build_state("What is in the store?", context=context, memory=memory)

    assert (built.context_features, built.memory_stats) == (context, memory)


def test_a_question_about_the_system_has_keywords() -> None:
    features = query_features("How does the authentication system work?")

    assert (features.query_length, features.has_keywords) == (40, True)


@pytest.mark.parametrize(
    ("query", "category"),
    [
        ("hello there, my friend", "social"),
        ("fix it", "social"),
        ("How does it work?", "question"),
        ("where the settings are kept", "question"),
        ("list all of the open tasks", "command"),
        ("I need to know how to do this", "information_seeking"),
        ("a class that holds settings", "technical"),
        ("the thing from last time again", "memory_recall"),
        ("the weather is fine today", "general"),
        ("history of this whole project", "general"),  # no "hi", no "who"
        ("listen to the sound of rain", "general"),  # no "list"
        ("decode the following message", "general"),  # no "code"
    ],
)
def test_a_query_gets_the_first_category_that_fits(query: str, category: str) -> None:
    assert query_features(query).semantic_category == category


def test_keywords_count_where_a_word_begins() -> None:
    assert not query_features("somehow it decodes the unlisted ones").has_keywords
    assert query_features("please explain").has_keywords
    assert query_features("ok?").has_keywords


def test_complexity_adds_up_length_words_sentences_identifiers_and_code() -> None:
    explain = (
        "Explain how TokenStore works with the cache and why. "
        "Then show the places in which it is used"
    )

    features = query_features(explain)

    assert features.query_length == 93  # .2
    # and .1 + .1 for 18 words, .1 for two sentences, .05 for one identifier
    assert features.query_complexity == 0.2 + 0.1 + 0.1 + 0.1 + 0.05


@pytest.mark.parametrize(
    ("query", "complexity"),
    [
        ("x" * 50, 0.0),
        ("x" * 51, 0.2),
        ("x" * 100, 0.2),
        ("x" * 101, 0.4),
        ("x" * 200, 0.4),
        ("x" * 201, 0.5),
        ("a " * 5, 0.0),
        ("a " * 6, 0.1),
        ("a " * 10, 0.1),
        ("a " * 11, 0.2),
        ("a " * 20, 0.2),
        ("a " * 21, 0.3),
        ("a.", 0.0),
        ("a. b.", 0.1),
        ("a. b. c.", 0.2),
        ("TokenStore", 0.05),
        ("TokenStore " * 4, 0.2),
        ("TokenStore " * 5, 0.4),  # .2 for 55 characters, .2 for identifiers
        ("`x`", 0.2),
        ("TokenStore `x`. " * 50, 1.0),
    ],
)
def test_each_trait_adds_its_gain_to_the_complexity(query: str, complexity: float) -> None:
    assert query_features(query).query_complexity == pytest.approx(complexity, abs=1e-12)


def test_fourteen_characters_are_social_and_fifteen_are_not() -> None:
    assert query_features("n" * 14).semantic_category == "social"
    assert query_features("n" * 15).semantic_category == "general"


def test_a_length_counts_utf16_units() -> None:
    assert query_features("😀" * 10).query_length == 20
