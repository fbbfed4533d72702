"""The worlds that the simulator plays in: which situations occur, and what may become of an action.

A world is invented, and simple enough to be known: for every state and action it lists the
possible outcomes with their probabilities, so the expected reward is a finite sum. Only what the
prompt shows matters. The formulas are in the docstrings of ``extraction_chances``,
``retrieval_chances`` and ``consolidation_chances``; a world for another kind is one more ``World``.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias

from dpo.data.kinds import consolidation, extraction, retrieval
from dpo.data.kinds.base import Action, EntryType, ScopeType, State, TypedKind
from dpo.data.kinds.consolidation import CONSOLIDATION, ConsolidationAction, ConsolidationState
from dpo.data.kinds.extraction import EXTRACTION, ExtractionAction, ExtractionState
from dpo.data.kinds.retrieval import RETRIEVAL, RetrievalAction, RetrievalState
from dpo.data.kinds.schema import to_json
from dpo.files import JSON

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True)
class Chance:
    """One possible outcome of an action and its probability."""

    probability: float
    outcome: Mapping[str, JSON]


@dataclass(frozen=True, slots=True)
class World(Generic[State, Action]):
    """What surrounds the policies of one kind.

    Attributes:
        kind: whose states and actions these are.
        draw_state: draws a situation.
        chances: the outcomes that an action may have in a state; the probabilities add up to 1.
    """

    kind: TypedKind[State, Action]
    draw_state: Callable[[random.Random], State]
    chances: Callable[[State, Action], list[Chance]]


AnyWorld: TypeAlias = World[Any, Any]


def extraction_chances(state: ExtractionState, action: ExtractionAction) -> list[Chance]:
    """Return what becomes of storing, skipping or deferring.

    ``need`` is the probability that the information is asked for later: .03 where a similar entry
    exists, else .05, + .6 for a rule, + .5 for a command, + .5 for an error, + .4 for a decision,
    + .4 for a fact of complexity above .5, + .15 for novelty above .7; at most .97.

    Stored, it is found with probability ``need * findable``, where findable = 1 - .8 * |priority -
    importance| / 100, the importance being 80 for a need above .75, 50 above .5, else 20 (a missing
    priority counts as 50). Of what is found, a share ``fit`` serves: .9 where the entry type is
    right, .6 for knowledge, else .3; times .6 in the first two turns unless there is a fact. What
    serves is used much (3 in 4) or little; what does not misleads; what is not found lies unused.

    Skipped, it is missed three times with probability ``need``. Deferred too, but in the first two
    turns only with probability ``.3 * need``.
    """
    need = _information_need(state)
    is_early = state.context_features.turn_number < 3
    if action.decision != "store":
        missed = 0.3 * need if action.decision == "defer" and is_early else need
        return [
            _chance(1 - missed, extraction.UnstoredOutcome(missed_count=0)),
            _chance(missed, extraction.UnstoredOutcome(missed_count=3)),
        ]
    importance = 80 if need > 0.75 else 50 if need > 0.5 else 20
    priority = 50 if action.priority is None else action.priority
    found = need * (1 - 0.8 * abs(priority - importance) / 100)
    fit = 0.6 if action.entry_type == "knowledge" else 0.3
    if action.entry_type == right_entry_type(state):
        fit = 0.9
    if is_early and not state.content_features.has_fact:
        fit *= 0.6
    return [
        _chance(1 - found, _stored(retrievals=0, successes=0)),
        _chance(found * (1 - fit), _stored(retrievals=2, successes=0)),
        _chance(found * fit * 0.25, _stored(retrievals=2, successes=1)),
        _chance(found * fit * 0.75, _stored(retrievals=6, successes=5)),
    ]


def right_entry_type(state: ExtractionState) -> EntryType:
    """Return the type under which the information serves best; the first that applies.

    Rules are guidelines, commands tools, errors experiences (knowledge if there is a fact),
    decisions belong to the project, facts are knowledge, the rest is experience.
    """
    content = state.content_features
    if content.has_rule:
        return "guideline"
    if content.has_command:
        return "tool"
    if state.context_features.has_error:
        return "knowledge" if content.has_fact else "experience"
    if content.has_decision:
        return "project"
    return "knowledge" if content.has_fact else "experience"


def retrieval_chances(state: RetrievalState, action: RetrievalAction) -> list[Chance]:
    """Return how the task ends with and without the memory.

    ``need`` is the probability that the task needs the memory: by category (``_CATEGORY_NEEDS``),
    + .35 for complexity above .6, + .3 for errors, + .1 for a depth above 10; at most .97.

    Not retrieved, the task succeeds with probability .97 - .9 * need; the rest fails, or ends in
    part (3 in 10).

    Retrieved, what is needed is found with probability ``available * match * enough``. Available is
    0 for an empty memory, else .35 + .65 * average success, times .7 below 100 entries. Match is 1
    for the right types (knowledge and tool after errors, tool and guideline for technical queries,
    commands and more than 3 tool calls, else all), .6 for all types where some would do, else .25.
    Enough is 1 - .4 * |log2(max / wanted)|, at least .2, where 30 entries are wanted above
    complexity .6, 15 above .3, else 5 (a missing maximum counts as 15). Found, it helps. Not found,
    the task fails, or succeeds on its own (1 in 10). Where the memory is not needed, it distracts
    with probability .1 * log2(max / 2.5), which lies in [0, .5], unless it is empty.
    """
    need = _memory_need(state)
    if not action.should_retrieve:
        failed = 0.03 + 0.9 * need
        return [
            _chance(1 - failed, retrieval.SkippedOutcome("success")),
            _chance(0.3 * failed, retrieval.SkippedOutcome("partial")),
            _chance(0.7 * failed, retrieval.SkippedOutcome("failure")),
        ]
    found = _available(state) * _match(state, action) * _enough(state, action)
    distracted = _distraction(state, action)
    count = min(action.max_results or 15, state.memory_stats.total_entries)
    alone = (1 - need) * (1 - distracted) + need * (1 - found) * 0.1
    return [
        _chance(need * found, retrieval.RetrievedOutcome("success", count, 0.6, 0.9)),
        _chance(alone, retrieval.RetrievedOutcome("success", count, 0.05, 0.3)),
        _chance((1 - need) * distracted, retrieval.RetrievedOutcome("failure", count, -0.3, 0.2)),
        _chance(need * (1 - found) * 0.9, retrieval.RetrievedOutcome("failure", count, 0.0, 0.3)),
    ]


def consolidation_chances(state: ConsolidationState, action: ConsolidationAction) -> list[Chance]:
    """Return what becomes of a group.

    Every action but keep turns out well with the probability of ``_success_chance``, else badly; a
    merge or an abstraction that does not turn out well changes nothing in 3 of 10 cases. Kept, a
    group that thrives (success above .6, accessed within 30 days) gets a little better (6 in 10) or
    worse (1 in 10), any other better (1 in 10) or worse (5 in 10).
    """
    size = state.group_features.group_size
    if action.action == "keep":
        better, worse = (0.6, 0.1) if _is_thriving(state) else (0.1, 0.5)
        return [
            _chance(better, _changed(size, size, success=0.05)),
            _chance(worse, _changed(size, size, success=-0.05)),
            _chance(1 - better - worse, _changed(size, size)),
        ]
    good = _success_chance(state, action)
    if action.action == "dedupe":
        return [
            _chance(good, _changed(size, 1)),
            _chance(1 - good, _changed(size, 1, retrieval=-0.2, success=-0.2)),
        ]
    if action.action == "archive":
        return [
            _chance(good, _changed(size, 0, retrieval=-0.2)),
            _chance(1 - good, _changed(size, 0, success=-0.2)),
        ]
    return [
        _chance(good, _changed(size, 1, retrieval=0.2, success=0.2)),
        _chance(0.3 * (1 - good), _changed(size, 1)),
        _chance(0.7 * (1 - good), _changed(size, 1, retrieval=-0.2, success=-0.2)),
    ]


def _chance(probability: float, outcome: "DataclassInstance") -> Chance:
    return Chance(probability, to_json(outcome))


def _draw_extraction_state(rng: random.Random) -> ExtractionState:
    turn = rng.choice((1, 2, 4, 8, 16))
    entries = rng.choice((0, 40, 300, 2000))
    return ExtractionState(
        extraction.ContextFeatures(
            turn_number=turn,
            token_count=turn * rng.choice((60, 150, 400)),
            tool_call_count=rng.choice((0, 1, 4)),
            has_error=rng.random() < 0.2,
            user_turn_count=(turn + 1) // 2,
            assistant_turn_count=turn // 2,
        ),
        extraction.MemoryState(
            total_entries=entries,
            recent_extractions=rng.choice((0, 2, 7)),
            similar_entry_exists=entries > 0 and rng.random() < 0.2,
            session_capture_count=rng.choice((0, 2, 7)),
        ),
        extraction.ContentFeatures(
            has_decision=rng.random() < 0.3,
            has_rule=rng.random() < 0.2,
            has_fact=rng.random() < 0.35,
            has_command=rng.random() < 0.2,
            novelty_score=rng.choice((0.25, 0.45, 0.65, 0.75, 0.9)),
            complexity=rng.choice((0.2, 0.4, 0.6, 0.8)),
        ),
    )


def _information_need(state: ExtractionState) -> float:
    content = state.content_features
    if state.memory_state.similar_entry_exists:
        return 0.03
    need = 0.05 + 0.6 * content.has_rule + 0.5 * content.has_command
    need += 0.5 * state.context_features.has_error + 0.4 * content.has_decision
    need += 0.4 * (content.has_fact and content.complexity > 0.5)
    need += 0.15 * (content.novelty_score > 0.7)
    return min(need, 0.97)


def _stored(*, retrievals: int, successes: int) -> extraction.StoredOutcome:
    failures = retrievals - successes
    return extraction.StoredOutcome(retrievals, successes, failures, days_since_creation=20)


_CATEGORY_NEEDS: dict[retrieval.SemanticCategory, float] = {
    "social": 0.02,
    "question": 0.35,
    "command": 0.15,
    "information_seeking": 0.3,
    "technical": 0.5,
    "memory_recall": 0.9,
    "general": 0.08,
}


def _draw_retrieval_state(rng: random.Random) -> RetrievalState:
    category = rng.choice(tuple(_CATEGORY_NEEDS))
    is_social = category == "social"
    asks = category in ("question", "command", "memory_recall")
    return RetrievalState(
        retrieval.QueryFeatures(
            query_length=rng.choice((8, 12) if is_social else (18, 35, 60, 120)),
            has_keywords=asks or (not is_social and rng.random() < 0.4),
            query_complexity=rng.choice((0.0, 0.1) if is_social else (0.1, 0.3, 0.5, 0.7, 0.9)),
            semantic_category=category,
        ),
        retrieval.ContextFeatures(
            turn_number=rng.choice((1, 3, 8, 15)),
            conversation_depth=rng.choice((1, 4, 12, 25)),
            recent_tool_calls=rng.choice((0, 2, 5)),
            has_errors=rng.random() < 0.2,
        ),
        retrieval.MemoryStats(
            total_entries=rng.choice((0, 20, 80, 300, 2000, 9000)),
            recent_retrievals=rng.choice((0, 3, 8)),
            avg_retrieval_success=rng.choice((0.15, 0.4, 0.6, 0.85)),
        ),
    )


def _memory_need(state: RetrievalState) -> float:
    query, context = state.query_features, state.context_features
    need = _CATEGORY_NEEDS[query.semantic_category] + 0.35 * (query.query_complexity > 0.6)
    need += 0.3 * context.has_errors + 0.1 * (context.conversation_depth > 10)
    return min(need, 0.97)


def _available(state: RetrievalState) -> float:
    memory = state.memory_stats
    if memory.total_entries == 0:
        return 0.0
    return (0.35 + 0.65 * memory.avg_retrieval_success) * (0.7 if memory.total_entries < 100 else 1)


def _match(state: RetrievalState, action: RetrievalAction) -> float:
    right: tuple[EntryType, ...] | None = None
    if state.context_features.has_errors:
        right = ("knowledge", "tool")
    elif (
        state.query_features.semantic_category in ("technical", "command")
        or state.context_features.recent_tool_calls > 3
    ):
        right = ("tool", "guideline")
    if action.types == right:
        return 1.0
    return 0.6 if action.types is None else 0.25


def _enough(state: RetrievalState, action: RetrievalAction) -> float:
    complexity = state.query_features.query_complexity
    wanted = 30 if complexity > 0.6 else 15 if complexity > 0.3 else 5
    return max(0.2, 1 - 0.4 * abs(math.log2((action.max_results or 15) / wanted)))


def _distraction(state: RetrievalState, action: RetrievalAction) -> float:
    if state.memory_stats.total_entries == 0:
        return 0.0
    return min(max(0.1 * math.log2((action.max_results or 15) / 2.5), 0.0), 0.5)


def _draw_consolidation_state(rng: random.Random) -> ConsolidationState:
    similarity = rng.choice((0.55, 0.68, 0.75, 0.85, 0.93, 0.98))
    retrievals = rng.choice((0, 4, 20, 80))
    types: tuple[EntryType, ...] = ("knowledge", "guideline", "tool", "experience")
    scopes: tuple[ScopeType, ...] = ("project", "project", "session", "org", "global")
    return ConsolidationState(
        consolidation.GroupFeatures(
            group_size=rng.choice((2, 3, 5, 8)),
            avg_similarity=similarity,
            min_similarity=round(similarity - rng.choice((0.01, 0.08)), 2),
            max_similarity=round(similarity + rng.choice((0.01, 0.02)), 2),
            entry_types=tuple(rng.sample(types, rng.choice((1, 1, 2)))),
        ),
        consolidation.UsageStats(
            total_retrievals=retrievals,
            avg_retrieval_rank=rng.choice((1.5, 4.0, 8.0)) if retrievals else 0.0,
            success_rate=rng.choice((0.1, 0.45, 0.65, 0.9)) if retrievals else 0.0,
            last_accessed_days_ago=rng.choice((2, 20, 75, 200)),
        ),
        consolidation.ScopeStats(
            scope_type=rng.choice(scopes),
            total_entries_in_scope=rng.choice((50, 500)),
            duplicate_ratio=rng.choice((0.05, 0.2, 0.4)),
        ),
    )


def _is_thriving(state: ConsolidationState) -> bool:
    usage = state.usage_stats
    return usage.success_rate > 0.6 and usage.last_accessed_days_ago < 30


def _success_chance(state: ConsolidationState, action: ConsolidationAction) -> float:
    """Return the probability that an action other than keep turns out well.

    Dedupe: .92 for a minimum similarity above .95, .45 above .85, else .1. Archive: .93 for entries
    never retrieved and last accessed over 60 days ago, .85 for success below .3 and that age, .5
    for one of the two, else .08. Abstract: .85 for five entries or more with over 10 retrievals and
    success above .6, .45 for five or more, else .15. Merge: see ``_merge_chance``.
    """
    group, usage = state.group_features, state.usage_stats
    is_old = usage.last_accessed_days_ago > 60
    fails = usage.success_rate < 0.3
    match action.action:
        case "dedupe":
            lowest = group.min_similarity
            return 0.92 if lowest > 0.95 else 0.45 if lowest > 0.85 else 0.1
        case "archive" if is_old and fails:
            return 0.93 if usage.total_retrievals == 0 else 0.85
        case "archive":
            return 0.5 if is_old or fails else 0.08
        case "abstract":
            is_pattern = usage.total_retrievals > 10 and usage.success_rate > 0.6
            return 0.15 if group.group_size < 5 else 0.85 if is_pattern else 0.45
    return _merge_chance(state, action)


def _merge_chance(state: ConsolidationState, action: ConsolidationAction) -> float:
    """Return the probability that a merge turns out well.

    .85 for an average similarity above .8, .6 above .7, else .25; times .75 unless the strategy is
    right (intersection for mixed types, else weighted from 10 retrievals on, else union); times .5
    each where the entries are copies (minimum similarity above .95), where nobody has used them
    for 60 days or ever, and where they thrive (success above .6, accessed within 30 days).
    """
    group, usage = state.group_features, state.usage_stats
    right = "weighted" if usage.total_retrievals >= 10 else "union"
    if len(group.entry_types) > 1:
        right = "intersection"
    chance = 0.85 if group.avg_similarity > 0.8 else 0.6 if group.avg_similarity > 0.7 else 0.25
    chance *= 1 if action.merge_strategy == right else 0.75
    is_unused = usage.total_retrievals == 0 and usage.last_accessed_days_ago > 60
    doubts = (group.min_similarity > 0.95, is_unused, _is_thriving(state))
    return chance * 0.5 ** sum(doubts)


def _changed(
    before: int, after: int, *, retrieval: float = 0.0, success: float = 0.0
) -> consolidation.ConsolidationOutcome:
    return consolidation.ConsolidationOutcome(
        pre_retrieval_rate=0.5,
        post_retrieval_rate=0.5 + retrieval,
        pre_success_rate=0.6,
        post_success_rate=0.6 + success,
        pre_storage_count=before,
        post_storage_count=after,
    )


WORLDS: dict[str, AnyWorld] = {
    world.kind.name: world
    for world in (
        World(EXTRACTION, _draw_extraction_state, extraction_chances),
        World(RETRIEVAL, _draw_retrieval_state, retrieval_chances),
        World(CONSOLIDATION, _draw_consolidation_state, consolidation_chances),
    )
}
