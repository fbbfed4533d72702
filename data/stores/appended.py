"""Files that many processes append lines to, plain or gzip, whose unfinished ends are found.

A process that is killed while it appends leaves an unfinished end: a line that breaks off, or a
gzip member that does. Readers leave it out; the next writer moves it to ``<name>.torn`` before it
appends. ``flock`` keeps writers apart, and readers from looking while one is writing.
"""

import fcntl
import gzip
import os
import tempfile
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from dpo.data.strict_json import decode_json
from dpo.errors import InputError

_BLOCK_BYTES = 1 << 20
_PACKED_BLOCK_BYTES = 1 << 14  # unpacks to at most a thousand times that


class AppendedFile(ABC):
    """An appended file as it was when it was opened; see `is_current`.

    What it holds open is given back when it is closed, or when nobody refers to it any more.

    Attributes:
        path: the file.
        size: bytes of its finished lines, unpacked, when last looked at.
        torn_bytes: bytes of its unfinished end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self.torn_bytes = 0
        self._end = 0  # of the finished lines, in the file as it stands
        self._files = ExitStack()
        self._file = self._files.enter_context(path.open("rb"))
        weakref.finalize(self, self._files.close)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def is_current(self) -> bool:
        """Return whether the path still leads to this file, and what was read still stands."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(self._file.fileno()), found) and found.st_size >= self._end

    def look(self) -> None:
        """Find what other processes have appended; call it in `shared` or `exclusive`."""
        self._find_end(os.fstat(self._file.fileno()).st_size)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Keep other processes from appending."""
        with self._lock(fcntl.LOCK_SH):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from appending and looking."""
        with self._lock(fcntl.LOCK_EX):
            yield

    def read(self, start: int, length: int) -> bytes:
        """Return some of the unpacked bytes."""
        return os.pread(self._lines_file().fileno(), length, start)

    def lines(self, start: int) -> Iterator[bytes]:
        """Yield the finished lines from ``start`` on, each with its newline if it has one."""
        pending, end = b"", self.size
        while start < end:
            block = self.read(start, min(_BLOCK_BYTES, end - start))
            start += len(block)
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                yield line + b"\n"
        if pending:
            yield pending

    def set_torn_aside(self) -> Path:
        """Move the unfinished end to ``<name>.torn``, and return that; call it in `exclusive`."""
        aside = self.path.with_name(f"{self.path.name}.torn")
        with aside.open("ab") as file:
            file.write(os.pread(self._file.fileno(), self.torn_bytes, self._end) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.truncate(self.path, self._end)
        self.torn_bytes = 0
        return aside

    def append(self, lines: bytes) -> int:
        """Append lines, force them to the disk, and return where they begin, unpacked.

        Call it in `exclusive`, with nothing torn at the end. If it fails, the file is as it was.
        """
        start = self.size
        if start and self.read(start - 1, 1) != b"\n":
            lines, start = b"\n" + lines, start + 1
        with self.path.open("r+b") as file:
            file.seek(self._end)
            try:
                file.write(self._pack(lines))
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.truncate(self.path, self._end)
                raise
            self._find_end(file.tell())
        return start

    def replace(self, lines: Iterable[bytes]) -> None:
        """Put a new file with these lines in the place of this one; call it in `exclusive`."""
        temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        try:
            with temporary.open("xb") as file:
                os.fchmod(file.fileno(), self.path.stat().st_mode)
                self._write_packed(file, lines)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @contextmanager
    def _lock(self, mode: int) -> Iterator[None]:
        fcntl.flock(self._file, mode)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @abstractmethod
    def _lines_file(self) -> IO[bytes]:
        """Return the file of unpacked lines."""

    @abstractmethod
    def _find_end(self, file_size: int) -> None:
        """Update ``size``, ``torn_bytes`` and ``_end``: the file has ``file_size`` bytes now."""

    @abstractmethod
    def _pack(self, lines: bytes) -> bytes:
        """Return lines as they stand in the file."""

    @abstractmethod
    def _write_packed(self, file: BinaryIO, lines: Iterable[bytes]) -> None:
        """Write many lines as they stand in a file."""


class PlainFile(AppendedFile):
    """Lines as they are; the unfinished end is what follows the last newline, unless it is JSON."""

    def _lines_file(self) -> IO[bytes]:
        return self._file

    def _find_end(self, file_size: int) -> None:
        end = self._after_last_newline(file_size)
        tail = self.read(end, file_size - end)
        if tail and _is_json(tail):
            end = file_size
        self.size = self._end = end
        self.torn_bytes = file_size - end

    def _after_last_newline(self, file_size: int) -> int:
        start = file_size
        while start > self._end:
            begin = max(self._end, start - _BLOCK_BYTES)
            found = self.read(begin, start - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            start = begin
        return self._end

    def _pack(self, lines: bytes) -> bytes:
        return lines

    def _write_packed(self, file: BinaryIO, lines: Iterable[bytes]) -> None:
        file.writelines(lines)


class GzipFile(AppendedFile):
    """Lines in gzip members, one for each `append`, unpacked into an unnamed temporary file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._unpacked = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115

    def _lines_file(self) -> IO[bytes]:
        return self._unpacked

    def _find_end(self, file_size: int) -> None:
        try:
            while self._end < file_size and self._unpack_member(file_size):
                pass
        except zlib.error as error:
            raise InputError(
                f"{self.path}: damaged gzip file at byte {self._end}: {error}"
            ) from error
        self.torn_bytes = file_size - self._end
        if self.torn_bytes and not self._end:
            raise InputError(f"{self.path}: the gzip file breaks off: copy it again")

    def _unpack_member(self, file_size: int) -> bool:
        """Unpack the member at ``_end`` and return true, or return false if it breaks off."""
        member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        position = self._end
        self._unpacked.seek(self.size)
        while not member.eof:
            length = min(_PACKED_BLOCK_BYTES, file_size - position)
            if not length:
                return False
            self._unpacked.write(member.decompress(os.pread(self._file.fileno(), length, position)))
            position += length
        self._unpacked.flush()
        self.size = self._unpacked.tell()
        self._end = position - len(member.unused_data)
        return True

    def _pack(self, lines: bytes) -> bytes:
        members = [lines] if self._end else [b"", lines]  # the first is never the one that is torn
        return b"".join(gzip.compress(member, mtime=0) for member in members)

    def _write_packed(self, file: BinaryIO, lines: Iterable[bytes]) -> None:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            packed.writelines(lines)


def _is_json(line: bytes) -> bool:
    try:
        decode_json(line, "")
    except InputError:
        return False
    return True
