"""Tokens on disk, under a key of everything they depend on.

An entry is the folder ``<key>`` with ``columns.safetensors``, ``rows.json`` (ids, sources, report)
and the manifest of their hashes. It is complete or not there, checked when read, memory-mapped.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpo.files import (
    append_bytes,
    append_file,
    atomic_directory,
    atomic_write,
    read_json,
    remove_leftovers,
    verify_manifest,
    write_manifest,
)
from dpo.pair_view import PairView
from dpo.tokenized_pairs import (
    RowNote,
    Tokenization,
    TokenizationReport,
    TokenizedPair,
    TokenizedPairs,
    columns_of,
)

_FORMAT = 1  # raise it when the same key would give other tokens
_COLUMNS = ("offsets", "tokens", "weights", "margins", "label_probs")  # the widest dtype first
_DTYPES = {"int64": "I64", "int32": "I32", "float32": "F32"}  # numpy -> safetensors
_ABANDONED_SECONDS = 86_400.0  # a chunk of rows is written at least once a day
_Number = TypeVar("_Number", np.int32, np.int64, np.float32)


def content_key(pairs: PairView, *others: str) -> str:
    """Return the hash of pairs and of what else decides on their tokens."""
    return pairs.hash(str(_FORMAT), *others)


def tidy(cache_dir: Path) -> None:
    """Remove what killed writers left in a cache a day ago or earlier."""
    remove_leftovers(cache_dir, older_than_seconds=_ABANDONED_SECONDS)


@contextmanager
def new_entry(folder: Path) -> Iterator["Entry"]:
    """Yield an entry to add rows to; it is in place, of another one too, when the block ends well.

    Raises:
        OSError: a file could not be written; nothing is left of the entry.
    """
    with atomic_directory(folder, replace=True) as temporary:
        yield Entry(temporary)
        write_manifest(temporary)


class Entry:
    """An entry that is being written: a file grows for each column until ``finish`` joins them.

    In memory it holds the ids and the sources of its rows, and no tokens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._dtypes: dict[str, np.dtype[Any]] = {}  # of the columns, in their order
        self._tokens = 0
        self._ids: list[str] = []
        self._sources: list[str | None] = []

    def add(self, rows: Sequence[TokenizedPair]) -> None:
        """Append rows."""
        chunk = columns_of(rows)
        columns = {name: getattr(chunk, name) for name in _COLUMNS}
        is_first = not self._dtypes
        columns["offsets"] = self._tokens + chunk.offsets[0 if is_first else 1 :]
        for name, column in columns.items():
            append_bytes(self._folder / name, column.data)
            self._dtypes[name] = column.dtype
        self._tokens += len(chunk.tokens)
        self._ids += chunk.ids
        self._sources += chunk.sources

    def finish(self, report: TokenizationReport) -> None:
        """Write the files of an entry, without its manifest, in place of those of the columns."""
        path = self._folder / "columns.safetensors"
        append_bytes(path, self._header())
        for name in self._dtypes:
            append_file(path, self._folder / name)
            (self._folder / name).unlink()
        rows = {"ids": self._ids, "sources": self._sources, "report": asdict(report)}
        atomic_write(self._folder / "rows.json", json.dumps(rows, ensure_ascii=False))

    def _header(self) -> bytes:
        """Return what a safetensors file has before its data, padded so that these are aligned."""
        header, begin = {}, 0
        for name, dtype in self._dtypes.items():
            size = (self._folder / name).stat().st_size
            header[name] = {
                "dtype": _DTYPES[dtype.name],
                "shape": [size // dtype.itemsize],
                "data_offsets": [begin, begin + size],
            }
            begin += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def faults_of(folder: Path) -> list[str]:
    """Return what is wrong with an entry."""
    return verify_manifest(folder)


def load(folder: Path) -> Tokenization:
    """Return a sound entry, its columns memory-mapped."""
    rows = read_json(folder / "rows.json")
    notes = {
        name: tuple(RowNote(*note) for note in rows["report"][name]) for name in ("dropped", "cut")
    }
    names = {
        name: tuple(rows["report"][name])
        for name in ("boundary_merges", "special_in_text", "end_tokens_added")
    }
    report = TokenizationReport(**{**rows["report"], **notes, **names})
    path = folder / "columns.safetensors"
    pairs = TokenizedPairs(
        tokens=_mapped(path, "tokens", np.int32),
        offsets=_mapped(path, "offsets", np.int64),
        weights=_mapped(path, "weights", np.float32),
        margins=_mapped(path, "margins", np.float32),
        label_probs=_mapped(path, "label_probs", np.float32),
        ids=rows["ids"],
        sources=rows["sources"],
    )
    return Tokenization(pairs, replace(report, cache="found"))


def _mapped(path: Path, name: str, dtype: type[_Number]) -> NDArray[_Number]:
    """Map one tensor of a safetensors file into memory.

    Copy on write: torch warns of arrays that cannot be written.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
    begin, shape = 8 + size + entry["data_offsets"][0], tuple(entry["shape"])
    return np.asarray(np.memmap(path, dtype=dtype, mode="c", offset=begin, shape=shape))
