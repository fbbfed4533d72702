"""Extraction: is what was just said worth keeping, as what, and how urgently?"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from dpo.data.kinds.base import (
    BaselineDecision,
    EntryType,
    GroupKey,
    Reward,
    TypedKind,
    added_reward,
    clamp_reward,
    prompt_text,
)
from dpo.data.kinds.javascript import to_fixed, utf16_length
from dpo.data.kinds.schema import Count, Range, RecordSchema, Share
from dpo.data.kinds.text import (
    bracket_depth,
    capped_total,
    count_fenced_blocks,
    count_identifiers,
    split_sentences,
    words_pattern,
)
from dpo.files import JSON

# What may be chosen: low, middle, high and what the rules answer, at the usual novelties. A policy
# that writes its answer freely may answer any whole number up to 100.
PRIORITIES: Mapping[EntryType, tuple[int, ...]] = {
    "tool": (20, 50, 60, 80),
    "guideline": (20, 50, 70, 80),
    "knowledge": (20, 50, 65, 75, 80, 90),
    "project": (20, 50, 80),
    "experience": (20, 50, 65, 75, 80, 90),
}

MISSED_PENALTY = 0.2  # for each time that a task looked in vain for what was not stored
DEFERRAL_COST = 0.01

Priority = Annotated[int, Range(0, 100)]


@dataclass(frozen=True, slots=True)
class ContextFeatures:
    """The session so far."""

    turn_number: Count
    token_count: Count
    tool_call_count: Count
    has_error: bool
    user_turn_count: Count
    assistant_turn_count: Count


@dataclass(frozen=True, slots=True)
class MemoryState:
    """What the memory holds already."""

    total_entries: Count
    recent_extractions: Count
    similar_entry_exists: bool
    session_capture_count: Count


@dataclass(frozen=True, slots=True)
class ContentFeatures:
    """What the last turns say."""

    has_decision: bool
    has_rule: bool
    has_fact: bool
    has_command: bool
    novelty_score: Share
    complexity: Share


@dataclass(frozen=True, slots=True)
class ExtractionState:
    """What the policy sees."""

    context_features: ContextFeatures
    memory_state: MemoryState
    content_features: ContentFeatures


@dataclass(frozen=True, slots=True)
class ExtractionAction:
    """Store (as what, how urgently), skip, or decide later."""

    decision: Literal["store", "skip", "defer"]
    entry_type: EntryType | None = None
    priority: Priority | None = None


@dataclass(frozen=True, slots=True)
class SessionMetrics:
    """Counters that an agent keeps of a session."""

    turn_count: int
    user_turn_count: int
    assistant_turn_count: int
    tool_call_count: int
    error_count: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class StoredOutcome:
    """What became of an entry: its use since, and its age."""

    retrieval_count: Count
    success_count: Count
    failure_count: Count
    days_since_creation: Count


@dataclass(frozen=True, slots=True)
class UnstoredOutcome:
    """How often a later task looked in vain for what was not stored."""

    missed_count: Count


class ExtractionKind(TypedKind[ExtractionState, ExtractionAction]):
    """The extraction policy; its classes are the decisions."""

    name = "extraction"
    state_schema = RecordSchema(ExtractionState)
    action_schema = RecordSchema(ExtractionAction)
    classes = ("store", "skip", "defer")

    def render_prompt(self, state: ExtractionState) -> str:
        """Return the document's prompt; turns by role and captures are not in it."""
        context, memory, content = (
            state.context_features,
            state.memory_state,
            state.content_features,
        )
        return prompt_text(
            {
                "Context": {
                    "Turn": context.turn_number,
                    "Tokens": context.token_count,
                    "Tool calls": context.tool_call_count,
                    "Has error": context.has_error,
                },
                "Memory State": {
                    "Total entries": memory.total_entries,
                    "Recent extractions": memory.recent_extractions,
                    "Similar entry exists": memory.similar_entry_exists,
                },
                "Content Features": {
                    "Has decision": content.has_decision,
                    "Has rule": content.has_rule,
                    "Has fact": content.has_fact,
                    "Has command": content.has_command,
                    "Novelty": to_fixed(content.novelty_score),
                    "Complexity": to_fixed(content.complexity),
                },
            },
            question="What action should be taken?",
        )

    def action_class(self, action: ExtractionAction) -> str:
        """Return the decision."""
        return action.decision

    def actions(self) -> tuple[ExtractionAction, ...]:
        """Return skip, defer, and store with each entry type and each of its ``PRIORITIES``."""
        return _ACTIONS

    def group_key(self, state: ExtractionState) -> GroupKey:
        """Return the turn and the flags; tokens, memory, novelty and complexity may differ."""
        content = state.content_features
        return (
            state.context_features.turn_number,
            state.context_features.has_error,
            state.memory_state.similar_entry_exists,
            content.has_decision,
            content.has_rule,
            content.has_fact,
            content.has_command,
        )

    def baseline(self, state: ExtractionState) -> BaselineDecision[ExtractionAction]:
        """Answer by the first rule that matches.

        The original's arm "store knowledge 50" under the strong signals could never be reached and
        is left out.
        """
        memory, content = state.memory_state, state.content_features
        novelty, turn = content.novelty_score, state.context_features.turn_number
        if memory.similar_entry_exists:
            return _decide(_SKIP, 0.9, "duplicate_content")
        if state.context_features.has_error:
            return _decide(_store("knowledge", 75), 0.85, "error_occurred")
        if content.has_rule:
            return _decide(_store("guideline", 70), 0.8, "strong_content_signal")
        if content.has_command:
            return _decide(_store("tool", 60), 0.8, "strong_content_signal")
        if content.has_decision and novelty > 0.7:
            return _decide(_store("knowledge", 65), 0.8, "strong_content_signal")
        if turn < 3 and not content.has_fact:
            return _decide(ExtractionAction("defer"), 0.7, "early_conversation")
        if novelty > 0.6 and content.complexity > 0.5:
            entry_type: EntryType = "knowledge" if content.has_fact else "experience"
            return _decide(_store(entry_type, math.floor(100 * novelty)), 0.75, "high_novelty")
        if memory.session_capture_count > 5 and novelty < 0.5:
            return _decide(_SKIP, 0.8, "capture_rate_limit")
        return _decide(_SKIP, 0.6, "low_value_content")

    def reward(self, outcome: Mapping[str, JSON], action: ExtractionAction) -> Reward:
        """Reward an entry by its use, and one not stored by how often it was missed.

        The outcome of ``store`` is a ``StoredOutcome``, that of ``skip`` and ``defer`` an
        ``UnstoredOutcome``: an entry that does not exist cannot be retrieved, but can be missed.
        """
        where = f"outcome of {action.decision}"
        if action.decision == "store":
            return _stored_reward(_STORED_OUTCOME.parse(outcome, where))
        return _unstored_reward(_UNSTORED_OUTCOME.parse(outcome, where), action)


EXTRACTION = ExtractionKind()


def build_state(
    turns: Sequence[str], *, metrics: SessionMetrics, memory: MemoryState
) -> ExtractionState:
    """Return the state after the given turns' texts, the newest last."""
    context = ContextFeatures(
        turn_number=metrics.turn_count,
        token_count=metrics.total_tokens,
        tool_call_count=metrics.tool_call_count,
        has_error=metrics.error_count > 0,
        user_turn_count=metrics.user_turn_count,
        assistant_turn_count=metrics.assistant_turn_count,
    )
    return ExtractionState(context, memory, content_features(" ".join(turns[-3:])))


def content_features(content: str) -> ContentFeatures:
    """Return what keywords and shape tell about a text.

    Identifiers are counted in the text as it was written: the original lower-cased it first and
    so never found one. A keyword counts only where a word begins.
    """
    return ContentFeatures(
        has_decision=_DECISION.search(content) is not None,
        has_rule=_RULE.search(content) is not None,
        has_fact=_FACT.search(content) is not None,
        has_command=_COMMAND.search(content) is not None,
        novelty_score=_novelty(content),
        complexity=_complexity(content),
    )


_SKIP = ExtractionAction("skip")
_ACTIONS = (
    _SKIP,
    ExtractionAction("defer"),
    *(
        ExtractionAction("store", entry_type, priority)
        for entry_type, priorities in PRIORITIES.items()
        for priority in priorities
    ),
)
_STORED_OUTCOME = RecordSchema(StoredOutcome)
_UNSTORED_OUTCOME = RecordSchema(UnstoredOutcome)

_DECISION = words_pattern(
    "decided chose selected because rationale tradeoff", "opted for", "went with"
)
_RULE = words_pattern(
    "always never must should policy standard convention guideline", "best practice"
)
_FACT = words_pattern("uses implements configured running version located stored", "based on")
_COMMAND = re.compile(
    r"`[a-z_]\w*\s|\bnpm (?:install|run|start)|\bgit (?:commit|push|pull)"
    r"|\bdocker (?:build|run|exec)|\bfunction \w+\(|\bdef \w+\(",
    re.ASCII | re.IGNORECASE,
)
_DECLARATION = words_pattern("function class")
_ASYNCHRONY = words_pattern("async await")
_TYPE = words_pattern("interface type")


def _store(entry_type: EntryType, priority: int) -> ExtractionAction:
    return ExtractionAction("store", entry_type, priority)


def _decide(
    action: ExtractionAction, confidence: float, reason: str
) -> BaselineDecision[ExtractionAction]:
    return BaselineDecision(action, confidence, reason)


def _novelty(content: str) -> float:
    length = utf16_length(content)
    return capped_total(
        0.5,
        0.2 * (length > 500),
        0.1 * (length > 1000),
        min(0.05 * count_identifiers(content), 0.3),
        min(0.1 * count_fenced_blocks(content), 0.2),
    )


def _complexity(content: str) -> float:
    words, sentences = len(content.split()), len(split_sentences(content))
    return capped_total(
        0.2 * (words > 50),
        0.2 * (words > 100),
        0.1 * (words > 200),
        0.1 * (sentences > 3),
        0.1 * (sentences > 6),
        0.1 * (_DECLARATION.search(content) is not None),
        0.1 * (_ASYNCHRONY.search(content) is not None),
        0.1 * (_TYPE.search(content) is not None),
        min(0.1 * bracket_depth(content), 0.2),
    )


def _stored_reward(outcome: StoredOutcome) -> Reward:
    retrievals, days = outcome.retrieval_count, outcome.days_since_creation
    judged = outcome.success_count + outcome.failure_count
    success_rate = outcome.success_count / judged if judged else 0.0
    usage = -0.3 if retrievals == 0 else 0.2 if retrievals < 3 else 0.5 if retrievals < 10 else 0.8
    success = 0.0
    if judged:
        success = 0.5 if success_rate > 0.7 else 0.2 if success_rate > 0.4 else -0.3
    storage = 0.0 if retrievals else -0.4 if days > 30 else -0.1
    decay = 0.5 if days > 90 else 0.8 if days > 30 else 1.0
    return Reward(
        value=clamp_reward((usage + success + storage) * decay),
        components={"usage": usage, "success": success, "storage": storage, "decay": decay},
        explanation=_stored_explanation(outcome, success_rate),
    )


def _stored_explanation(outcome: StoredOutcome, success_rate: float) -> str:
    if outcome.retrieval_count == 0:
        return "Entry never retrieved - wasted storage"
    retrieved = f"Entry retrieved {outcome.retrieval_count} times"
    if outcome.success_count > outcome.failure_count:
        return f"{retrieved} with {to_fixed(100 * success_rate, 0)}% success - valuable"
    if outcome.failure_count > 0:
        return f"{retrieved} with low success rate - possibly harmful"
    return f"{retrieved} - useful"


def _unstored_reward(outcome: UnstoredOutcome, action: ExtractionAction) -> Reward:
    missed = -MISSED_PENALTY * min(outcome.missed_count, 5)  # five misses are as bad as it gets
    deferral = -DEFERRAL_COST if action.decision == "defer" else 0.0
    not_stored = "Deferred" if action.decision == "defer" else "Skipped"
    explanation = f"and missed {outcome.missed_count} times" if missed else "and never missed"
    components = {"missed": missed, "deferral": deferral}
    return added_reward(components, f"{not_stored} {explanation}")
