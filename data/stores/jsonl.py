"""Feedback as a log in JSON Lines, plain or gzip: a line for each decision and each later outcome.

The lines are the records of `dpo.data.records`. A line never changes; only `delete_before` writes
the log anew. An index in a temporary SQLite file, made when the log is opened and grown with it,
tells where what stands: memory stays bounded, and a big log takes time to open. An agent that keeps
many decisions and restarts often is better served by a SQLite store. A batch that is cut off leaves
its first lines in a plain log; recording it again completes it.
"""

import codecs
import itertools
import json
import sqlite3
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias, TypeGuard

from dpo.data.filters import DecisionFilter
from dpo.data.records import (
    Decision,
    DecisionOutcome,
    decision_from_json,
    decision_to_json,
    outcome_from_json,
    outcome_to_json,
)
from dpo.data.stores.appended import AppendedFile, GzipFile, PlainFile
from dpo.data.stores.base import (
    FeedbackStore,
    StoredDecision,
    as_recorded,
    same_decision,
    supersedes,
)
from dpo.data.stores.sqlite import sqlite_errors
from dpo.data.strict_json import decode_json, encode_json
from dpo.errors import InputError
from dpo.files import JSON

_FAULTS_SHOWN = 20
_FIRST_MOMENT, _LAST_MOMENT = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_INDEX = """
    PRAGMA journal_mode = MEMORY;
    PRAGMA cache_size = -131072;  -- KiB: random ids touch the whole index
    CREATE TABLE decisions (
        id TEXT PRIMARY KEY, policy TEXT, decided_at INTEGER, start INTEGER, length INTEGER,
        outcome_start INTEGER, outcome_length INTEGER
    );
"""
_SELECT = "SELECT start, length, outcome_start, outcome_length FROM decisions"
_IN_ORDER = f"""
    {_SELECT} WHERE decided_at BETWEEN :first AND :last AND policy = coalesce(:policy, policy)
    ORDER BY decided_at, id
"""
_KEPT = """
    SELECT start, length FROM decisions WHERE decided_at >= :moment
    UNION
    SELECT outcome_start, outcome_length FROM decisions
    WHERE decided_at >= :moment AND outcome_start IS NOT NULL
    ORDER BY start
"""
_Places: TypeAlias = tuple[int, int, int | None, int | None]  # a decision's line, its outcome's


class JsonLinesStore(FeedbackStore):
    """Decisions and outcomes in an append-only file that several processes write to."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open a log and look through it.

        Args:
            path: a file that ends in ``.jsonl`` or ``.jsonl.gz``.
            create: make it if there is none.

        Raises:
            InputError: no such file, or lines that are no records; up to twenty are named.
        """
        self._path = path
        self._set_aside: list[str] = []
        if not path.exists():
            if not create:
                raise InputError(f"{path}: no such file")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        self._log = _Log(path)
        self._look()

    def __str__(self) -> str:
        return str(self._path)

    @property
    def warnings(self) -> Sequence[str]:
        """What an interrupted writer left unfinished, and where it was put."""
        torn = self._log.file.torn_bytes
        if not torn:
            return self._set_aside
        return [
            *self._set_aside,
            f"{self}: the last line is unfinished and left out ({torn} bytes)",
        ]

    def place(self, decision_id: str) -> str:
        """Return the file and the line of a decision."""
        return f"{self}:{self._log.line_number(decision_id)}"

    def count(self) -> int:
        """Return the number of decisions."""
        self._look()
        return self._log.count()

    def close(self) -> None:
        """Close the log and drop its index."""
        self._log.close()

    def _look(self) -> None:
        """Take in what other processes have appended."""
        if not self._log.file.is_current():
            self._log = _Log(self._path)
        with self._log.file.shared():
            self._log.file.look()
        self._log.scan()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with ExitStack() as lock:
            lock.enter_context(self._log.file.exclusive())
            while not self._log.file.is_current():
                lock.close()
                self._log = _Log(self._path)
                lock.enter_context(self._log.file.exclusive())
            self._log.file.look()
            self._log.scan()
            if torn := self._log.file.torn_bytes:
                aside = self._log.file.set_torn_aside()
                self._set_aside.append(
                    f"{self}: 1 unfinished line ({torn} bytes) was moved to {aside}"
                )
            yield

    def _known(self, ids: Collection[str]) -> dict[str, StoredDecision]:
        found = ((identity, self._log.find(identity)) for identity in ids)
        return {identity: stored for identity, stored in found if stored}

    def _write(self, new: Sequence[StoredDecision], updated: Sequence[StoredDecision]) -> None:
        lines = [line for stored in new for line in _lines(stored)]
        self._log.append(lines + [_Line(stored, is_outcome=True) for stored in updated])

    def _read(self, wanted: DecisionFilter) -> Iterator[Decision]:
        self._look()
        return self._log.in_order(wanted)

    def _delete_before(self, moment: datetime) -> int:
        with self._transaction():
            before = self._log.count()
            kept = self._log.count(moment)
            if kept < before:
                self._log.file.replace(self._log.lines_since(moment))
        return before - kept


@dataclass(frozen=True, slots=True)
class _Line:
    """A line to append: a decision, perhaps with an outcome of the same time, or an outcome."""

    stored: StoredDecision
    is_outcome: bool

    def encode(self, where: str) -> bytes:
        decision, at = self.stored.decision, self.stored.outcome_at
        record = decision_to_json(decision)
        if self.is_outcome:
            assert at
            record = outcome_to_json(
                DecisionOutcome(decision.id, at, decision.reward, decision.outcome)
            )
        return encode_json(record, f"{where}: decision {decision.id!r}").encode() + b"\n"


def _lines(new: StoredDecision) -> list[_Line]:
    """Return the line of a decision, and that of its outcome if it was known only later."""
    if new.outcome_at in (None, new.decision.decided_at):
        return [_Line(new, is_outcome=False)]
    bare = replace(new.decision, reward=None, outcome=None)
    return [_Line(StoredDecision(bare, None), is_outcome=False), _Line(new, is_outcome=True)]


class _Log:
    """A log file and its index; another takes its place if the file is replaced."""

    def __init__(self, path: Path) -> None:
        is_gzip = path.suffix.lower() == ".gz"
        self.file: AppendedFile = GzipFile(path) if is_gzip else PlainFile(path)
        self._scanned = self._newlines = 0
        self._index = sqlite3.connect("", isolation_level=None)  # a temporary file without a name
        weakref.finalize(self, self._index.close)
        self._index.executescript(_INDEX)

    def close(self) -> None:
        self.file.close()
        self._index.close()

    def count(self, since: datetime | None = None) -> int:
        query = "SELECT count(*) FROM decisions WHERE decided_at >= ?"
        first = _microseconds(since or _FIRST_MOMENT)
        return int(self._index.execute(query, (first,)).fetchone()[0])

    def find(self, identity: str) -> StoredDecision | None:
        row = self._index.execute(f"{_SELECT} WHERE id = ?", (identity,)).fetchone()
        return self._stored(row) if row else None

    def line_number(self, identity: str) -> int:
        """Return the number, from 1, of the line that holds a decision."""
        query = "SELECT start FROM decisions WHERE id = ?"
        ((start,),) = self._index.execute(query, (identity,)).fetchall()
        before = itertools.accumulate((len(line) for line in self.file.lines(0)), initial=0)
        return 1 + sum(1 for _ in itertools.takewhile(lambda position: position < start, before))

    def in_order(self, wanted: DecisionFilter) -> Iterator[Decision]:
        """Yield the decisions of a policy and a time span, as they were at the last scan."""
        first, last = wanted.first_moment, wanted.last_moment
        parameters = {
            "first": _microseconds(first or _FIRST_MOMENT),
            "last": _microseconds(last or _LAST_MOMENT),
            "policy": wanted.policy,
        }
        with self._errors():
            for places in self._index.execute(_IN_ORDER, parameters):
                yield self._stored(places).decision

    def lines_since(self, moment: datetime) -> Iterator[bytes]:
        """Yield the lines of decisions from ``moment`` on, and of their latest outcomes."""
        for start, length in self._index.execute(_KEPT, {"moment": _microseconds(moment)}):
            yield self.file.read(start, length).removesuffix(b"\n") + b"\n"

    def append(self, lines: Sequence[_Line]) -> None:
        """Append lines to a log that is scanned to its end, and take them into the index."""
        if not lines:
            return
        texts = [line.encode(str(self.file.path)) for line in lines]
        position = self.file.append(b"".join(texts))
        self._newlines += len(texts) + (position - self._scanned)
        with self._indexing():
            for line, text in zip(lines, texts, strict=True):
                self._admit(line.stored, line.is_outcome, position, len(text), "")
                position += len(text)
        self._scanned = position

    def scan(self) -> None:
        """Take the lines that were appended since the last scan into the index.

        Raises:
            InputError: lines that are no records or contradict earlier ones, each with its number.
        """
        position, newlines = self._scanned, self._newlines
        faults: list[str] = []
        with self._indexing():
            for line in self.file.lines(position):
                try:
                    self._admit_line(line, position, f"{self.file.path}:{newlines + 1}")
                except InputError as error:
                    faults.append(str(error))
                position += len(line)
                newlines += line.endswith(b"\n")
                if len(faults) == _FAULTS_SHOWN:
                    faults.append("... and perhaps more")
                    break
            if faults:
                raise InputError("\n".join(faults))
        self._scanned, self._newlines = position, newlines

    @contextmanager
    def _indexing(self) -> Iterator[None]:
        """Change the index as a whole or not at all."""
        with self._errors(), self._index:
            self._index.execute("BEGIN")
            yield

    def _errors(self) -> AbstractContextManager[None]:
        return sqlite_errors(f"index of {self.file.path}", timeout_seconds=0)

    def _admit_line(self, line: bytes, start: int, where: str) -> None:
        text = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
        if text.isspace():
            return
        record = decode_json(text, where)
        if not _is_outcome(record):
            decision = decision_from_json(record, where)
            self._admit(as_recorded(decision), False, start, len(line), where)
            return
        outcome = outcome_from_json(record, where)
        known = self.find(outcome.decision_id)
        if known is None:
            raise InputError(
                f"{where}: outcome of decision {outcome.decision_id!r}, which is not further up"
            )
        self._admit(known.with_outcome(outcome), True, start, len(line), where)

    def _admit(
        self, new: StoredDecision, is_outcome: bool, start: int, length: int, where: str
    ) -> None:
        """Enter a line that begins at ``start`` into the index, unless it says nothing new."""
        decision, place = new.decision, (start, length)
        if not is_outcome:
            outcome_place = (None, None) if new.outcome_at is None else place
            time = _microseconds(decision.decided_at)
            row = (decision.id, decision.policy, time, *place, *outcome_place)
            query = "INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
            if self._index.execute(query, row).rowcount:
                return
        known = self.find(decision.id)
        assert known
        if not same_decision(known.decision, decision):
            raise InputError(f"{where}: decision {decision.id!r} has other content further up")
        if supersedes(new, known, where):
            query = "UPDATE decisions SET outcome_start = ?, outcome_length = ? WHERE id = ?"
            self._index.execute(query, (*place, decision.id))

    def _stored(self, places: _Places) -> StoredDecision:
        start, length, outcome_start, outcome_length = places
        stored = as_recorded(decision_from_json(self._record(start, length), str(self.file.path)))
        if outcome_start is None or outcome_length is None or outcome_start == start:
            return stored
        record = self._record(outcome_start, outcome_length)
        if not _is_outcome(record):  # the decision again, now with an outcome
            return as_recorded(decision_from_json(record, str(self.file.path)))
        return stored.with_outcome(outcome_from_json(record, str(self.file.path)))

    def _record(self, start: int, length: int) -> JSON:
        record: JSON = json.loads(self.file.read(start, length))  # it was checked when scanned
        return record


def _is_outcome(record: object) -> TypeGuard[Mapping[str, JSON]]:
    return isinstance(record, Mapping) and "decision_id" in record


def _microseconds(time: datetime) -> int:
    return (time - _FIRST_MOMENT) // timedelta(microseconds=1)
