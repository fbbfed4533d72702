"""From a feedback store to a training and an evaluation set.

Decisions are read once, in a stream; what passes the filters goes into an `ExampleTable` and is
split along whole units. The same decisions, options and seed give the same data set.

Shapes: N examples.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from dpo.data.dataset import (
    BuildKeywords,
    BuildOptions,
    Dataset,
    DatasetStats,
    DateRange,
    FilterCounts,
    SplitStats,
    crossing_advice,
)
from dpo.data.examples import Columns, Examples, ExampleTable, check_decision
from dpo.data.filters import DecisionFilter
from dpo.data.kinds.base import Action, State, TypedKind
from dpo.data.kinds.consolidation import CONSOLIDATION, ConsolidationAction, ConsolidationState
from dpo.data.kinds.extraction import EXTRACTION, ExtractionAction, ExtractionState
from dpo.data.kinds.retrieval import RETRIEVAL, RetrievalAction, RetrievalState
from dpo.data.records import format_time, is_simulated
from dpo.data.splits import crossing_rows, seeded_rank, split_by_time, split_by_unit
from dpo.data.stores import FeedbackStore, open_store
from dpo.data.texts import json_line
from dpo.errors import InputError
from dpo.progress import Console

Source: TypeAlias = str | Path | FeedbackStore

_FAULTS_SHOWN = 20
FILTERS = tuple(FilterCounts.__dataclass_fields__)[:-1]  # all but max_examples, in their order


def build_extraction_dataset(
    feedback: Source, **options: Unpack[BuildKeywords]
) -> Dataset[ExtractionState, ExtractionAction]:
    """Build the data set of the extraction policy; see `build_dataset`.

    Example:
        >>> from dpo import build_extraction_dataset
        >>> dataset = build_extraction_dataset("feedback.db", eval_split=0.2, split_by="group")
        >>> dataset.stats.train_examples > dataset.stats.eval_examples > 0
        True
    """
    return build_dataset(feedback, EXTRACTION, _options(options))


def build_retrieval_dataset(
    feedback: Source, **options: Unpack[BuildKeywords]
) -> Dataset[RetrievalState, RetrievalAction]:
    """Build the data set of the retrieval policy; see `build_dataset`.

    Example:
        >>> from dpo import build_retrieval_dataset
        >>> len(build_retrieval_dataset("feedback.db", split_by="group").train) > 0
        True
    """
    return build_dataset(feedback, RETRIEVAL, _options(options))


def build_consolidation_dataset(
    feedback: Source, **options: Unpack[BuildKeywords]
) -> Dataset[ConsolidationState, ConsolidationAction]:
    """Build the data set of the consolidation policy; see `build_dataset`.

    Example:
        >>> from dpo import build_consolidation_dataset
        >>> dataset = build_consolidation_dataset(
        ...     "feedback.db", split_by="group", remove_crossing="prompt"
        ... )
        >>> len(dataset.train) > 0
        True
    """
    return build_dataset(feedback, CONSOLIDATION, _options(options))


def build_dataset(
    feedback: Source,
    kind: TypedKind[State, Action],
    options: BuildOptions | None = None,
    *,
    console: Console | None = None,
) -> Dataset[State, Action]:
    """Read, filter and split the decisions of one policy.

    Args:
        feedback: a store, or what `open_store` takes.
        kind: of the policy.
        options: which decisions are taken and how they are split.
        console: where it is shown how many have been read; None shows nothing.

    Raises:
        InputError: the store cannot be read, a record is not of this kind, the filters leave
            nothing, there are too few units to split, or all evaluation examples would have to be
            removed because training has the same; then it says which unit to choose.
    """
    options = options or BuildOptions()
    table, left = _read(feedback, kind, options, console or Console(quiet=True))
    examples = _draw(table.all(), options)
    columns = examples.columns()
    is_eval = _evaluation_side(columns, table, options)
    is_removed = _removed(columns, is_eval, options)
    train, evaluation = examples.where(~is_eval), examples.where(is_eval & ~is_removed)
    kept = examples.where(~is_removed)
    of_simulator = np.array([is_simulated(session) for session in table.sessions])
    stats = DatasetStats(
        total_examples=len(kept),
        train_examples=len(train),
        eval_examples=len(evaluation),
        simulated_examples=int(of_simulator[columns.sessions[~is_removed]].sum()),
        date_range=DateRange(
            format_time(kept.metadata(0).decided_at), format_time(kept.metadata(-1).decided_at)
        ),
        filters=FilterCounts(**left, max_examples=len(examples)),
        split=_split_stats(columns, is_eval, is_removed, options),
    )
    return Dataset(kind, train, evaluation, stats, options)


def _options(keywords: BuildKeywords) -> BuildOptions:
    return BuildOptions(**cast(dict[str, Any], keywords))  # dates become text


def _read(
    feedback: Source, kind: TypedKind[State, Action], options: BuildOptions, console: Console
) -> tuple[ExampleTable[State, Action], dict[str, int]]:
    """Put the decisions that pass the filters into a table, in the order of time.

    Returns:
        The table, and by the name of each filter how many decisions it left.

    Raises:
        InputError: no decision is left; it names the filter that took the last.
    """
    table = ExampleTable(kind)
    wanted = options.wanted(kind.name)
    refused = Counter[str]()
    faults: list[str] = []
    seen = 0
    with _opened(feedback) as store, console.bar("read", store.count(), unit="decisions") as bar:
        for decision in bar.each(store.decisions(DecisionFilter(policy=kind.name))):
            seen += 1
            refusal = next(wanted.refusals(decision), None)
            if refusal is not None:
                refused[refusal] += 1
                continue
            where = f"decision {decision.id!r}"
            try:
                if faults:
                    check_decision(decision, kind, where)
                else:
                    table.append_decision(decision, where)
            except InputError as error:
                faults.append(f"{store.place(decision.id)}: {error}")
                if len(faults) == _FAULTS_SHOWN:
                    faults.append("... and perhaps more")
                    break
        bar.update(seen, seen)  # those of other policies were counted too
        if faults:
            raise InputError("\n".join(faults))
    left = {}
    for name in FILTERS:
        seen -= refused[name]
        left[name] = seen
    if not seen:
        raise InputError(f"{store}: {_nothing_left(kind.name, left)}")
    return table, left


def _opened(feedback: Source) -> AbstractContextManager[FeedbackStore]:
    """Open a store that was named; one that was given stays open for its owner."""
    if isinstance(feedback, FeedbackStore):
        return contextlib.nullcontext(feedback)
    return open_store(feedback)


def _draw(examples: Examples[State, Action], options: BuildOptions) -> Examples[State, Action]:
    """Draw at most ``max_examples``, each as likely as any other, by a seeded rank of its id."""
    if options.max_examples is None:
        return examples
    ranks = [seeded_rank(examples.id(row), options.seed) for row in range(len(examples))]
    is_drawn = np.zeros(len(examples), dtype=np.bool_)
    is_drawn[np.argsort(np.array(ranks, dtype=np.uint64))[: options.max_examples]] = True
    return examples.where(is_drawn)


def _nothing_left(policy: str, left: Mapping[str, int]) -> str:
    """Say which filter took the last decision."""
    if not left["policy"]:
        return f"no decisions of the policy {policy!r}"
    name = next(name for name, count in left.items() if not count)
    before = [count for count in left.values() if count]
    return (
        f"no decisions are left: of {left['policy']} for the policy {policy!r} "
        f"the filter {name} refused the last {before[-1]}"
    )


def _evaluation_side(
    columns: Columns, table: ExampleTable[State, Action], options: BuildOptions
) -> NDArray[np.bool_]:
    """Split along the chosen unit; (N,) true on the evaluation side."""
    if options.split_by == "time":
        return split_by_time(columns.times, eval_split=options.eval_split)
    names: Sequence[str]
    if options.split_by == "session":
        units, names = columns.sessions, table.sessions
    else:
        units, names = columns.groups, [json_line(key) for key in table.groups]
    return split_by_unit(units, names, eval_split=options.eval_split, seed=options.seed)


def _removed(
    columns: Columns, is_eval: NDArray[np.bool_], options: BuildOptions
) -> NDArray[np.bool_]:
    """Mark the evaluation rows (N,) that are removed because training has the same."""
    prompts = crossing_rows(columns.prompts, is_eval)
    groups = crossing_rows(columns.groups, is_eval)
    is_removed = {"both": prompts | groups, "prompt": prompts, "none": np.zeros_like(prompts)}[
        options.remove_crossing
    ]
    evaluated, prompts_crossing = int(is_eval.sum()), int(prompts.sum())
    if evaluated == int(is_removed.sum()):
        raise InputError(
            f"split_by {options.split_by!r} puts {evaluated} examples on the evaluation side, but "
            f"{prompts_crossing} of them share their prompt and {int(groups.sum())} their grouping "
            "key with training, so that none would be left. "
            f"{crossing_advice(prompts_crossing, evaluated, options)}"
        )
    return is_removed


def _split_stats(
    columns: Columns,
    is_eval: NDArray[np.bool_],
    is_removed: NDArray[np.bool_],
    options: BuildOptions,
) -> SplitStats:
    units = {"session": columns.sessions, "group": columns.groups, "time": columns.times}
    unit = units[options.split_by]
    return SplitStats(
        train_units=len(np.unique(unit[~is_eval])),
        eval_units=len(np.unique(unit[is_eval])),
        crossing_prompts=int(crossing_rows(columns.prompts, is_eval).sum()),
        crossing_groups=int(crossing_rows(columns.groups, is_eval).sum()),
        crossing_sessions=int(crossing_rows(columns.sessions, is_eval).sum()),
        removed_examples=int(is_removed.sum()),
    )
