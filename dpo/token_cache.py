"""Tokens on disk, under a key of everything they depend on.

An entry is the folder ``<key>`` with ``columns.safetensors``, ``rows.json`` (ids, sources, report)
and the manifest of their hashes. It is complete or not there, checked when read, memory-mapped.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dpo.files import atomic_directory, read_json, verify_manifest, write_json, write_manifest
from dpo.pair import PreferencePair, plain_json
from dpo.pair_rows import pair_to_row
from dpo.tokenized_pairs import RowNote, Tokenization, TokenizationReport, TokenizedPairs

_FORMAT = 1  # raise it when the same key would give other tokens
_COLUMNS = ("tokens", "offsets", "weights", "margins", "label_probs")
_Number = TypeVar("_Number", np.int32, np.int64, np.float32)


def content_key(pairs: Sequence[PreferencePair], *others: str) -> str:
    """Return the hash of pairs and of what else decides on their tokens."""
    digest = hashlib.sha256(json.dumps([_FORMAT, *others]).encode())
    for pair in pairs:
        row = json.dumps(pair_to_row(pair), sort_keys=True, default=plain_json)
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()


def store(folder: Path, result: Tokenization) -> None:
    """Write an entry, in place of one that is there.

    Raises:
        OSError: a file could not be written; nothing is left of the entry.
    """
    with atomic_directory(folder, replace=True) as temporary:
        columns = {name: getattr(result.pairs, name) for name in _COLUMNS}
        path = temporary / "columns.safetensors"
        path.touch()  # with the usual permissions: safetensors lets the owner alone read its files
        try:
            save_file(columns, path)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        write_json(
            temporary / "rows.json",
            {
                "ids": list(result.pairs.ids),
                "sources": list(result.pairs.sources),
                "report": asdict(result.report),
            },
        )
        write_manifest(temporary)


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
