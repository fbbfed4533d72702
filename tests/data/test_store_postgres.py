import sys
from datetime import UTC, datetime

import psycopg
import pytest

from dpo.data.records import Decision
from dpo.data.stores import open_store
from dpo.data.stores.postgres import PostgresStore
from dpo.errors import InputError, RunError

DAY = datetime(2024, 5, 1, tzinfo=UTC)
DECISION = Decision("d-1", "extraction", "s-1", DAY, {}, {}, reward=0.5)


def run(url: str, query: bytes) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(query)


@pytest.fixture
def url(postgres_source: str) -> str:
    with open_store(postgres_source, create=True) as store:
        store.record_decision(DECISION)
    return postgres_source


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:secret@127.0.0.1:1/feedback",
        "postgres://me:secret@127.0.0.1:1/feedback?connect_timeout=2",
        "postgresql://me:secret@/feedback?host=/no/such/folder",
    ],
)
def test_an_unreachable_server_is_named_without_the_password(address: str) -> None:
    with pytest.raises(
        InputError, match=r"^postgres.*/feedback: cannot connect to Postgre"
    ) as error:
        open_store(address)
    assert "secret" not in str(error.value)


def test_a_malformed_url_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"cannot connect to PostgreSQL: invalid URI query parameter"
    ):
        open_store("postgresql://host/db?colour=red")


def test_without_psycopg_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dpo.data.stores.postgres")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        InputError, match=r"PostgreSQL needs psycopg .*pip install 'dpo-engine\[postg"
    ):
        open_store("postgresql://host/db")


def test_another_schema_version_is_refused(url: str) -> None:
    run(url, b"UPDATE feedback_schema SET version = 7")
    with pytest.raises(InputError, match=r"schema version 7, expected 1: use the version of dpo-"):
        open_store(url, create=True)


def test_a_lost_version_is_refused(url: str) -> None:
    run(url, b"DELETE FROM feedback_schema")
    with pytest.raises(InputError, match="schema version missing, expected 1"):
        open_store(url)


def test_tables_of_someone_else_are_left_alone(postgres_source: str) -> None:
    run(postgres_source, b"CREATE TABLE decisions (id TEXT)")
    with pytest.raises(InputError, match="no feedback store in this database"):
        open_store(postgres_source, create=True)


def test_a_locked_table_is_named(url: str) -> None:
    with PostgresStore(url, timeout_seconds=0.05) as store, psycopg.connect(url) as other:
        other.execute("LOCK TABLE decisions IN SHARE ROW EXCLUSIVE MODE")
        assert list(store.decisions()) == [DECISION]
        with pytest.raises(InputError, match=r"is locked by another process, for 0.05 s: wait"):
            store.record_outcome("d-1", reward=1)


def test_a_lost_connection_ends_the_run(url: str) -> None:
    with open_store(url) as store:
        run(
            url,
            b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            b" AND application_name = 'dpo-feedback'",
        )
        with pytest.raises(RunError, match=r"^postgresql://127\.0\.0\.1:\d+/postgres: termin"):
            store.record_decision(DECISION)


def test_what_the_server_refuses_is_named(url: str) -> None:
    run(url, b"ALTER TABLE outcomes DROP COLUMN reward")
    with (
        open_store(url) as store,
        pytest.raises(InputError, match=r"PostgreSQL refuses: column"),
    ):
        store.record_outcome("d-1", reward=1)


@pytest.mark.parametrize(
    "command",
    [
        b"INSERT INTO decisions VALUES ('', 'p', 's', now(), '{}', '{}', NULL, NULL)",
        b"INSERT INTO decisions VALUES ('d', 'p', NULL, now(), '{}', '{}', NULL, NULL)",
        b"INSERT INTO decisions VALUES ('d', 'p', 's', now(), '[]', '{}', NULL, NULL)",
        b"INSERT INTO decisions VALUES ('d', 'p', 's', now(), '{}', '{}', 2, NULL)",
        b"INSERT INTO decisions VALUES ('d', 'p', 's', now(), '{}', '{}', NULL, 0)",
        b"INSERT INTO outcomes VALUES ('d-1', now(), 1, NULL)",
        b"INSERT INTO outcomes VALUES ('d-9', now(), 1, NULL)",
        b"UPDATE outcomes SET reward = 'NaN'",
        b"UPDATE outcomes SET reward = NULL",
        b"UPDATE outcomes SET outcome = '[]'",
    ],
)
def test_the_database_itself_refuses_wrong_records(url: str, command: bytes) -> None:
    with pytest.raises(psycopg.errors.IntegrityError):
        run(url, command)
