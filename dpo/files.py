"""Files that are complete when they have their name, manifests of hashes, and folder locks.

What is written goes to ``<name>.tmp-<pid>-<random>`` beside its place, is forced to the disk and
renamed: a killed process leaves rubbish under temporary names, never a half file under a final one.
Linux and macOS only: locks are ``flock`` locks, which the system releases when their process ends,
however it ends.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from dpo.errors import InputError

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"
MANIFEST = "manifest.json"
Entry: TypeAlias = "dict[str, str | int]"  # of a manifest: a file's sha256 and bytes
OTHER_SHAPE = (  # what reading decoded JSON raises that does not look as it should
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace the file ``path`` by ``data`` in one step, making its folder if needed.

    A link stays, and the file that it leads to is replaced.

    Raises:
        InputError: ``path`` is a folder, or a device or the like, which would be replaced, not
            written to.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device or a pipe: name a file, which is written whole")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with _named(path), temporary.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` when the block ends well.

    If the block raises, the temporary folder is removed and ``path`` is as it was. With ``replace``
    the old folder is called ``<name>.old`` for the moment between two renames: a kill just there
    leaves it under that name.

    Raises:
        InputError: ``path`` exists and ``replace`` is false.
    """
    _refuse_existing(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for found in temporary.rglob("*"):
            _fsync(found)
        _fsync(temporary)
        _refuse_existing(path, replace)
        _rename_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill on the way leaves all of it or nothing under its name."""
    temporary = _temporary_name(path)
    path.rename(temporary)
    shutil.rmtree(temporary)


def remove_leftovers(folder: Path, *, older_than_seconds: float = 0.0) -> list[Path]:
    """Remove what killed writers left in ``folder`` under temporary names, and return it.

    Call it while holding the folder's ``FolderLock``; in a folder that several processes write to,
    give an age that no living writer's file can have.
    """
    removed = []
    for path in sorted(folder.glob("*.tmp-*")):
        with suppress(FileNotFoundError):  # its writer lives, and has just given it its final name
            if time.time() - _last_change(path) < older_than_seconds:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path)
    return removed


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashed(path: Path, chunks: Iterable[bytes | memoryview]) -> Entry:
    """Write a file a chunk at a time, force it to the disk, and return its entry of a manifest."""
    digest, size = hashlib.sha256(), 0
    with _named(path), path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def write_manifest(folder: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Write ``manifest.json``: the SHA-256 and the size of every other file under ``folder``.

    Args:
        folder: of the files.
        known: entries of files that are not read for it, by their paths in ``folder``.
    """
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    entries: dict[str, Entry] = dict(known or {})
    for name in sorted({*names} - {MANIFEST} - entries.keys()):
        path = folder / name
        entries[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    write_json(folder / MANIFEST, entries)


def verify_manifest(folder: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """Return the faults of ``manifest.json`` and of the files it lists; none if all are sound.

    Any changed byte of them is a fault. Files that the manifest does not list are not looked at.

    Args:
        folder: of the manifest.
        part: which part of the files is looked at.
        parts: how many there are, of about as many files each.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return [f"{path}: missing"]
    try:
        entries = json.loads(text)
        if _dumps(entries) != text:
            return [f"{path}: damaged: not byte for byte as it was written"]
        listed = {str(name): (str(e["sha256"]), int(e["bytes"])) for name, e in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return [f"{path}: damaged: {error}"]
    own = [*listed.items()][part::parts]
    faults = (_file_fault(folder / name, *expected) for name, expected in own)
    return [fault for fault in faults if fault]


def check_replaceable(folder: Path, *, replace: bool) -> None:
    """Refuse a folder that exists, or whose replacement would lose what is not ours.

    Ours is what ``manifest.json`` in the folder lists. Ask before the work, not after it.

    Raises:
        InputError: the folder exists and ``replace`` is false, it is no folder, or it holds a file
            that its manifest does not list.
    """
    if folder.exists() and not replace:
        raise InputError(f"{folder} already exists: choose another name, or replace it (--replace)")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder: choose another name")
    ours = {folder / name for name in _listed(folder / MANIFEST)} | {folder / MANIFEST}
    for path in sorted(folder.rglob("*")):
        if path not in ours and not path.is_dir():
            raise InputError(
                f"{folder} holds {path.relative_to(folder)}, which is not in its {MANIFEST} "
                "and would be lost: choose another folder"
            )


class FolderLock:
    """Exclusive use of a folder, as a context manager; the holder's process id is in ``.lock``."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """Take the lock, making the folder if needed.

        Raises:
            InputError: another process, or another lock of this one, holds it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise InputError(
                f"{self._path.parent} is in use by {holder}: "
                "wait for it, end it, or choose another folder"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the lock back; ``.lock`` stays, for removing it would let two processes hold it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_json(path: Path) -> Any:
    """Return the decoded content of a JSON file.

    Raises:
        InputError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error


def write_json(path: Path, value: JSON) -> None:
    """Replace the file by ``value`` in one step: indented, keys sorted, a newline at the end."""
    atomic_write(path, _dumps(value))


def append_jsonl(path: Path, record: Mapping[str, JSON]) -> None:
    """Append one line to a JSON Lines file; an unfinished last line stays a line of its own."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with _named(path), path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def append_bytes(path: Path, data: bytes | memoryview) -> None:
    """Append to a file, making it if needed."""
    with _named(path), path.open("ab") as file:
        file.write(data)


def append_file(path: Path, source: Path) -> None:
    """Append what ``source`` holds to a file, a block at a time."""
    with _named(path), path.open("ab") as file, source.open("rb") as data:
        shutil.copyfileobj(data, file, 2**20)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in errors of writing, as those of opening do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_existing(path: Path, replace: bool) -> None:
    if path.exists() and not replace:
        raise InputError(f"{path} already exists: choose another name or remove it")


def _rename_folder(source: Path, target: Path) -> None:
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _listed(manifest: Path) -> Sequence[str]:
    """Return the names in a manifest; none if there is no manifest that can be read."""
    try:
        entries = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ()
    return list(entries) if isinstance(entries, dict) else ()


def _last_change(path: Path) -> float:
    return max(found.stat().st_mtime for found in (path, *path.rglob("*")))


def _dumps(value: JSON) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2, sort_keys=True)
    return text.encode() + b"\n"


def _file_fault(path: Path, sha256: str, size: int) -> str | None:
    """Return what is wrong with a file of known hash and size, if anything is."""
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != size:
        return f"{path}: damaged: {path.stat().st_size} bytes, the manifest says {size}"
    if (found := sha256_file(path)) != sha256:
        return f"{path}: damaged: sha256 {found}, the manifest says {sha256}"
    return None
