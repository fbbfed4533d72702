"""Feedback that cannot be built from: one error with its place, exit code 2, nothing written."""

import codecs
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dpo.cli import main
from dpo.data.simulate import simulate
from dpo.data.stores import open_store
from dpo.data.stores.sqlite import SqliteStore


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same decisions in a log and in SQLite."""
    folder = tmp_path_factory.mktemp("stores")
    for name in ("good.jsonl", "good.db"):
        with open_store(folder / name, create=True) as store:
            store.record_decisions(simulate("extraction", 60, 0, situations=5))
    return folder


def refused(source: Path | str, folder: Path, *options: str) -> str:
    """Build, and return the message; nothing may have been written."""
    arguments = ["data", "build", "extraction", "--feedback", str(source), "--split-by", "group"]
    arguments += ["--out", str(folder / "out"), "--min-pairs", "1", "--quiet"]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert list(folder.glob("out*")) == []
    return result.stderr


def log_with(stores: Path, path: Path, change: Callable[[dict[str, Any]], object] | str) -> Path:
    """Copy the log with its third line changed, or replaced by a text."""
    lines = (stores / "good.jsonl").read_text("utf-8").splitlines()
    if isinstance(change, str):
        lines[2] = change
    else:
        record = json.loads(lines[2])
        change(record)
        lines[2] = json.dumps(record)
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


LINES: dict[str, tuple[Callable[[dict[str, Any]], object] | str, str]] = {
    "cut off": ('{"id": "x", "policy": ', ":3: malformed JSON: Expecting value: line 1 column"),
    "no object": ("[1, 2]", ":3: expected a JSON object, got [1, 2]"),
    "key twice": ('{"id": "a", "id": "b"}', ":3: malformed JSON: key 'id' is there twice"),
    "no state": (
        lambda row: row.pop("state"),
        "-00000002': state is missing",
    ),
    "NaN reward": (lambda row: row.update(reward=float("nan")), ":3: malformed JSON: NaN is not a"),
    "large reward": (lambda row: row.update(reward=7), "reward must be a number in [-1, 1], got 7"),
    "no time": (lambda row: row.update(decided_at="soon"), ":3: decided_at: 'soon' is not an ISO"),
    "enum": (
        lambda row: row["action"].update(decision="explode"),
        '00000002\': action: decision must be one of store, skip, defer, got "explode"',
    ),
    "range": (
        lambda row: row["state"]["contentFeatures"].update(noveltyScore=1.5),
        "00000002': state: contentFeatures.noveltyScore must be a number in [0, 1], got 1.5",
    ),
}


@pytest.mark.parametrize(("change", "message"), LINES.values(), ids=LINES)
def test_faulty_line_of_a_log_is_named(
    change: Callable[[dict[str, Any]], object] | str, message: str, stores: Path, tmp_path: Path
) -> None:
    path = log_with(stores, tmp_path / "log.jsonl", change)
    error = refused(path, tmp_path)
    assert error.startswith(f"Error: {path}:")
    assert message in error


def test_all_faulty_decisions_are_named_by_their_lines(stores: Path, tmp_path: Path) -> None:
    lines = (stores / "good.jsonl").read_text("utf-8").splitlines()
    for number in (3, 5, 8):
        record = json.loads(lines[number - 1])
        record["action"] = {"decision": "explode"}
        lines[number - 1] = json.dumps(record)
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    first, *others = refused(path, tmp_path).splitlines()
    assert first.startswith(f"Error: {path}:3: decision 'simulated-")
    assert [line.split(": ")[0] for line in others] == [f"{path}:5", f"{path}:8"]
    for number, line in enumerate(lines):
        lines[number] = line.replace('"decision":', '"descision":')
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    *named, last = refused(path, tmp_path).splitlines()
    assert (len(named), last) == (20, "... and perhaps more")


def test_byte_order_mark_is_no_fault(stores: Path, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + (stores / "good.jsonl").read_bytes())
    with open_store(path) as marked, open_store(stores / "good.jsonl") as plain:
        assert list(marked.decisions()) == list(plain.decisions())


def test_corrupt_and_foreign_databases_are_named(stores: Path, tmp_path: Path) -> None:
    good = (stores / "good.db").read_bytes()
    for name, content, message in (
        ("corrupt.db", good[:8192] + b"\xab" * (len(good) - 8192), "not a usable SQLite file: "),
        ("cut.db", good[: len(good) // 2], "not a usable SQLite file: "),
        ("text.db", b"no database at all, " * 500, "not a usable SQLite file: "),
        ("empty.db", b"", "a SQLite database, but not a feedback store"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert refused(path, tmp_path).startswith(f"Error: {path}: {message}")


def test_other_schema_version_is_named(stores: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(stores / "good.db", tmp_path / "new.db"))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    error = refused(path, tmp_path)
    assert error.startswith(f"Error: {path}: feedback schema version 99, expected 1: ")


@pytest.fixture
def locked(stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A database that another connection holds for itself, and stores that soon give up."""
    path = Path(shutil.copy(stores / "good.db", tmp_path / "locked.db"))
    defaults = SqliteStore.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "timeout_seconds", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("DELETE FROM decisions WHERE 0")
        yield path


def test_locked_database_is_named(locked: Path, tmp_path: Path) -> None:
    error = refused(locked, tmp_path)
    assert error.startswith(f"Error: {locked} is locked by another process, for 0.05 s")


def test_unreachable_server_is_named_without_its_password(tmp_path: Path) -> None:
    error = refused("postgresql://me:secret@127.0.0.1:9/feedback", tmp_path)
    assert error.startswith("Error: postgresql://127.0.0.1:9/feedback: cannot connect")
    assert "secret" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (["--eval-split", bad], "eval_split must be a number in (0, 1)")
            for bad in ("0", "1", "nan")
        ),
        (["--start-date", "2024-06-01", "--end-date", "2024-01-01"], "start 2024-06-01 is after"),
        (["--min-pairs", "0"], "min_pairs must be at least 1, got 0"),
        (["--missing-confidence", "keep"], "missing_confidence has no effect without"),
        (["--start-date", "2024-13-01"], "start: '2024-13-01' is not an ISO 8601 time"),
        (["--min-confidence", "2"], "min_confidence must be a number in [0, 1], got 2.0"),
        (["--margin", "nan"], "margin must be in [0, 2), the width of the rewards, got nan"),
        (["--created-at", "soon"], "created_at: 'soon' is not an ISO 8601 time"),
    ],
)
def test_wrong_option_is_named(
    options: list[str], message: str, stores: Path, tmp_path: Path
) -> None:
    assert message in refused(stores / "good.db", tmp_path, *options)


def test_store_without_a_decision_left_is_named(stores: Path, tmp_path: Path) -> None:
    path = stores / "good.db"
    error = refused(path, tmp_path, "--start-date", "2030-01-01")
    assert error.startswith(f"Error: {path}: no decisions are left: of 60 for the policy")


def test_folders_in_the_place_of_files_are_named(stores: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl is a folder: name a store" in refused(tmp_path / "folder.jsonl", tmp_path)
    arguments = ["data", "check", str(stores / "good.jsonl"), "--html", str(tmp_path), "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stderr) == (2, f"Error: {tmp_path} is a folder: name a file\n")
