"""Feedback in one SQLite file: the embedded default, for the processes of one machine."""

import errno
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

from dpo.data.stores.sql import SCHEMA_VERSION, Row, SqlStore
from dpo.errors import InputError

_TIME = "GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T[0-9][0-9]:[0-9][0-9]:*Z'"
_SCHEMA = f"""
    CREATE TABLE decisions (
        id TEXT NOT NULL PRIMARY KEY CHECK (id <> ''),
        policy TEXT NOT NULL CHECK (policy <> ''),
        session_id TEXT NOT NULL CHECK (session_id <> ''),
        decided_at TEXT NOT NULL CHECK (length(decided_at) = 27 AND decided_at {_TIME}),
        state TEXT NOT NULL CHECK (json_type(state) = 'object'),
        action TEXT NOT NULL CHECK (json_type(action) = 'object'),
        confidence DOUBLE PRECISION CHECK (confidence BETWEEN 0 AND 1),
        propensity DOUBLE PRECISION CHECK (propensity > 0 AND propensity <= 1)
    );
    CREATE INDEX decisions_by_time ON decisions (decided_at, id);
    CREATE TABLE outcomes (
        decision_id TEXT NOT NULL PRIMARY KEY REFERENCES decisions (id) ON DELETE CASCADE,
        at TEXT NOT NULL CHECK (length(at) = 27 AND at {_TIME}),
        reward DOUBLE PRECISION CHECK (reward BETWEEN -1 AND 1),
        outcome TEXT CHECK (json_type(outcome) = 'object'),
        CHECK (reward IS NOT NULL OR outcome IS NOT NULL)
    );
    PRAGMA user_version = {SCHEMA_VERSION};
"""


class SqliteStore(SqlStore):
    """Decisions and outcomes in a SQLite database in write-ahead-log mode."""

    def __init__(self, path: Path, *, create: bool = False, timeout_seconds: float = 30) -> None:
        """Open a store.

        Args:
            path: the database file.
            create: make it if there is none.
            timeout_seconds: how long to wait for another process that is writing.

        Raises:
            InputError: no such file, not a feedback store, of another schema version, or locked.
        """
        self._path, self._timeout_seconds = path, timeout_seconds
        if not path.exists():
            if not create:
                raise InputError(f"{path}: no such file")
            self._create()
        with self._errors():
            self._connection = self._connect()
            try:
                self._check_schema()
            except BaseException:
                self._connection.close()
                raise

    def __str__(self) -> str:
        return str(self._path)

    def close(self) -> None:
        """Close the database; the last process to do so folds the write-ahead log into the file."""
        self._connection.close()

    def _create(self) -> None:
        """Make an empty store aside and give it its name, unless another process is faster."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f"{self._path.name}.tmp-{secrets.token_hex(4)}")
        try:
            with closing(sqlite3.connect(temporary)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(_SCHEMA)
            try:
                os.link(temporary, self._path)
            except FileExistsError:
                return
        finally:
            temporary.unlink(missing_ok=True)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.resolve().as_uri()}?mode=rw",
            uri=True,
            timeout=self._timeout_seconds,
            isolation_level=None,
        )
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")  # what is committed is on the disk
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_schema(self) -> None:
        ((version,),) = self._rows("PRAGMA user_version", ())
        if version == SCHEMA_VERSION:
            return
        tables = {name for (name,) in self._rows("SELECT name FROM sqlite_master", ())}
        if "extraction_decisions" in tables:
            raise InputError(
                f"{self} is an agent-memory database: copy its decisions into a feedback store "
                "with `dpo data import`"
            )
        if version == 0:
            raise InputError(f"{self}: a SQLite database, but not a feedback store")
        raise InputError(
            f"{self}: feedback schema version {version}, expected {SCHEMA_VERSION}: "
            "use the version of dpo-engine that wrote it"
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    def _rows(self, query: str, parameters: Row) -> list[Row]:
        with self._errors():
            return self._connection.execute(query, parameters).fetchall()

    def _run(self, query: str, rows: Sequence[Row]) -> int:
        return self._connection.executemany(query, rows).rowcount

    def _stream(self, query: str, parameters: Row) -> Iterator[Row]:
        with self._errors(), closing(self._connect()) as connection:
            yield from connection.execute(query, parameters)

    def _errors(self) -> AbstractContextManager[None]:
        return sqlite_errors(str(self), self._timeout_seconds)


@contextmanager
def sqlite_errors(where: str, timeout_seconds: float) -> Iterator[None]:
    """Turn what SQLite reports into what the user can act on."""
    try:
        yield
    except sqlite3.Error as error:
        if isinstance(error, sqlite3.ProgrammingError):  # a defect of the caller
            raise
        match (
            getattr(error, "sqlite_errorcode", 0) & 0xFF
        ):  # the low byte is the class of the error
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                raise InputError(
                    f"{where} is locked by another process, for {timeout_seconds:g} s: "
                    "wait for it or end it"
                ) from error
            case sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, str(error), where) from error
            case sqlite3.SQLITE_IOERR:
                raise OSError(errno.EIO, str(error), where) from error
            case _:
                raise InputError(f"{where}: not a usable SQLite file: {error}") from error
