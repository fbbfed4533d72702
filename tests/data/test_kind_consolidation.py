import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dpo.data.kinds.consolidation import (
    CONSOLIDATION,
    ActionName,
    ConsolidationAction,
    ConsolidationState,
    GroupEntry,
    GroupFeatures,
    GroupUsage,
    MergeStrategy,
    ScopeFigures,
    ScopeStats,
    UsageStats,
    build_state,
)
from dpo.errors import InputError

PLAIN = ConsolidationState(
    GroupFeatures(
        group_size=5,
        avg_similarity=0.4,
        min_similarity=0.3,
        max_similarity=0.5,
        entry_types=("knowledge", "tool"),
    ),
    UsageStats(
        total_retrievals=10, avg_retrieval_rank=5.0, success_rate=0.5, last_accessed_days_ago=10
    ),
    ScopeStats(scope_type="project", total_entries_in_scope=500, duplicate_ratio=0.25),
)


def state(**changes: Any) -> ConsolidationState:
    """Return PLAIN with some fields, of whichever group, changed."""
    groups = {
        field.name: dataclasses.replace(
            group, **{name: changes[name] for name in changes if hasattr(group, name)}
        )
        for field in dataclasses.fields(PLAIN)
        if (group := getattr(PLAIN, field.name))
    }
    return dataclasses.replace(PLAIN, **groups)


def named(name: ActionName) -> ConsolidationAction:
    return ConsolidationAction(name)


def merge(strategy: MergeStrategy) -> ConsolidationAction:
    return ConsolidationAction("merge", merge_strategy=strategy)


def test_json_names_are_those_of_the_document() -> None:
    assert CONSOLIDATION.state_to_json(PLAIN) == {
        "groupFeatures": {
            "groupSize": 5,
            "avgSimilarity": 0.4,
            "minSimilarity": 0.3,
            "maxSimilarity": 0.5,
            "entryTypes": ["knowledge", "tool"],
        },
        "usageStats": {
            "totalRetrievals": 10,
            "avgRetrievalRank": 5.0,
            "successRate": 0.5,
            "lastAccessedDaysAgo": 10,
        },
        "scopeStats": {
            "scopeType": "project",
            "totalEntriesInScope": 500,
            "duplicateRatio": 0.25,
        },
    }
    assert CONSOLIDATION.action_to_json(ConsolidationAction("merge", ("e1", "e2"), "union")) == {
        "action": "merge",
        "targetEntries": ["e1", "e2"],
        "mergeStrategy": "union",
    }


def test_the_prompt_is_the_document_template() -> None:
    prompt = CONSOLIDATION.render_prompt(
        state(avg_similarity=0.85, success_rate=0.7, avg_retrieval_rank=2.125)
    )

    assert prompt == (
        "Group Features:\n"
        "- Size: 5\n"
        "- Avg similarity: 0.85\n"
        "- Min similarity: 0.30\n"
        "- Max similarity: 0.50\n"
        "- Entry types: knowledge, tool\n"
        "\n"
        "Usage Stats:\n"
        "- Total retrievals: 10\n"
        "- Avg rank: 2.13\n"  # a tie, and away from zero
        "- Success rate: 0.70\n"
        "- Days since access: 10\n"
        "\n"
        "Scope Stats:\n"
        "- Type: project\n"
        "- Total entries: 500\n"
        "- Duplicate ratio: 0.25\n"
        "\n"
        "What consolidation action should be taken?"
    )


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("groupFeatures", "groupSize", 0, "groupSize must be a whole number >= 1, got 0"),
        ("groupFeatures", "minSimilarity", -0.05, r"minSimilarity must be a number in \[0, 1\]"),
        ("groupFeatures", "entryTypes", ["rule"], "entryTypes must be a list, each one of tool"),
        ("usageStats", "lastAccessedDaysAgo", -1, "lastAccessedDaysAgo must be .* >= 0, got -1"),
        ("scopeStats", "scopeType", "team", 'scopeType must be one of global.*, got "team"'),
        ("scopeStats", "duplicateRatio", float("nan"), "duplicateRatio must be .* >= 0, got NaN"),
    ],
)
def test_states_outside_the_enums_and_ranges_are_refused(
    group: str, field: str, value: object, message: str
) -> None:
    data: dict[str, Any] = CONSOLIDATION.state_to_json(PLAIN)
    data[group] = {**data[group], field: value}

    with pytest.raises(InputError, match=rf"row 1: {group}\.{message}"):
        CONSOLIDATION.parse_state(data, "row 1")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"action": "delete"}, 'action must be one of merge, .*, got "delete"'),
        ({"action": "merge", "mergeStrategy": "sum"}, "mergeStrategy must be one of union"),
        ({"action": "merge", "targetEntries": [1]}, "targetEntries must be a list, each text"),
    ],
)
def test_actions_outside_the_enums_are_refused(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CONSOLIDATION.parse_action(data, "row 1")


def test_a_duplicate_ratio_may_pass_one() -> None:
    data = CONSOLIDATION.state_to_json(state(duplicate_ratio=1.5))

    assert CONSOLIDATION.parse_state(data, "row 1").scope_stats.duplicate_ratio == 1.5


def test_similar_states_share_size_similarity_in_tenths_and_scope() -> None:
    assert CONSOLIDATION.group_key(state(avg_similarity=0.95)) == (5, 9, "project")
    assert CONSOLIDATION.group_key(state(avg_similarity=0.94)) == (5, 9, "project")


@pytest.mark.parametrize(
    ("changes", "action", "confidence", "reason"),
    [
        ({"min_similarity": 0.99}, named("dedupe"), 0.95, "exact_duplicates"),
        (
            {"total_retrievals": 0, "last_accessed_days_ago": 95},
            named("archive"),
            0.9,
            "unused_old_entries",
        ),
        (
            {"success_rate": 0.2, "last_accessed_days_ago": 61},
            named("archive"),
            0.85,
            "low_success_old_entries",
        ),
        (
            {"avg_similarity": 0.85, "total_retrievals": 9},
            merge("union"),
            0.8,
            "similar_low_usage",
        ),
        (
            {"group_size": 8, "total_retrievals": 55, "success_rate": 0.8},
            named("abstract"),
            0.85,
            "pattern_abstraction",
        ),
        (
            {"avg_similarity": 0.95, "min_similarity": 0.92, "entry_types": ("tool",)},
            merge("weighted"),
            0.75,
            "similar_same_type",
        ),
        (
            {"duplicate_ratio": 0.31, "avg_similarity": 0.66},
            merge("intersection"),
            0.7,
            "reduce_duplicates",
        ),
        (
            {"last_accessed_days_ago": 6, "success_rate": 0.71},
            named("keep"),
            0.9,
            "active_successful",
        ),
        ({"avg_retrieval_rank": 2.0}, named("keep"), 0.85, "high_quality"),
        ({}, named("keep"), 0.6, "default_keep"),
    ],
)
def test_the_first_rule_that_matches_answers(
    changes: dict[str, Any], action: ConsolidationAction, confidence: float, reason: str
) -> None:
    answer = CONSOLIDATION.baseline(state(**changes))

    assert (answer.action, answer.confidence, answer.reason) == (action, confidence, reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_similarity": 0.95},
        {"min_similarity": 0.99, "group_size": 1},
        {"total_retrievals": 0, "last_accessed_days_ago": 90},
        {"total_retrievals": 1, "last_accessed_days_ago": 95},
        {"success_rate": 0.3, "last_accessed_days_ago": 61},
        {"success_rate": 0.2, "last_accessed_days_ago": 60},
        {"success_rate": 0.2, "last_accessed_days_ago": 61, "total_retrievals": 5},
        {"avg_similarity": 0.8, "total_retrievals": 9},
        {"avg_similarity": 0.85, "total_retrievals": 10},
        {"avg_similarity": 0.85, "total_retrievals": 9, "group_size": 1},
        {"group_size": 4, "total_retrievals": 55, "success_rate": 0.8},
        {"total_retrievals": 50, "success_rate": 0.8},
        {"total_retrievals": 55, "success_rate": 0.6},
        {"avg_similarity": 0.7, "entry_types": ("tool",)},
        {"avg_similarity": 0.75, "entry_types": ("tool",), "group_size": 2},
        {"avg_similarity": 0.75},
        {"duplicate_ratio": 0.3, "avg_similarity": 0.66},
        {"duplicate_ratio": 0.31, "avg_similarity": 0.65},
        {"last_accessed_days_ago": 7, "success_rate": 0.71},
        {"last_accessed_days_ago": 6, "success_rate": 0.7},
        {"avg_retrieval_rank": 3.0},
        {"avg_retrieval_rank": 0.0, "total_retrievals": 0},
    ],
)
def test_at_its_threshold_a_rule_does_not_match(changes: dict[str, Any]) -> None:
    assert CONSOLIDATION.baseline(state(**changes)).reason == "default_keep"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"min_similarity": 0.96, "group_size": 2}, "exact_duplicates"),
        (
            {"success_rate": 0.29, "last_accessed_days_ago": 61, "total_retrievals": 6},
            "low_success_old_entries",
        ),
        ({"total_retrievals": 0, "last_accessed_days_ago": 91}, "unused_old_entries"),
        ({"avg_similarity": 0.81, "total_retrievals": 9, "group_size": 2}, "similar_low_usage"),
        ({"total_retrievals": 51, "success_rate": 0.61}, "pattern_abstraction"),
        (
            {"avg_similarity": 0.71, "entry_types": ("tool",), "group_size": 3},
            "similar_same_type",
        ),
        ({"duplicate_ratio": 0.31, "avg_similarity": 0.66, "group_size": 2}, "reduce_duplicates"),
        ({"avg_retrieval_rank": 2.9, "total_retrievals": 1}, "high_quality"),
    ],
)
def test_just_past_its_threshold_a_rule_matches(changes: dict[str, Any], reason: str) -> None:
    assert CONSOLIDATION.baseline(state(**changes)).reason == reason


def test_a_single_entry_is_never_merged() -> None:
    changes: dict[str, Any] = {"group_size": 1, "duplicate_ratio": 0.9, "total_retrievals": 1}

    answer = CONSOLIDATION.baseline(state(avg_similarity=1.0, min_similarity=1.0, **changes))

    assert answer.action == named("keep")


def change(
    retrieval: tuple[float, float], success: tuple[float, float], storage: tuple[int, int]
) -> dict[str, Any]:
    """Return an outcome from the figures (before, after)."""
    return {
        "preRetrievalRate": retrieval[0],
        "postRetrievalRate": retrieval[1],
        "preSuccessRate": success[0],
        "postSuccessRate": success[1],
        "preStorageCount": storage[0],
        "postStorageCount": storage[1],
    }


@pytest.mark.parametrize(
    ("name", "outcome", "value"),
    [
        ("merge", change((0.6, 0.75), (0.6, 0.75), (3, 1)), 1.0),
        ("merge", change((0.8, 0.5), (0.8, 0.4), (2, 1)), -1.0),
        ("dedupe", change((0.5, 0.5), (0.7, 0.7), (2, 1)), 0.45),  # 2 to 1 is not below -.5
        ("archive", change((0.2, 0.0), (0.2, 0.2), (1, 0)), 0.55),
        # .8 - .9 is not below -.1 in floats: -.4 - .2 + .3 - .05
        ("archive", change((0.9, 0.9), (0.9, 0.8), (1, 0)), -0.35),
        # .75 - .65 is not above .1 in floats: .2 + .5 + .3 - .1
        ("abstract", change((0.65, 0.75), (0.65, 0.8), (8, 1)), 0.9),
        ("keep", change((0.5, 0.5), (0.5, 0.5), (3, 3)), 0.0),
        ("keep", change((0.5, 0.5), (0.5, 0.55), (3, 1)), 0.2),  # storage does not count
        ("merge", change((0.5, 0.5), (0.5, 0.5), (0, 0)), 0.1),  # no division by zero
        ("merge", change((0.5, 0.5), (0.5, 0.5), (10, 7)), 0.3),  # .2 + .2 - .1
        ("merge", change((0.5, 0.5), (0.5, 0.5), (10, 9)), 0.2),  # .2 + .1 - .1
        ("dedupe", change((0.5, 0.4), (0.5, 0.45), (2, 2)), -0.55),  # -.3 - .2 - .05
    ],
)
def test_a_change_is_rewarded(name: ActionName, outcome: dict[str, Any], value: float) -> None:
    assert CONSOLIDATION.reward(outcome, named(name)).value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "before_after", "value"),
    [
        ("archive", (0.1, 0.0), 0.3),
        ("archive", (0.0, 0.0), -0.4),
        ("merge", (0.0, 0.11), 0.5),
        ("merge", (0.0, 0.1), 0.2),
        ("abstract", (0.09, 0.0), 0.2),
        ("abstract", (0.1, 0.0), -0.5),
        ("dedupe", (0.0, 0.04), 0.3),
        ("dedupe", (0.0, 0.05), -0.3),
        ("dedupe", (0.05, 0.0), -0.3),
        ("keep", (0.0, 1.0), 0.0),
    ],
)
def test_a_change_in_retrievals_counts_by_action_and_band(
    name: ActionName, before_after: tuple[float, float], value: float
) -> None:
    reward = CONSOLIDATION.reward(change(before_after, (0, 0), (2, 1)), named(name))

    assert reward.components["retrieval"] == value


@pytest.mark.parametrize(
    ("before_after", "value"),
    [
        ((0.0, 0.11), 0.5),
        ((0.0, 0.1), 0.2),
        ((0.0, 0.01), 0.2),
        ((0.0, 0.0), 0.0),
        ((0.01, 0.0), -0.2),
        ((0.1, 0.0), -0.2),
        ((0.11, 0.0), -0.6),
    ],
)
def test_a_change_in_success_counts_by_its_band(
    before_after: tuple[float, float], value: float
) -> None:
    reward = CONSOLIDATION.reward(change((0, 0), before_after, (2, 2)), named("keep"))

    assert reward.components["success"] == value


@pytest.mark.parametrize(
    ("before_after", "value"),
    [((10, 4), 0.3), ((10, 5), 0.2), ((10, 8), 0.1), ((10, 9), 0.1), ((9, 9), 0), ((9, 12), 0)],
)
def test_saved_storage_counts_by_its_share(before_after: tuple[int, int], value: float) -> None:
    reward = CONSOLIDATION.reward(change((0, 0), (0, 0), before_after), named("merge"))

    assert reward.components["storage"] == value


@pytest.mark.parametrize(
    ("name", "cost"),
    [("merge", -0.1), ("abstract", -0.1), ("archive", -0.05), ("dedupe", -0.05), ("keep", 0.0)],
)
def test_every_action_has_its_cost(name: ActionName, cost: float) -> None:
    reward = CONSOLIDATION.reward(change((0, 0), (0, 0), (2, 2)), named(name))

    assert reward.components["action_cost"] == cost


def test_keeping_what_does_not_change_is_worth_exactly_nothing() -> None:
    assert CONSOLIDATION.reward(change((1, 1), (1, 1), (3, 3)), named("keep")).value == 0


def test_more_storage_saved_is_worth_more() -> None:
    flat = (0.5, 0.5)
    much = CONSOLIDATION.reward(change(flat, flat, (10, 1)), named("merge"))
    little = CONSOLIDATION.reward(change(flat, flat, (2, 1)), named("merge"))

    assert (much.components["storage"], little.components["storage"]) == (0.3, 0.2)


@pytest.mark.parametrize(
    ("name", "outcome", "explanation"),
    [
        ("merge", change((0, 0), (0.6, 0.75), (2, 1)), "merge improved success rate by 15%"),
        ("abstract", change((0, 0), (0.6, 0.4), (2, 1)), "abstract degraded quality"),
        ("merge", change((0, 0), (0.6, 0.6), (2, 1)), "merge maintained quality"),
        ("dedupe", change((0, 0), (0.6, 0.6), (2, 1)), "dedupe cleaned up duplicates"),
        ("dedupe", change((0, 0), (0.0, 0.05), (2, 1)), "dedupe had an unexpected quality impact"),
        ("merge", change((0, 0), (0.1, 0.0), (2, 1)), "merge maintained quality"),
        ("dedupe", change((0, 0), (0.6, 0.4), (2, 1)), "dedupe had an unexpected quality impact"),
        (
            "archive",
            change((0.2, 0), (0.6, 0.4), (2, 0)),
            "archive removed entries that were of use",
        ),
        (
            "archive",
            change((0.2, 0), (0.6, 0.6), (2, 0)),
            "archive removed entries that are no longer retrieved",
        ),
        (
            "archive",
            change((0.2, 0.2), (0.6, 0.6), (2, 0)),
            "archive did not stop the entries from being retrieved",
        ),
        ("keep", change((0, 0), (0.6, 0.7), (2, 2)), "Kept entries as-is"),
    ],
)
def test_a_reward_is_explained(name: ActionName, outcome: dict[str, Any], explanation: str) -> None:
    assert CONSOLIDATION.reward(outcome, named(name)).explanation == explanation


def test_a_success_rate_above_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"outcome of keep: postSuccessRate must be .* \[0, 1\]"):
        CONSOLIDATION.reward(change((0, 0), (0.5, 1.5), (1, 1)), named("keep"))


DECIDED_AT = datetime(2024, 6, 1, 12, tzinfo=UTC)


def built(
    entries: list[GroupEntry],
    *,
    accessed_at: datetime | None = None,
    judged: tuple[int, int] = (7, 3),
    total: int = 500,
) -> ConsolidationState:
    return build_state(
        entries,
        avg_similarity=0.88,
        usage=GroupUsage(20, 2.5, judged[0], judged[1], accessed_at),
        scope=ScopeFigures("project", total, 125),
        decided_at=DECIDED_AT,
    )


THREE = [GroupEntry("tool", 0.9), GroupEntry("knowledge", 0.85), GroupEntry("tool", 0.88)]


def test_a_group_is_described_by_its_entries() -> None:
    assert built(THREE).group_features == GroupFeatures(3, 0.88, 0.85, 0.9, ("tool", "knowledge"))


def test_rates_are_shares_and_zero_where_there_is_nothing() -> None:
    assert built(THREE).usage_stats.success_rate == 0.7
    assert built(THREE, judged=(0, 0)).usage_stats.success_rate == 0
    assert built(THREE).scope_stats.duplicate_ratio == 0.25
    assert built(THREE, total=0).scope_stats.duplicate_ratio == 0


@pytest.mark.parametrize(
    ("ago", "days"),
    [(timedelta(hours=23), 0), (timedelta(days=7, hours=1), 7), (None, 999)],
)
def test_days_count_up_to_the_decision_not_to_today(ago: timedelta | None, days: int) -> None:
    accessed_at = None if ago is None else DECIDED_AT - ago

    assert built(THREE, accessed_at=accessed_at).usage_stats.last_accessed_days_ago == days


def test_an_access_after_the_decision_is_refused() -> None:
    with pytest.raises(InputError, match=r"last accessed 2024-06-01 13.* after the decision at"):
        built(THREE, accessed_at=DECIDED_AT + timedelta(hours=1))


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(InputError, match="needs at least one entry, got none"):
        built([])
