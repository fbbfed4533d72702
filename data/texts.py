"""Texts by the million: as JSON on one line, and in columns that are kept in a temporary file.

Texts are appended and read back by index; nothing is removed. The file has no name and vanishes
with the last column that uses it.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from typing import overload

_KEPT = 512  # texts of a column that were read last: few states and actions are read often
_ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=dict
)


def json_line(value: object) -> str:
    """Return compact JSON, keys in their order; mappings of any type are objects."""
    return _ENCODER.encode(value)


class TextFile:
    """An unnamed temporary file that several columns share."""

    def __init__(self) -> None:
        self._size = self._flushed = 0
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(tempfile.TemporaryFile())
            weakref.finalize(self, stack.pop_all().close)

    def append(self, data: bytes) -> int:
        """Append ``data`` and return where it begins."""
        start = self._size
        self._file.write(data)
        self._size += len(data)
        return start

    def read(self, start: int, size: int) -> bytes:
        """Return ``size`` bytes from ``start``."""
        if start + size > self._flushed:
            self._file.flush()
            self._flushed = self._size
        return os.pread(self._file.fileno(), size, start)


class TextColumn(Sequence[str]):
    """Texts in a file; each takes 12 bytes of memory."""

    def __init__(self, file: TextFile) -> None:
        self._file = file
        self._starts, self._sizes = array("q"), array("i")
        self._read = functools.lru_cache(maxsize=_KEPT)(file.read)

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._read(self._starts[index], self._sizes[index]).decode()

    def append(self, text: str) -> None:
        """Add a text."""
        self._append(text.encode())

    def _append(self, data: bytes) -> None:
        self._starts.append(self._file.append(data))
        self._sizes.append(len(data))


class DistinctTexts(TextColumn):
    """Different texts in order of appearance, each found again by a digest of 128 bits."""

    def __init__(self, file: TextFile) -> None:
        super().__init__(file)
        self._indices: dict[bytes, int] = {}

    def index_of(self, text: str) -> int:
        """Return the index of ``text``, which is appended if it is new."""
        size, data = len(self._sizes), text.encode()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        index = self._indices.setdefault(digest, size)
        if index == size:
            self._append(data)
        return index
