"""What a data set is: its examples, the options it was built with, and what was counted.

Everything but the examples is written to ``<policy>_metadata.json``, under camelCase names.
"""

from dataclasses import dataclass
from datetime import date
from typing import Annotated, Generic, Literal, TypedDict

from dpo.data.examples import Examples
from dpo.data.filters import DecisionFilter, MissingConfidence
from dpo.data.kinds.base import Action, State, TypedKind
from dpo.data.kinds.schema import Count, Range, Share, check_fields
from dpo.errors import InputError

SplitUnit = Literal["session", "group", "time"]
Crossing = Literal["both", "prompt", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Which decisions are taken and how they are split.

    Attributes:
        start_date: first day or moment taken, ISO 8601 or a date or datetime, which becomes that;
            None takes all.
        end_date: last day or moment taken; a date without a time of day includes that whole day.
        sessions: only these.
        entry_types: only decisions that name one of these.
        scope_types: only decisions in one of these.
        outcome_types: only decisions whose task ended so.
        min_confidence: least confidence of a decision, in [0, 1].
        missing_confidence: what ``min_confidence`` does with a decision that has none.
        max_examples: at most so many, drawn evenly from all that pass the filters.
        eval_split: wanted share of the examples on the evaluation side, in (0, 1).
        split_by: what lies whole on one side: "session"; "group", the kind's grouping key; or
            "time", where the latest examples are for evaluation.
        remove_crossing: which evaluation examples are removed because training has the same:
            "both", prompt or grouping key; "prompt"; "none".
        seed: of the split and of the draw of ``max_examples``.

    Raises:
        InputError: a value is out of range, unknown, or contradicts another.
    """

    start_date: str | None = None
    end_date: str | None = None
    sessions: tuple[str, ...] | None = None
    entry_types: tuple[str, ...] | None = None
    scope_types: tuple[str, ...] | None = None
    outcome_types: tuple[str, ...] | None = None
    min_confidence: Share | None = None
    missing_confidence: MissingConfidence = "drop"
    max_examples: Annotated[int, Range(2)] | None = None
    eval_split: Annotated[float, Range(0, 1, is_open=True)] = 0.2
    split_by: SplitUnit = "session"
    remove_crossing: Crossing = "both"
    seed: Count = 0

    def __post_init__(self) -> None:
        for name in ("start_date", "end_date"):
            if isinstance(value := getattr(self, name), date):
                object.__setattr__(self, name, value.isoformat())
        check_fields(self)
        if self.seed and self.split_by == "time" and self.max_examples is None:
            raise InputError("seed has no effect: a split by time draws nothing")
        self.wanted("")

    def wanted(self, policy: str) -> DecisionFilter:
        """Return the filter for the decisions of one policy."""
        return DecisionFilter(
            policy=policy,
            start=self.start_date,
            end=self.end_date,
            sessions=self.sessions,
            entry_types=self.entry_types,
            scope_types=self.scope_types,
            outcome_types=self.outcome_types,
            min_confidence=self.min_confidence,
            missing_confidence=self.missing_confidence,
            only_with_outcomes=True,
        )


class BuildKeywords(TypedDict, total=False):
    """The fields of `BuildOptions`, as keywords of the named builders."""

    start_date: date | str | None
    end_date: date | str | None
    sessions: tuple[str, ...] | None
    entry_types: tuple[str, ...] | None
    scope_types: tuple[str, ...] | None
    outcome_types: tuple[str, ...] | None
    min_confidence: float | None
    missing_confidence: MissingConfidence
    max_examples: int | None
    eval_split: float
    split_by: SplitUnit
    remove_crossing: Crossing
    seed: int


@dataclass(frozen=True, slots=True)
class DateRange:
    """Times of the earliest and the latest example, ISO 8601."""

    start: str
    end: str


@dataclass(frozen=True, slots=True)
class FilterCounts:
    """Decisions left by each filter, in the order in which they apply.

    ``policy`` is how many the store has for this policy; each further number is what the filter of
    that name left of the number before it.
    """

    policy: Count
    start: Count
    end: Count
    sessions: Count
    entry_types: Count
    scope_types: Count
    outcome_types: Count
    min_confidence: Count
    only_with_outcomes: Count
    max_examples: Count


@dataclass(frozen=True, slots=True)
class SplitStats:
    """How whole units were split, and what crosses nevertheless.

    Attributes:
        train_units: units on the training side; for "time" different times.
        eval_units: units on the evaluation side, before anything is removed.
        crossing_prompts: evaluation examples whose prompt also occurs in training.
        crossing_groups: evaluation examples whose grouping key also occurs in training.
        crossing_sessions: evaluation examples whose session also has examples in training.
        removed_examples: evaluation examples removed for their prompt or grouping key.
    """

    train_units: Count
    eval_units: Count
    crossing_prompts: Count
    crossing_groups: Count
    crossing_sessions: Count
    removed_examples: Count


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """What a data set holds and how it came about.

    Attributes:
        total_examples: on both sides together.
        train_examples: on the training side.
        eval_examples: on the evaluation side.
        simulated_examples: of the total, those of the simulator's sessions.
        date_range: of the examples.
        filters: how many decisions each filter left.
        split: how they were split.
    """

    total_examples: Count
    train_examples: Count
    eval_examples: Count
    simulated_examples: Count
    date_range: DateRange
    filters: FilterCounts
    split: SplitStats


@dataclass(frozen=True, slots=True)
class Dataset(Generic[State, Action]):
    """Examples to train on and examples to evaluate on, each in the order of time."""

    kind: TypedKind[State, Action]
    train: Examples[State, Action]
    eval: Examples[State, Action]
    stats: DatasetStats
    options: BuildOptions


def crossing_note(stats: DatasetStats, options: BuildOptions) -> str | None:
    """Say what to choose where most evaluation examples were removed; None where few were."""
    removed, evaluated = stats.split.removed_examples, stats.eval_examples
    if removed <= evaluated:
        return None
    return (
        f"{removed} of {removed + evaluated} evaluation examples shared their prompt or grouping "
        f"key with training and were removed: what is left is a small part, and no fair sample. "
        f"{crossing_advice(stats.split.crossing_prompts, removed + evaluated, options)}"
    )


def crossing_advice(prompts: int, evaluated: int, options: BuildOptions) -> str:
    """Say what to choose when ``prompts`` of ``evaluated`` examples share theirs with training."""
    choices = []
    if options.split_by != "group":
        choices.append("split_by 'group' (--split-by group), which keeps grouping keys whole")
    if options.remove_crossing == "both" and 2 * prompts <= evaluated:
        choices.append("remove_crossing 'prompt', which lets grouping keys cross")
    choices.append("remove_crossing 'none', which evaluates on what was trained on")
    return f"Choose {'; or '.join(choices)}"
