"""Feedback in a PostgreSQL database: the same tables as in SQLite, for many machines.

Importing this module needs psycopg, so only `dpo.data.stores.open_store` imports it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg
from psycopg import conninfo, errors

from dpo.data.stores.sql import SCHEMA_VERSION, Row, SqlStore, shown_url
from dpo.errors import InputError, RunError

_SCHEMA = f"""
    CREATE TABLE decisions (
        id TEXT COLLATE "C" PRIMARY KEY CHECK (id <> ''),
        policy TEXT NOT NULL CHECK (policy <> ''),
        session_id TEXT NOT NULL CHECK (session_id <> ''),
        decided_at TIMESTAMPTZ NOT NULL,
        state JSON NOT NULL CHECK (json_typeof(state) = 'object'),
        action JSON NOT NULL CHECK (json_typeof(action) = 'object'),
        confidence DOUBLE PRECISION CHECK (confidence BETWEEN 0 AND 1),
        propensity DOUBLE PRECISION CHECK (propensity > 0 AND propensity <= 1)
    );
    CREATE INDEX decisions_by_time ON decisions (decided_at, id);
    CREATE TABLE outcomes (
        decision_id TEXT COLLATE "C" PRIMARY KEY REFERENCES decisions (id) ON DELETE CASCADE,
        at TIMESTAMPTZ NOT NULL,
        reward DOUBLE PRECISION CHECK (reward BETWEEN -1 AND 1),
        outcome JSON CHECK (json_typeof(outcome) = 'object'),
        CHECK (reward IS NOT NULL OR outcome IS NOT NULL)
    );
    CREATE TABLE feedback_schema AS SELECT {SCHEMA_VERSION} AS version;
"""
_CREATION_LOCK = 20240501  # any number, the same for every process that creates the tables
_ROWS_PER_FETCH = 500
_CONNECT_TIMEOUT_SECONDS = 10


class PostgresStore(SqlStore):
    """Decisions and outcomes in the tables of a database, found by its ``search_path``."""

    def __init__(self, url: str, *, create: bool = False, timeout_seconds: float = 30) -> None:
        """Connect to a database.

        Args:
            url: ``postgresql://user:password@host:port/database``, or with libpq's other options.
            create: make the tables if there are none.
            timeout_seconds: how long to wait for another process that is writing.

        Raises:
            InputError: the server cannot be reached, there are no tables, or they are of another
                schema version.
        """
        self._url, self._timeout_seconds = url, timeout_seconds
        self._connection = self._connect()
        try:
            with self._errors():
                if create:
                    self._create()
                self._check_schema()
        except BaseException:
            self._connection.close()
            raise

    def __str__(self) -> str:
        return shown_url(self._url)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _connect(self) -> psycopg.Connection:
        try:
            has_timeout = "connect_timeout" in conninfo.conninfo_to_dict(self._url)
            defaults = {} if has_timeout else {"connect_timeout": _CONNECT_TIMEOUT_SECONDS}
            address = conninfo.make_conninfo(self._url, **defaults)
            connection = psycopg.connect(address, autocommit=True, application_name="dpo-feedback")
        except psycopg.Error as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self}: cannot connect to PostgreSQL: {reason}") from error
        connection.execute("SET TIME ZONE 'UTC'")
        milliseconds = str(round(self._timeout_seconds * 1000))
        connection.execute("SELECT set_config('lock_timeout', %s, false)", [milliseconds])
        return connection

    def _create(self) -> None:
        with self._connection.transaction():
            self._connection.execute("SELECT pg_advisory_xact_lock(%s)", [_CREATION_LOCK])
            if not self._has_table("feedback_schema") and not self._has_table("decisions"):
                self._connection.execute(_SCHEMA.encode())

    def _check_schema(self) -> None:
        if not self._has_table("feedback_schema"):
            raise InputError(f"{self}: no feedback store in this database")
        version = [number for (number,) in self._rows("SELECT version FROM feedback_schema", ())]
        if version != [SCHEMA_VERSION]:
            raise InputError(
                f"{self}: feedback schema version {', '.join(map(str, version)) or 'missing'}, "
                f"expected {SCHEMA_VERSION}: use the version of dpo-engine that wrote it"
            )

    def _has_table(self, name: str) -> bool:
        ((found,),) = self._rows("SELECT to_regclass(?) IS NOT NULL", [name])
        return bool(found)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors(), self._connection.transaction():
            self._connection.execute("LOCK TABLE decisions IN SHARE ROW EXCLUSIVE MODE")
            yield

    def _rows(self, query: str, parameters: Row) -> list[Row]:
        with self._errors():
            return list(self._connection.execute(_query(query), parameters))

    def _run(self, query: str, rows: Sequence[Row]) -> int:
        with self._connection.cursor() as cursor:
            cursor.executemany(_query(query), rows)
            return cursor.rowcount

    def _stream(self, query: str, parameters: Row) -> Iterator[Row]:
        with (
            self._errors(),
            self._connect() as connection,
            connection.transaction(),
            connection.cursor(name="decisions") as cursor,
        ):
            cursor.itersize = _ROWS_PER_FETCH
            cursor.execute(_query(query), parameters)
            yield from cursor

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what PostgreSQL reports into what the user can act on."""
        try:
            yield
        except errors.LockNotAvailable as error:
            raise InputError(
                f"{self} is locked by another process, for {self._timeout_seconds:g} s: "
                "wait for it or end it"
            ) from error
        except errors.OperationalError as error:
            raise RunError(f"{self}: {error}") from error
        except errors.Error as error:
            raise InputError(f"{self}: PostgreSQL refuses: {error}") from error


def _query(text: str) -> bytes:
    """Return a query with psycopg's mark for parameters; bytes, for it is no literal text."""
    return text.replace("?", "%s").encode()
