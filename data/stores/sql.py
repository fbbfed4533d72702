"""Stores in two SQL tables, ``decisions`` and ``outcomes``: what SQLite and PostgreSQL share."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from dpo.data.filters import DecisionFilter
from dpo.data.records import (
    Decision,
    format_time,
    parse_time,
)
from dpo.data.stores.base import FeedbackStore, StoredDecision, batches
from dpo.data.strict_json import decode_json, encode_json

Row: TypeAlias = Sequence[Any]

SCHEMA_VERSION = 1
_PARAMETERS = 900  # an old SQLite takes 999 in one query

# CAST: PostgreSQL gives the text of its JSON type, SQLite has text already
_SELECT = """
    SELECT d.id, d.policy, d.session_id, d.decided_at, CAST(d.state AS TEXT),
           CAST(d.action AS TEXT), d.confidence, d.propensity,
           o.reward, CAST(o.outcome AS TEXT), o.at
    FROM decisions AS d LEFT JOIN outcomes AS o ON o.decision_id = d.id
"""
_INSERT_DECISION = """
    INSERT INTO decisions
        (id, policy, session_id, decided_at, state, action, confidence, propensity)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
_SET_OUTCOME = """
    INSERT INTO outcomes (decision_id, at, reward, outcome) VALUES (?, ?, ?, ?)
    ON CONFLICT (decision_id) DO UPDATE
    SET at = excluded.at, reward = excluded.reward, outcome = excluded.outcome
"""


class SqlStore(FeedbackStore):
    """A store in two tables; a database brings connections, transactions and its own errors."""

    def count(self) -> int:
        """Return the number of decisions."""
        ((number,),) = self._rows("SELECT count(*) FROM decisions", ())
        return int(number)

    @abstractmethod
    def _rows(self, query: str, parameters: Row) -> Iterable[Row]:
        """Run a query with ``?`` for its parameters and return its rows at once."""

    @abstractmethod
    def _run(self, query: str, rows: Sequence[Row]) -> int:
        """Run a command once for every row of parameters; return how many rows it changed."""

    @abstractmethod
    def _stream(self, query: str, parameters: Row) -> Iterator[Row]:
        """Run a query on a snapshot of its own and yield its rows in bounded memory."""

    def _known(self, ids: Collection[str]) -> dict[str, StoredDecision]:
        known = {}
        for batch in batches(ids, _PARAMETERS):
            marks = ", ".join("?" * len(batch))
            for row in self._rows(f"{_SELECT} WHERE d.id IN ({marks})", batch):
                known[str(row[0])] = self._stored(row)
        return known

    def _write(self, new: Sequence[StoredDecision], updated: Sequence[StoredDecision]) -> None:
        self._run(_INSERT_DECISION, [self._decision_row(stored.decision) for stored in new])
        known = [stored for stored in (*new, *updated) if stored.outcome_at]
        self._run(_SET_OUTCOME, [self._outcome_row(stored) for stored in known])

    def _read(self, wanted: DecisionFilter) -> Iterator[Decision]:
        conditions = {
            "d.policy = ?": wanted.policy,
            "d.decided_at >= ?": wanted.first_moment and format_time(wanted.first_moment),
            "d.decided_at <= ?": wanted.last_moment and format_time(wanted.last_moment),
        }
        used = {text: value for text, value in conditions.items() if value is not None}
        where = " AND ".join(used) or "1 = 1"
        query = f"{_SELECT} WHERE {where} ORDER BY d.decided_at, d.id"
        for row in self._stream(query, list(used.values())):
            yield self._stored(row).decision

    def _delete_before(self, moment: datetime) -> int:
        with self._transaction():
            return self._run("DELETE FROM decisions WHERE decided_at < ?", [[format_time(moment)]])

    def _decision_row(self, decision: Decision) -> Row:
        where = f"{self}: decision {decision.id!r}"
        return (
            decision.id,
            decision.policy,
            decision.session_id,
            format_time(decision.decided_at),
            encode_json(decision.state, f"{where}: state"),
            encode_json(decision.action, f"{where}: action"),
            decision.confidence,
            decision.propensity,
        )

    def _outcome_row(self, stored: StoredDecision) -> Row:
        decision, at = stored.decision, stored.outcome_at
        assert at
        where = f"{self}: outcome of decision {decision.id!r}"
        outcome = None if decision.outcome is None else encode_json(decision.outcome, where)
        return (decision.id, format_time(at), decision.reward, outcome)

    def _stored(self, row: Row) -> StoredDecision:
        identity, policy, session, decided_at, state, action, confidence, propensity = row[:8]
        reward, outcome, at = row[8:]
        where = f"{self}: decision {identity!r}"
        decision = Decision(
            identity,
            policy,
            session,
            _time(decided_at),
            decode_json(state, f"{where}: state"),
            decode_json(action, f"{where}: action"),
            confidence,
            propensity,
            reward,
            None if outcome is None else decode_json(outcome, f"{where}: outcome"),
        )
        return StoredDecision(decision, None if at is None else _time(at))


def _time(value: str | datetime) -> datetime:
    return parse_time(value) if isinstance(value, str) else value


def shown_url(url: str) -> str:
    """Return where a database is, without user, password and options."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
