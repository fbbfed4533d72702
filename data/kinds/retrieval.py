"""Retrieval: does answering this query need the memory, and how much of it?"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
from dpo.data.kinds.javascript import to_fixed, utf16_length
from dpo.data.kinds.schema import Count, Range, RecordSchema, Share
from dpo.data.kinds.text import capped_total, count_identifiers, split_sentences, words_pattern
from dpo.files import JSON

SemanticCategory = Literal[
    "social",
    "question",
    "command",
    "information_seeking",
    "technical",
    "memory_recall",
    "general",
]
TaskOutcomeType = Literal["success", "partial", "failure", "unknown"]

# What may be chosen: few, some, many and what the rules answer. A policy that writes its answer
# freely may answer other types, scopes and numbers.
MAX_RESULTS: Mapping[tuple[EntryType, ...] | None, tuple[int, ...]] = {
    None: (5, 10, 15, 20, 30),
    ("knowledge", "tool"): (5, 15, 30),
    ("tool", "guideline"): (5, 12, 15, 30),
}


@dataclass(frozen=True, slots=True)
class QueryFeatures:
    """What the query looks like."""

    query_length: Count
    has_keywords: bool
    query_complexity: Share
    semantic_category: SemanticCategory


@dataclass(frozen=True, slots=True)
class ContextFeatures:
    """The session so far."""

    turn_number: Count
    conversation_depth: Count
    recent_tool_calls: Count
    has_errors: bool


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """What the memory holds, and how well it has served; the time is in epoch milliseconds."""

    total_entries: Count
    recent_retrievals: Count
    avg_retrieval_success: Share
    last_retrieval_time: Count | None = None


@dataclass(frozen=True, slots=True)
class RetrievalState:
    """What the policy sees."""

    query_features: QueryFeatures
    context_features: ContextFeatures
    memory_stats: MemoryStats


@dataclass(frozen=True, slots=True)
class RetrievalAction:
    """Retrieve or not; if so, from which scope, which types (None: all) and how many at most."""

    should_retrieve: bool
    scope: ScopeType | None = None
    types: tuple[EntryType, ...] | None = None
    max_results: Annotated[int, Range(1)] | None = None


@dataclass(frozen=True, slots=True)
class RetrievedOutcome:
    """How the task ended, and what the entries that were found had to do with it."""

    task_outcome_type: TaskOutcomeType
    retrieved_count: Count = 0
    contribution_score: Annotated[float, Range(-1, 1)] = 0.0
    relevance_score: Share = 0.0


@dataclass(frozen=True, slots=True)
class SkippedOutcome:
    """How a task ended that was done without the memory."""

    task_outcome_type: TaskOutcomeType


class RetrievalKind(TypedKind[RetrievalState, RetrievalAction]):
    """The retrieval policy; its classes are the texts of ``shouldRetrieve``."""

    name = "retrieval"
    state_schema = RecordSchema(RetrievalState)
    action_schema = RecordSchema(RetrievalAction)
    classes = ("true", "false")

    def render_prompt(self, state: RetrievalState) -> str:
        """Return the document's prompt; the time of the last retrieval is not in it."""
        query, context, memory = state.query_features, state.context_features, state.memory_stats
        return prompt_text(
            {
                "Query Features": {
                    "Length": query.query_length,
                    "Has keywords": query.has_keywords,
                    "Complexity": to_fixed(query.query_complexity),
                    "Category": query.semantic_category,
                },
                "Context": {
                    "Turn": context.turn_number,
                    "Depth": context.conversation_depth,
                    "Recent tool calls": context.recent_tool_calls,
                    "Has errors": context.has_errors,
                },
                "Memory Stats": {
                    "Total entries": memory.total_entries,
                    "Recent retrievals": memory.recent_retrievals,
                    "Avg success": to_fixed(memory.avg_retrieval_success),
                },
            },
            question="Should retrieve from memory?",
        )

    def action_class(self, action: RetrievalAction) -> str:
        """Return ``true`` where it retrieves, else ``false``."""
        return "true" if action.should_retrieve else "false"

    def actions(self) -> tuple[RetrievalAction, ...]:
        """Return not to retrieve, and to retrieve the types of ``MAX_RESULTS`` so many times."""
        return _ACTIONS

    def group_key(self, state: RetrievalState) -> GroupKey:
        """Return the query's length in tens, its keywords flag and its category."""
        query = state.query_features
        return (query.query_length // 10, query.has_keywords, query.semantic_category)

    def baseline(self, state: RetrievalState) -> BaselineDecision[RetrievalAction]:
        """Answer by the first rule that matches.

        An empty memory is looked at first: in the original, five rules before that one would
        search it all the same.
        """
        query, context, memory = state.query_features, state.context_features, state.memory_stats
        success, recent = memory.avg_retrieval_success, memory.recent_retrievals
        if memory.total_entries == 0:
            return _decide(_SKIP, 0.7, "low_utility_memory")
        if query.has_keywords and query.query_complexity > 0.6:
            return _decide(_retrieve(20), 0.95, "complex_query_with_keywords")
        if context.has_errors:
            return _decide(_retrieve(15, "knowledge", "tool"), 0.9, "error_recovery")
        if query.query_length < 20 and query.query_complexity < 0.3 and not query.has_keywords:
            return _decide(_SKIP, 0.85, "simple_query")
        if success > 0.7 and recent > 0:
            return _decide(_retrieve(15), 0.8, "recent_success")
        if context.conversation_depth > 10:
            return _decide(_retrieve(10), 0.75, "deep_conversation")
        if context.recent_tool_calls > 3:
            return _decide(_retrieve(12, "tool", "guideline"), 0.8, "tool_heavy")
        if success < 0.3 and recent > 5:
            return _decide(_SKIP, 0.7, "low_utility_memory")
        return _decide(_retrieve(15), 0.6, "default_retrieve")

    def reward(self, outcome: Mapping[str, JSON], action: RetrievalAction) -> Reward:
        """Reward the task's success, what the retrieved entries gave to it, and what they cost.

        The outcome of a retrieval is a ``RetrievedOutcome``, otherwise a ``SkippedOutcome``.
        """
        if action.should_retrieve:
            return _retrieved_reward(_RETRIEVED_OUTCOME.parse(outcome, "outcome of retrieving"))
        return _skipped_reward(_SKIPPED_OUTCOME.parse(outcome, "outcome of not retrieving"))


RETRIEVAL = RetrievalKind()


def build_state(query: str, *, context: ContextFeatures, memory: MemoryStats) -> RetrievalState:
    """Return the state in which the query was asked."""
    return RetrievalState(query_features(query), context, memory)


def query_features(query: str) -> QueryFeatures:
    """Return what keywords and shape tell about a query; keywords count where a word begins."""
    return QueryFeatures(
        query_length=utf16_length(query),
        has_keywords="?" in query or _KEYWORD.search(query) is not None,
        query_complexity=_complexity(query),
        semantic_category=_category(query),
    )


_SKIP = RetrievalAction(should_retrieve=False)
_ACTIONS = (
    _SKIP,
    *(
        RetrievalAction(should_retrieve=True, scope="project", types=types, max_results=most)
        for types, numbers in MAX_RESULTS.items()
        for most in numbers
    ),
)
_RETRIEVED_OUTCOME = RecordSchema(RetrievedOutcome)
_SKIPPED_OUTCOME = RecordSchema(SkippedOutcome)

_KEYWORD = words_pattern(
    "how what why explain show find search list remember recall previous before earlier"
    " command function code implement build create",
    "last time",
    "can you",
    "could you",
    "would you",
)
_GREETING = re.compile(r"\s*(?:hi|hello|hey|thanks|thank you|bye|goodbye)\b", re.IGNORECASE)
_QUESTION = re.compile(r"\s*(?:what|how|why|when|where|who)\b", re.IGNORECASE)
_COMMAND = re.compile(
    r"\s*(?:show|list|find|search|get|fetch|retrieve|display|explain|tell|describe)\b",
    re.IGNORECASE,
)
_REQUEST = words_pattern("please", "how to", "how do", "can you", "could you", "would you")
_TECHNICAL = words_pattern("function class interface type implement build create code")
_RECALL = words_pattern("remember recall previous before earlier", "last time")


def _retrieve(max_results: int, *types: EntryType) -> RetrievalAction:
    return RetrievalAction(
        should_retrieve=True, scope="project", types=types or None, max_results=max_results
    )


def _decide(
    action: RetrievalAction, confidence: float, reason: str
) -> BaselineDecision[RetrievalAction]:
    return BaselineDecision(action, confidence, reason)


def _complexity(query: str) -> float:
    length, words = utf16_length(query), len(query.split())
    sentences = sum(1 for sentence in split_sentences(query) if sentence.strip())
    return capped_total(
        0.2 * (length > 50),
        0.2 * (length > 100),
        0.1 * (length > 200),
        0.1 * (words > 5),
        0.1 * (words > 10),
        0.1 * (words > 20),
        0.1 * (sentences > 1),
        0.1 * (sentences > 2),
        min(0.05 * count_identifiers(query), 0.2),
        0.2 * ("`" in query),
    )


def _category(query: str) -> SemanticCategory:
    """Return the first category that fits.

    The first words are compared whole, so that ``history`` is no greeting for its ``hi``.
    """
    if _GREETING.match(query) or utf16_length(query) < 15:
        return "social"
    if "?" in query or _QUESTION.match(query):
        return "question"
    if _COMMAND.match(query):
        return "command"
    if _REQUEST.search(query):
        return "information_seeking"
    if _TECHNICAL.search(query):
        return "technical"
    return "memory_recall" if _RECALL.search(query) else "general"


def _retrieved_reward(outcome: RetrievedOutcome) -> Reward:
    contribution, relevance = outcome.contribution_score, outcome.relevance_score
    components = {
        "outcome": _OUTCOME_REWARDS[outcome.task_outcome_type],
        "contribution": _contribution_reward(contribution),
        "cost": -0.2 if outcome.retrieved_count > 20 else -0.1,
        "relevance": 0.3 if relevance > 0.8 else 0.1 if relevance > 0.5 else 0.0,
    }
    if outcome.task_outcome_type == "success" and contribution > 0.3:
        share = to_fixed(100 * contribution, 0)
        explanation = f"Retrieval helped task success (contribution: {share}%)"
    elif outcome.task_outcome_type == "failure":
        explanation = "Retrieved but task failed - retrieval did not help"
    else:
        explanation = "Retrieved but had minimal impact on outcome"
    return added_reward(components, explanation)


def _skipped_reward(outcome: SkippedOutcome) -> Reward:
    """Reward a task done without the memory.

    A task whose end is unknown says nothing: the original punished the skip as if it had failed.
    """
    task = outcome.task_outcome_type
    contribution = {"success": 0.3, "unknown": 0.0}.get(task, -0.4)
    components = {"outcome": _OUTCOME_REWARDS[task], "contribution": contribution}
    return added_reward(components, _SKIPPED_EXPLANATIONS[task])


_OUTCOME_REWARDS = {"success": 1.0, "partial": 0.3, "failure": -0.5, "unknown": 0.0}
_SKIPPED_EXPLANATIONS = {
    "success": "Skipped retrieval and succeeded - it was not needed",
    "partial": "Skipped retrieval and succeeded in part - it might have helped",
    "failure": "Skipped retrieval and failed - might have helped",
    "unknown": "Skipped retrieval and the task's end is unknown",
}


def _contribution_reward(contribution: float) -> float:
    if contribution > 0.5:
        return 0.5
    if contribution > 0.2:
        return 0.2
    return -0.3 if contribution < -0.2 else -0.1
