"""Bring the feedback of an agent-memory database into a store.

agent-memory (the TypeScript project that the policies come from) keeps feedback in seven tables.
Each of its decisions becomes one decision here; what was not recorded there is not made up:

- Only rows with ``state_features`` can be trained on. The others are counted and left out.
- A reward is the recorded score: ``outcome_score`` of the last evaluation, or, for a retrieval, the
  mean of its ``contribution_score`` over the outcomes it is linked to (of several links to one
  outcome the last). A score of 0 is a reward, NULL is none. Scores outside [-1, 1] are clamped.
- The method "linear" divided an outcome's value by the number of retrievals it was linked to, so
  that rewards compared the sizes of sessions. That is undone: each has the whole value.
- A row of ``memory_retrievals`` is one decision to retrieve entries of its ``entry_type``. The
  retrievals that were not made are not in the database.
- Consolidations belong to no session; their scope (``project:p-1``, ``global``) stands in for one.

Rows are read one after another from a read-only connection. An import may be repeated when the
database has grown: what is there already stays, later scores replace earlier ones.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from dpo.data.kinds import KINDS
from dpo.data.kinds.base import clamp_reward
from dpo.data.records import Decision, DecisionOutcome, parse_time
from dpo.data.stores import FeedbackStore
from dpo.data.stores.base import batches
from dpo.data.stores.sqlite import sqlite_errors
from dpo.data.strict_json import decode_json
from dpo.errors import InputError
from dpo.files import JSON

TABLES = (
    "memory_retrievals",
    "task_outcomes",
    "retrieval_outcomes",
    "extraction_decisions",
    "extraction_outcomes",
    "consolidation_decisions",
    "consolidation_outcomes",
)

_TIMEOUT_SECONDS = 30

# Times are compared by julianday(): the tables mix "2024-05-01T..Z" with "2024-05-01 ..".
_EXTRACTIONS = """
    SELECT d.*, o.outcome_score, o.evaluated_at, o.retrieval_count, o.success_count
    FROM extraction_decisions AS d LEFT JOIN extraction_outcomes AS o ON o.rowid = (
        SELECT rowid FROM extraction_outcomes
        WHERE decision_id = d.id AND outcome_score IS NOT NULL
        ORDER BY julianday(evaluated_at) DESC, rowid DESC LIMIT 1
    )
"""
_CONSOLIDATIONS = """
    SELECT d.*, o.outcome_score, o.evaluated_at, o.pre_retrieval_rate, o.post_retrieval_rate,
           o.pre_success_rate, o.post_success_rate
    FROM consolidation_decisions AS d LEFT JOIN consolidation_outcomes AS o ON o.rowid = (
        SELECT rowid FROM consolidation_outcomes
        WHERE decision_id = d.id AND outcome_score IS NOT NULL
        ORDER BY julianday(evaluated_at) DESC, rowid DESC LIMIT 1
    )
"""
# max() makes SQLite take the bare columns beside it from the row where the maximum is
_RETRIEVALS = """
    WITH links AS (
        SELECT retrieval_id, outcome_id, contribution_score, attribution_method, created_at,
               max(julianday(created_at)) AS created_day
        FROM retrieval_outcomes WHERE contribution_score IS NOT NULL
        GROUP BY retrieval_id, outcome_id
    ), whole AS (
        SELECT retrieval_id, created_at, created_day, contribution_score * iif(
            attribution_method = 'linear', count(*) OVER (PARTITION BY outcome_id), 1
        ) AS score
        FROM links
    ), scores AS (
        SELECT retrieval_id, avg(score) AS outcome_score, created_at AS evaluated_at,
               max(created_day)
        FROM whole GROUP BY retrieval_id
    ), ends AS (
        SELECT retrieval_id, outcome_type, max(julianday(outcome_at))
        FROM links JOIN task_outcomes ON task_outcomes.id = outcome_id GROUP BY retrieval_id
    )
    SELECT r.*, s.outcome_score, s.evaluated_at, e.outcome_type
    FROM memory_retrievals AS r
    LEFT JOIN scores AS s ON s.retrieval_id = r.id
    LEFT JOIN ends AS e ON e.retrieval_id = r.id
"""


@dataclass(frozen=True, slots=True)
class SkippedRows:
    """Rows of one policy that were left out for one reason, and the first of them."""

    policy: str
    reason: str
    rows: int
    first: str


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What became of the rows of a database.

    Attributes:
        read: rows by policy.
        imported: decisions that were not in the store yet, by policy.
        with_outcome: rows with a score, of those that were not skipped, by policy.
        clamped: scores that were outside [-1, 1], by policy.
        skipped: rows that were left out, by policy and reason.
    """

    read: dict[str, int]
    imported: dict[str, int]
    with_outcome: dict[str, int]
    clamped: dict[str, int]
    skipped: tuple[SkippedRows, ...]

    def lines(self) -> Iterator[str]:
        """Yield the report as text."""
        for policy, rows in self.read.items():
            left_out = sum(item.rows for item in self.skipped if item.policy == policy)
            known = rows - left_out - self.imported[policy]
            yield (
                f"{policy}: {rows} rows read, {self.imported[policy]} imported, {known} already "
                f"there, {left_out} left out; {self.with_outcome[policy]} have an outcome"
            )
            if self.clamped[policy]:
                yield f"  {self.clamped[policy]} scores outside [-1, 1] were clamped"
            for item in self.skipped:
                if item.policy == policy:
                    yield f"  {item.rows} left out: {item.reason}; the first: {item.first}"


def check_original(path: Path) -> None:
    """Refuse what is no agent-memory database, before a store is made for it.

    Raises:
        InputError: no such file, not such a database, damaged, or locked; or none of its decisions
            has its state.
    """
    with sqlite_errors(str(path), _TIMEOUT_SECONDS), closing(_open(path)) as connection:
        _check_tables(connection, path)
        if not any(_has_states(connection, source.table) for source in _SOURCES):
            raise InputError(
                f"{path}: no decision has state_features, so there is nothing to learn from: "
                "record the state with each decision, as the stores of dpo.data.stores do"
            )


def _has_states(connection: sqlite3.Connection, table: str) -> bool:
    columns = {row["name"] for row in connection.execute(f"PRAGMA table_info({table})")}
    if "state_features" not in columns:
        return False
    query = f"SELECT 1 FROM {table} WHERE state_features IS NOT NULL LIMIT 1"
    return connection.execute(query).fetchone() is not None


def import_original(path: Path, store: FeedbackStore) -> ImportReport:
    """Copy the decisions of an agent-memory database into ``store``.

    Raises:
        InputError: no such file, not such a database, damaged, or locked; or a decision is in the
            store with other content.
    """
    tally = _Tally()
    with sqlite_errors(str(path), _TIMEOUT_SECONDS), closing(_open(path)) as connection:
        _check_tables(connection, path)
        for source in _SOURCES:
            for batch in batches(_read(connection, source, tally)):
                tally.imported[source.policy] += store.record_decisions(
                    row.decision for row in batch
                )
                store.record_outcomes(row.outcome for row in batch if row.outcome)
    return tally.report()


@dataclass(frozen=True, slots=True)
class _Row:
    decision: Decision
    outcome: DecisionOutcome | None


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one policy's decisions are, and what they and their outcomes consist of."""

    policy: str
    table: str
    query: str
    decided_at: str
    session: Callable[[Mapping[str, Any]], str]
    action: Callable[[Mapping[str, Any]], dict[str, JSON]]
    outcome_columns: dict[str, str]  # the outcome's name for each column


class _Tally:
    """Counts that become a report; skipped rows are counted under (policy, reason)."""

    def __init__(self) -> None:
        self.read, self.imported = Counter[str](), Counter[str]()
        self.with_outcome, self.clamped = Counter[str](), Counter[str]()
        self.skipped = Counter[tuple[str, str]]()
        self.first: dict[tuple[str, str], str] = {}

    def skip(self, policy: str, reason: str, which: str) -> None:
        self.skipped[policy, reason] += 1
        self.first.setdefault((policy, reason), which)

    def report(self) -> ImportReport:
        policies = [source.policy for source in _SOURCES]
        read, imported, with_outcome, clamped = (
            {policy: counts[policy] for policy in policies}
            for counts in (self.read, self.imported, self.with_outcome, self.clamped)
        )
        skipped = (
            SkippedRows(policy, reason, rows, self.first[policy, reason])
            for (policy, reason), rows in self.skipped.items()
        )
        return ImportReport(read, imported, with_outcome, clamped, tuple(skipped))


def _open(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    address = f"{path.resolve().as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True, timeout=_TIMEOUT_SECONDS)
    connection.row_factory = sqlite3.Row
    return connection


def _check_tables(connection: sqlite3.Connection, path: Path) -> None:
    found = {row["name"] for row in connection.execute("SELECT name FROM sqlite_master")}
    if missing := [name for name in TABLES if name not in found]:
        raise InputError(
            f"{path}: not an agent-memory database with feedback: no table {', '.join(missing)}"
        )


def _read(connection: sqlite3.Connection, source: _Source, tally: _Tally) -> Iterator[_Row]:
    policy = source.policy
    for row in connection.execute(source.query):
        tally.read[policy] += 1
        columns = dict(row)
        where = f"id {columns['id']!r}"
        if columns.get("state_features") is None:
            tally.skip(policy, "no state_features, the state was not recorded", where)
            continue
        try:
            decision, outcome = _decision(columns, source, where), _outcome(columns, source)
        except InputError as error:
            tally.skip(policy, "not a valid decision", str(error))
            continue
        if outcome:
            tally.with_outcome[policy] += 1
            tally.clamped[policy] += outcome.reward != columns["outcome_score"]
        yield _Row(decision, outcome)


def _decision(columns: Mapping[str, Any], source: _Source, where: str) -> Decision:
    kind = KINDS[source.policy]
    features = columns["state_features"]
    text = features if isinstance(features, bytes) else str(features)
    state = decode_json(text, f"{where}: state_features")
    action = source.action(columns)
    kind.parse_state(state, f"{where}: state_features")
    kind.parse_action(action, f"{where}: action")
    return Decision(
        columns["id"],
        source.policy,
        source.session(columns),
        parse_time(str(columns[source.decided_at])),
        state,
        action,
        confidence=columns.get("confidence"),
    )


def _outcome(columns: Mapping[str, Any], source: _Source) -> DecisionOutcome | None:
    score = columns["outcome_score"]
    if score is None:
        return None
    outcome = {
        name: columns[column]
        for name, column in source.outcome_columns.items()
        if columns[column] is not None
    }
    reward = clamp_reward(score) if isinstance(score, int | float) else score
    return DecisionOutcome(columns["id"], parse_time(str(columns["evaluated_at"])), reward, outcome)


def _scope(columns: Mapping[str, Any]) -> str:
    parts = (columns["scope_type"], columns["scope_id"])
    return ":".join(str(part) for part in parts if part is not None)


def _extraction(columns: Mapping[str, Any]) -> dict[str, JSON]:
    action = {"decision": columns["decision"], "entryType": columns["entry_type"]}
    return {name: value for name, value in action.items() if value is not None}


def _retrieval(columns: Mapping[str, Any]) -> dict[str, JSON]:
    return {"shouldRetrieve": True, "types": [columns["entry_type"]]}


def _consolidation(columns: Mapping[str, Any]) -> dict[str, JSON]:
    target = columns["target_entry_id"]
    targets: dict[str, JSON] = {} if target is None else {"targetEntries": [target]}
    return {"action": columns["action"]} | targets


_SOURCES = (
    _Source(
        policy="extraction",
        table="extraction_decisions",
        query=_EXTRACTIONS,
        decided_at="decided_at",
        session=itemgetter("session_id"),
        action=_extraction,
        outcome_columns={"retrievalCount": "retrieval_count", "successCount": "success_count"},
    ),
    _Source(
        policy="retrieval",
        table="memory_retrievals",
        query=_RETRIEVALS,
        decided_at="retrieved_at",
        session=itemgetter("session_id"),
        action=_retrieval,
        outcome_columns={"taskOutcomeType": "outcome_type", "contributionScore": "outcome_score"},
    ),
    _Source(
        policy="consolidation",
        table="consolidation_decisions",
        query=_CONSOLIDATIONS,
        decided_at="decided_at",
        session=_scope,
        action=_consolidation,
        outcome_columns={
            "preRetrievalRate": "pre_retrieval_rate",
            "postRetrievalRate": "post_retrieval_rate",
            "preSuccessRate": "pre_success_rate",
            "postSuccessRate": "post_success_rate",
        },
    ),
)
