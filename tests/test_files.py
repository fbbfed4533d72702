import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo.errors import InputError
from dpo.files import (
    JSON,
    FolderLock,
    append_jsonl,
    atomic_directory,
    atomic_write,
    read_json,
    remove_folder,
    remove_leftovers,
    sha256_file,
    verify_manifest,
    write_json,
    write_manifest,
)


@pytest.fixture
def folder_with_manifest(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(range(64)))
    (folder / "sub" / "b.txt").write_text("hello", encoding="utf-8")
    write_manifest(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    atomic_write(path, "first")
    atomic_write(path, "zwölf".encode())

    assert path.read_text(encoding="utf-8") == "zwölf"
    assert names(path.parent) == ["a.txt"]


def test_atomic_write_replaces_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    atomic_write(tmp_path / "link", "there")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "there"


def test_atomic_write_refuses_to_replace_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a device or a pipe: name a file"):
        atomic_write(tmp_path / "pipe", "there")
    assert (tmp_path / "pipe").is_fifo()


def test_failed_atomic_write_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "first")
    monkeypatch.setattr(os, "fsync", fill_disk)

    with pytest.raises(OSError, match="No space left") as refusal:
        atomic_write(path, "second")

    assert refusal.value.filename == str(path)
    assert path.read_text(encoding="utf-8") == "first"
    assert names(tmp_path) == ["a.txt"]


def test_atomic_directory_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("x", encoding="utf-8")
        assert not path.exists()

    assert names(path) == ["a"]
    assert names(path.parent) == ["one"]


def test_failed_atomic_directory_is_removed(tmp_path: Path) -> None:
    def write_and_stop() -> None:
        with atomic_directory(tmp_path / "one") as temporary:
            (temporary / "a").write_text("x", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()

    assert names(tmp_path) == []


def test_atomic_directory_refuses_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="one already exists"), atomic_directory(tmp_path / "one"):
        pytest.fail("the block must not run")


def test_atomic_directory_replaces_when_told(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.mkdir()
    (path / "old").touch()
    with atomic_directory(path, replace=True) as temporary:
        (temporary / "new").touch()

    assert names(path) == ["new"]
    assert names(tmp_path) == ["one"]


def test_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(OSError, match="full"), atomic_directory(path, replace=True):
        raise OSError("full")

    assert names(path) == ["old"]


def test_removed_folder_leaves_its_name_before_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    monkeypatch.setattr("shutil.rmtree", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        remove_folder(tmp_path / "one")
    monkeypatch.undo()

    assert not (tmp_path / "one").exists()
    assert len(remove_leftovers(tmp_path)) == 1


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "step.tmp-12-abcd").mkdir()
    (tmp_path / "step.tmp-12-abcd" / "x").touch()
    (tmp_path / "a.json.tmp-13-abcd").touch()
    (tmp_path / "a.json").touch()

    removed = remove_leftovers(tmp_path)

    assert [path.name for path in removed] == ["a.json.tmp-13-abcd", "step.tmp-12-abcd"]
    assert names(tmp_path) == ["a.json"]


def test_leftovers_younger_than_the_age_stay(tmp_path: Path) -> None:
    (tmp_path / "a.tmp-1-ab").touch()
    old = tmp_path / "b.tmp-1-ab"
    old.touch()
    os.utime(old, (0, time.time() - 100))

    assert remove_leftovers(tmp_path, older_than_seconds=50) == [old]


def test_sha256_file_equals_the_published_value(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_sound_folder_has_no_faults(folder_with_manifest: Path) -> None:
    (folder_with_manifest / "unlisted").touch()
    assert verify_manifest(folder_with_manifest) == []


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80])
@pytest.mark.parametrize("name", ["a.bin", "sub/b.txt", "manifest.json"])
def test_any_changed_byte_is_a_fault(folder_with_manifest: Path, name: str, mask: int) -> None:
    path = folder_with_manifest / name
    sound = path.read_bytes()
    for index in range(len(sound)):
        path.write_bytes(sound[:index] + bytes([sound[index] ^ mask]) + sound[index + 1 :])
        assert verify_manifest(folder_with_manifest), f"byte {index}"


def test_fault_names_the_file_and_both_hashes(folder_with_manifest: Path) -> None:
    path = folder_with_manifest / "a.bin"
    before = sha256_file(path)
    path.write_bytes(bytes(64))

    (fault,) = verify_manifest(folder_with_manifest)

    assert fault == f"{path}: damaged: sha256 {sha256_file(path)}, the manifest says {before}"


def test_cut_and_missing_files_are_faults(folder_with_manifest: Path) -> None:
    (folder_with_manifest / "a.bin").write_bytes(bytes(3))
    (folder_with_manifest / "sub" / "b.txt").unlink()

    cut, missing = verify_manifest(folder_with_manifest)

    assert cut.endswith("a.bin: damaged: 3 bytes, the manifest says 64")
    assert missing.endswith("b.txt: missing")


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '{"a": 1}\n', '{\n  "a": {}\n}\n'])
def test_missing_or_damaged_manifest_is_a_fault(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    (fault,) = verify_manifest(tmp_path)
    assert "manifest.json: missing" in fault or "manifest.json: damaged" in fault


def test_second_lock_on_a_folder_is_refused_and_names_the_holder(tmp_path: Path) -> None:
    with (
        FolderLock(tmp_path / "run"),
        pytest.raises(InputError, match=rf"run is in use by process {os.getpid()} on "),
        FolderLock(tmp_path / "run"),
    ):
        pytest.fail("two locks on one folder")


def test_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with lock:
        pass
    with lock:
        assert (
            (tmp_path / ".lock").read_text(encoding="utf-8").startswith(f"process {os.getpid()} ")
        )


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from dpo.files import FolderLock\n"
        "with FolderLock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(InputError, match=f"process {process.pid} on "), FolderLock(tmp_path):
            pytest.fail("two processes hold one lock")
        process.send_signal(signal.SIGKILL)

    with FolderLock(tmp_path):
        pass


def test_json_is_read_as_written_with_sorted_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value: JSON = {"b": [1, 2.5, None, True], "a": {"ä": "€"}}
    write_json(path, value)

    assert read_json(path) == value
    assert path.read_text(encoding="utf-8").index('"a"') < path.read_text("utf-8").index('"b"')
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_bad_json_is_refused_by_name_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1,\n "b" 2}', encoding="utf-8")
    with pytest.raises(
        InputError, match=r"a\.json: not valid JSON: Expecting ':' delimiter: line 2"
    ):
        read_json(tmp_path / "a.json")


def test_missing_json_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")


def test_jsonl_grows_by_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 2, "ä": None})

    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2, "ä": None}]


def test_jsonl_append_does_not_join_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st', encoding="utf-8")
    append_jsonl(path, {"step": 2})

    assert path.read_text(encoding="utf-8").splitlines() == ['{"step": 1}', '{"st', '{"step": 2}']


def test_files_module_does_not_import_torch() -> None:
    code = "import sys, dpo.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
