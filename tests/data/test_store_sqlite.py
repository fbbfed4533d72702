import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dpo.data.records import Decision
from dpo.data.stores import open_store
from dpo.data.stores.sqlite import SqliteStore, sqlite_errors
from dpo.errors import InputError

DAY = datetime(2024, 5, 1, tzinfo=UTC)
TIME = "2024-05-01T00:00:00.000000Z"


def decision(identity: str) -> Decision:
    return Decision(identity, "extraction", "s-1", DAY, {"a": "x" * 500}, {}, reward=0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "feed back?#%.db"
    with open_store(path, create=True) as store:
        store.record_decisions(decision(f"d-{number}") for number in range(100))
    return path


class TestSchema:
    def test_writers_do_not_block_readers(self, path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    @pytest.mark.parametrize(
        "values",
        [
            ("", "p", "s", TIME, "{}", "{}", None, None),
            (None, "p", "s", TIME, "{}", "{}", None, None),
            ("d", "", "s", TIME, "{}", "{}", None, None),
            ("d", "p", None, TIME, "{}", "{}", None, None),
            ("d", "p", "s", "2024-05-01", "{}", "{}", None, None),
            ("d", "p", "s", "2024-05-01 00:00:00.000000Z", "{}", "{}", None, None),
            ("d", "p", "s", TIME, "[]", "{}", None, None),
            ("d", "p", "s", TIME, "{}", "oops", None, None),
            ("d", "p", "s", TIME, "{}", "{}", 1.5, None),
            ("d", "p", "s", TIME, "{}", "{}", "high", None),
            ("d", "p", "s", TIME, "{}", "{}", None, 0),
            ("d-1", "p", "s", TIME, "{}", "{}", None, None),
        ],
    )
    def test_the_database_itself_refuses_wrong_decisions(
        self, path: Path, values: tuple[object, ...]
    ) -> None:
        with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.DatabaseError):
            connection.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)

    @pytest.mark.parametrize(
        "values",
        [
            ("d-1", TIME, 0.5, None),
            ("d-9", TIME, 0.5, None),
            ("d-bare", TIME, None, None),
            ("d-bare", TIME, 1.5, None),
            ("d-bare", TIME, None, "[]"),
            ("d-bare", "now", 0.5, None),
        ],
        ids=["second outcome", "no decision", "empty", "reward", "outcome", "time"],
    )
    def test_the_database_itself_refuses_wrong_outcomes(
        self, path: Path, values: tuple[object, ...]
    ) -> None:
        with open_store(path) as store:
            store.record_decision(Decision("d-bare", "p", "s", DAY, {}, {}))
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            with pytest.raises(sqlite3.IntegrityError):
                connection.execute("INSERT INTO outcomes VALUES (?, ?, ?, ?)", values)

    def test_another_schema_version_is_refused(self, path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 7")
        with pytest.raises(
            InputError, match=r"schema version 7, expected 1: use the version of dpo-"
        ):
            open_store(path, create=True)

    def test_an_original_database_is_sent_to_the_importer(self, tmp_path: Path) -> None:
        path = tmp_path / "memory.db"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE extraction_decisions (id TEXT)")
        with pytest.raises(
            InputError, match=r"memory.db is an agent-memory database: .*data import"
        ):
            open_store(path)

    def test_another_database_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "other.db"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE customers (id TEXT)")
        before = path.read_bytes()
        with pytest.raises(InputError, match="a SQLite database, but not a feedback store"):
            open_store(path, create=True)
        assert path.read_bytes() == before


class TestTrouble:
    def test_a_locked_database_is_named(self, path: Path) -> None:
        with (
            SqliteStore(path, timeout_seconds=0.05) as store,
            closing(sqlite3.connect(path, isolation_level=None)) as other,
        ):
            other.execute("BEGIN IMMEDIATE")
            assert sum(1 for _ in store.decisions()) == 100
            with pytest.raises(InputError, match=r"is locked by another process, for 0.05 s: wait"):
                store.record_decision(decision("new"))

    def test_an_exclusively_locked_database_cannot_be_opened(self, path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(InputError, match="is locked by another process"):
                SqliteStore(path, timeout_seconds=0.05)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: b"this is no database, whatever its name says" * 100,
            lambda raw: raw[:100],
            lambda raw: raw[:4096] + b"\xff" * (len(raw) - 4096),
        ],
        ids=["text", "cut", "overwritten"],
    )
    def test_a_corrupt_database_is_named(
        self, path: Path, damage: Callable[[bytes], bytes]
    ) -> None:
        path.write_bytes(damage(path.read_bytes()))
        with (
            pytest.raises(InputError, match="not a usable SQLite file: "),
            open_store(path) as store,
        ):
            list(store.decisions())

    def test_a_folder_is_no_database(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder.db"
        folder.mkdir()
        with pytest.raises(InputError, match=r"folder\.db is a folder: name a store"):
            open_store(folder)

    def test_a_full_disk_is_an_error_of_the_system(self, path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA max_page_count = 1")
            with (
                pytest.raises(OSError, match=r"database or disk is full: 'x.db'"),
                sqlite_errors("x.db", 0),
            ):
                connection.execute("CREATE TABLE more (id TEXT)")

    def test_a_defect_of_the_caller_stays_one(self, path: Path) -> None:
        store = open_store(path)
        store.close()
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            store.count()

    def test_a_damaged_record_is_named(self, path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute("UPDATE decisions SET state = 'oops' WHERE id = 'd-7'")
        with (
            open_store(path) as store,
            pytest.raises(InputError, match=r"%.db: decision 'd-7': state: malformed JSON"),
        ):
            list(store.decisions())

    def test_many_processes_may_make_the_store_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "folder" / "new.db"
        script = f"from dpo.data.stores import open_store; open_store({str(path)!r}, create=True)"
        processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
        assert [process.wait() for process in processes] == [0] * 4
        # two that close at the same instant may each leave the log to the other; the next folds it
        with open_store(path) as store:
            assert store.count() == 0
        assert [found.name for found in path.parent.iterdir()] == ["new.db"]
