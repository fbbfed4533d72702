"""Consolidation: what should become of a group of similar memory entries?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Literal

from dpo.data.kinds.base import (
    BaselineDecision,
    EntryType,
    GroupKey,
    Reward,
    ScopeType,
    TypedKind,
    added_reward,
    prompt_text,
)
from dpo.data.kinds.javascript import to_fixed
from dpo.data.kinds.schema import Count, Range, RecordSchema, Share
from dpo.errors import InputError
from dpo.files import JSON

NEVER_ACCESSED_DAYS = 999

ActionName = Literal["merge", "dedupe", "archive", "abstract", "keep"]
MergeStrategy = Literal["union", "intersection", "weighted"]
Rate = Annotated[float, Range(0)]


@dataclass(frozen=True, slots=True)
class GroupFeatures:
    """How alike the entries of the group are; the types in order of appearance, each once."""

    group_size: Annotated[int, Range(1)]
    avg_similarity: Share
    min_similarity: Share
    max_similarity: Share
    entry_types: tuple[EntryType, ...]


@dataclass(frozen=True, slots=True)
class UsageStats:
    """How the entries of the group were used; rank 1 is the best."""

    total_retrievals: Count
    avg_retrieval_rank: Rate
    success_rate: Share
    last_accessed_days_ago: Count


@dataclass(frozen=True, slots=True)
class ScopeStats:
    """Where the group lies. An entry may have several duplicates, so the ratio may pass 1."""

    scope_type: ScopeType
    total_entries_in_scope: Count
    duplicate_ratio: Rate


@dataclass(frozen=True, slots=True)
class ConsolidationState:
    """What the policy sees."""

    group_features: GroupFeatures
    usage_stats: UsageStats
    scope_stats: ScopeStats


@dataclass(frozen=True, slots=True)
class ConsolidationAction:
    """What is done, to which entries (their ids), and how they are merged."""

    action: ActionName
    target_entries: tuple[str, ...] | None = None
    merge_strategy: MergeStrategy | None = None


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """One entry of a group, and how similar it is to the others, in [0, 1]."""

    entry_type: EntryType
    similarity: float


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """Counters of a group's use; None for a group that was never accessed."""

    total_retrievals: int
    avg_retrieval_rank: float
    success_count: int
    failure_count: int
    last_accessed_at: datetime | None


@dataclass(frozen=True, slots=True)
class ScopeFigures:
    """Counters of the scope that the group lies in."""

    scope_type: ScopeType
    total_entries: int
    duplicate_count: int


@dataclass(frozen=True, slots=True)
class ConsolidationOutcome:
    """Retrievals a day, success rate and number of entries, before and after."""

    pre_retrieval_rate: Rate
    post_retrieval_rate: Rate
    pre_success_rate: Share
    post_success_rate: Share
    pre_storage_count: Count
    post_storage_count: Count


class ConsolidationKind(TypedKind[ConsolidationState, ConsolidationAction]):
    """The consolidation policy; its classes are the actions' names."""

    name = "consolidation"
    state_schema = RecordSchema(ConsolidationState)
    action_schema = RecordSchema(ConsolidationAction)
    classes = ("merge", "dedupe", "archive", "abstract", "keep")
    id_fields = ("target_entries",)

    def render_prompt(self, state: ConsolidationState) -> str:
        """Return the document's prompt."""
        group, usage, scope = state.group_features, state.usage_stats, state.scope_stats
        return prompt_text(
            {
                "Group Features": {
                    "Size": group.group_size,
                    "Avg similarity": to_fixed(group.avg_similarity),
                    "Min similarity": to_fixed(group.min_similarity),
                    "Max similarity": to_fixed(group.max_similarity),
                    "Entry types": ", ".join(group.entry_types),
                },
                "Usage Stats": {
                    "Total retrievals": usage.total_retrievals,
                    "Avg rank": to_fixed(usage.avg_retrieval_rank),
                    "Success rate": to_fixed(usage.success_rate),
                    "Days since access": usage.last_accessed_days_ago,
                },
                "Scope Stats": {
                    "Type": scope.scope_type,
                    "Total entries": scope.total_entries_in_scope,
                    "Duplicate ratio": to_fixed(scope.duplicate_ratio),
                },
            },
            question="What consolidation action should be taken?",
        )

    def action_class(self, action: ConsolidationAction) -> str:
        """Return the action's name."""
        return action.action

    def actions(self) -> tuple[ConsolidationAction, ...]:
        """Return merge with each strategy, and the other actions."""
        return _ACTIONS

    def group_key(self, state: ConsolidationState) -> GroupKey:
        """Return the size, the average similarity in tenths, and the scope."""
        group = state.group_features
        return (group.group_size, int(group.avg_similarity * 10), state.scope_stats.scope_type)

    def baseline(self, state: ConsolidationState) -> BaselineDecision[ConsolidationAction]:
        """Answer by the first rule that matches.

        ``reduce_duplicates`` asks for a group of two at least: the original merged single entries.
        """
        group, usage = state.group_features, state.usage_stats
        size, similarity = group.group_size, group.avg_similarity
        retrievals, days = usage.total_retrievals, usage.last_accessed_days_ago
        if group.min_similarity > 0.95 and size > 1:
            return _decide(_named("dedupe"), 0.95, "exact_duplicates")
        if retrievals == 0 and days > 90:
            return _decide(_named("archive"), 0.9, "unused_old_entries")
        if usage.success_rate < 0.3 and days > 60 and retrievals > 5:
            return _decide(_named("archive"), 0.85, "low_success_old_entries")
        if similarity > 0.8 and retrievals < 10 and size >= 2:
            return _decide(_merge("union"), 0.8, "similar_low_usage")
        if size >= 5 and retrievals > 50 and usage.success_rate > 0.6:
            return _decide(_named("abstract"), 0.85, "pattern_abstraction")
        if similarity > 0.7 and len(set(group.entry_types)) == 1 and size >= 3:
            return _decide(_merge("weighted"), 0.75, "similar_same_type")
        if state.scope_stats.duplicate_ratio > 0.3 and similarity > 0.65 and size >= 2:
            return _decide(_merge("intersection"), 0.7, "reduce_duplicates")
        if days < 7 and usage.success_rate > 0.7:
            return _decide(_named("keep"), 0.9, "active_successful")
        if usage.avg_retrieval_rank < 3 and retrievals > 0:
            return _decide(_named("keep"), 0.85, "high_quality")
        return _decide(_named("keep"), 0.6, "default_keep")

    def reward(self, outcome: Mapping[str, JSON], action: ConsolidationAction) -> Reward:
        """Reward what the action (see ``ConsolidationOutcome``) did to use, success and storage."""
        name = action.action
        figures = _OUTCOME.parse(outcome, f"outcome of {name}")
        retrieval_change = figures.post_retrieval_rate - figures.pre_retrieval_rate
        success_change = figures.post_success_rate - figures.pre_success_rate
        components = {
            "retrieval": _retrieval_reward(name, retrieval_change),
            "success": _success_reward(success_change),
            "storage": 0.0 if name == "keep" else _storage_reward(figures),
            "action_cost": _ACTION_COSTS[name],
        }
        return added_reward(components, _explanation(name, retrieval_change, success_change))


CONSOLIDATION = ConsolidationKind()


def build_state(
    entries: Sequence[GroupEntry],
    *,
    avg_similarity: float,
    usage: GroupUsage,
    scope: ScopeFigures,
    decided_at: datetime,
) -> ConsolidationState:
    """Return the state of a group when the decision is made.

    Days count up to ``decided_at``, never to today, so that the same decision has the same prompt
    tomorrow.

    Raises:
        InputError: there are no entries, or the last access lies after the decision.
    """
    if not entries:
        raise InputError("a group to consolidate needs at least one entry, got none")
    similarities = [entry.similarity for entry in entries]
    judged = usage.success_count + usage.failure_count
    return ConsolidationState(
        GroupFeatures(
            group_size=len(entries),
            avg_similarity=avg_similarity,
            min_similarity=min(similarities),
            max_similarity=max(similarities),
            entry_types=tuple(dict.fromkeys(entry.entry_type for entry in entries)),
        ),
        UsageStats(
            total_retrievals=usage.total_retrievals,
            avg_retrieval_rank=usage.avg_retrieval_rank,
            success_rate=usage.success_count / judged if judged else 0.0,
            last_accessed_days_ago=_days_between(usage.last_accessed_at, decided_at),
        ),
        ScopeStats(
            scope_type=scope.scope_type,
            total_entries_in_scope=scope.total_entries,
            duplicate_ratio=scope.duplicate_count / scope.total_entries
            if scope.total_entries
            else 0.0,
        ),
    )


_OUTCOME = RecordSchema(ConsolidationOutcome)
_ACTION_COSTS = {
    "merge": -0.1,
    "abstract": -0.1,
    "archive": -0.05,
    "dedupe": -0.05,
    "keep": 0.0,
}


def _named(name: ActionName) -> ConsolidationAction:
    return ConsolidationAction(name)


def _merge(strategy: MergeStrategy) -> ConsolidationAction:
    return ConsolidationAction("merge", merge_strategy=strategy)


_ACTIONS = (
    _merge("union"),
    _merge("intersection"),
    _merge("weighted"),
    _named("dedupe"),
    _named("archive"),
    _named("abstract"),
    _named("keep"),
)


def _decide(
    action: ConsolidationAction, confidence: float, reason: str
) -> BaselineDecision[ConsolidationAction]:
    return BaselineDecision(action, confidence, reason)


def _days_between(accessed_at: datetime | None, decided_at: datetime) -> int:
    if accessed_at is None:
        return NEVER_ACCESSED_DAYS
    days = (decided_at - accessed_at) // timedelta(days=1)
    if days < 0:
        raise InputError(
            f"last accessed {accessed_at}, which is after the decision at {decided_at}"
        )
    return days


def _retrieval_reward(name: ActionName, change: float) -> float:
    match name:
        case "archive":
            return 0.3 if change < 0 else -0.4
        case "merge" | "abstract":
            return 0.5 if change > 0.1 else 0.2 if change > -0.1 else -0.5
        case "dedupe":
            return 0.3 if abs(change) < 0.05 else -0.3
        case "keep":
            return 0.0


def _success_reward(change: float) -> float:
    if change > 0:
        return 0.5 if change > 0.1 else 0.2
    if change < 0:
        return -0.6 if change < -0.1 else -0.2
    return 0.0


def _storage_reward(figures: ConsolidationOutcome) -> float:
    before, after = figures.pre_storage_count, figures.post_storage_count
    if before == 0:
        return 0.0  # nothing was stored, so nothing could be saved
    change = (after - before) / before
    return 0.3 if change < -0.5 else 0.2 if change < -0.2 else 0.1 if change < 0 else 0.0


def _explanation(name: ActionName, retrieval_change: float, success_change: float) -> str:
    match name:
        case "keep":
            return "Kept entries as-is"
        case "dedupe":
            if abs(success_change) < 0.05:
                return "dedupe cleaned up duplicates"
            return "dedupe had an unexpected quality impact"
        case "archive" if success_change < 0:
            return "archive removed entries that were of use"
        case "archive" if retrieval_change < 0:
            return "archive removed entries that are no longer retrieved"
        case "archive":
            return "archive did not stop the entries from being retrieved"
    if success_change > 0:
        return f"{name} improved success rate by {to_fixed(100 * success_change, 0)}%"
    return f"{name} {'degraded' if success_change < -0.1 else 'maintained'} quality"
