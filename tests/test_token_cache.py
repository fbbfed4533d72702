"""Entries of the token cache: their files, and what becomes of those that are not finished."""

import json
import os
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo import token_cache
from dpo.errors import InputError
from dpo.pair import PreferencePair
from dpo.pair_view import PairNotes, PairView, Part, RowNumbers, view_of
from dpo.preferences import stream_pairs
from dpo.tokenization import TokenizeOptions, tokenize_pairs
from dpo.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
COLUMNS = ("tokens", "offsets", "weights", "margins", "label_probs")


def pairs_of(count: int) -> list[PreferencePair]:
    return [
        PreferencePair(f"say {row}", "yes" * (row % 5), "no", weight=row, margin=0.5, source="s")
        for row in range(1, count + 1)
        if row % 5
    ]


@pytest.mark.parametrize("dropped", [0, 600])
def test_entry_of_many_chunks_is_a_safetensors_file_of_the_same_columns(
    tmp_path: Path, dropped: int
) -> None:
    long = [PreferencePair(f"say {row}", "yes" * 9, "no") for row in range(dropped)]
    pairs, options = [*long, *pairs_of(2001)], TokenizeOptions(max_length=25, truncation="drop")
    fresh = tokenize_pairs(pairs, TOKENIZER, options)
    stored = tokenize_pairs(pairs, TOKENIZER, options, cache_dir=tmp_path)
    assert fresh.report.kept == len(stored.pairs) == 1601
    assert len(fresh.pairs.tokens) % 2  # what follows them is aligned if it is no wider
    assert stored.pairs.fingerprint == fresh.pairs.fingerprint
    (path,) = tmp_path.glob("*/columns.safetensors")
    assert {file.name for file in path.parent.iterdir()} == {
        path.name,
        "rows.json",
        "manifest.json",
    }
    columns = load_file(path)
    assert columns.keys() == {*COLUMNS}
    for name, column in columns.items():
        np.testing.assert_array_equal(column, getattr(fresh.pairs, name), strict=True)
        assert getattr(stored.pairs, name).flags.aligned


def test_refused_rows_leave_nothing_behind(tmp_path: Path) -> None:
    options = TokenizeOptions(max_length=10, truncation="error")
    pairs = [*pairs_of(800), PreferencePair("say", "yes" * 9, "no")]
    with pytest.raises(InputError, match="max_length 10"):
        tokenize_pairs(pairs, TOKENIZER, options, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.5, 1.1])
def test_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(
    tmp_path: Path, share: float, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    tokens_bytes = tokenize_pairs(pairs_of(2000), TOKENIZER).pairs.tokens.nbytes
    name = "tokens" if share < 1 else "columns.safetensors"
    with full_disk(int(share * tokens_bytes)), pytest.raises(OSError, match="too large") as caught:
        tokenize_pairs(pairs_of(2000), TOKENIZER, cache_dir=tmp_path)
    assert Path(caught.value.filename).name == name
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path: Path) -> None:
    young, old = tmp_path / "a.tmp-1-abc", tmp_path / "b.tmp-2-def"
    for folder in (young, old):
        folder.mkdir()
        (folder / "tokens").write_bytes(b"1234")
    for path in (old / "tokens", old):
        os.utime(path, (0, 0))
    tokenize_pairs(pairs_of(3), TOKENIZER, cache_dir=tmp_path)
    assert young.exists()
    assert not old.exists()


def test_entry_has_its_name_when_it_is_complete(tmp_path: Path) -> None:
    made = tokenize_pairs(pairs_of(3), TOKENIZER)
    with token_cache.new_entry(tmp_path / "key") as entry:
        entry.add(list(made.pairs))
        entry.finish(made.report)
        assert [path.name[:8] for path in tmp_path.iterdir()] == ["key.tmp-"]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert token_cache.load(tmp_path / "key").pairs.fingerprint == made.pairs.fingerprint


def test_tokens_in_the_cache_are_found_without_reading_the_pairs(tmp_path: Path) -> None:
    view = view_of(pairs_of(9))
    first = tokenize_pairs(view, TOKENIZER, cache_dir=tmp_path)

    def read(rows: RowNumbers) -> NoReturn:
        pytest.fail(f"{rows} are read")

    blind = PairView([view.parts[0]._replace(read=read)])
    found = tokenize_pairs(blind, TOKENIZER, cache_dir=tmp_path)
    assert (found.report.cache, found.pairs.fingerprint) == ("found", first.pairs.fingerprint)


def peak_bytes(folder: Path, rows: int) -> int:
    """Tokenize a file and measure what Python and numpy held at most."""
    path, notes = folder / f"{rows}.jsonl", PairNotes()
    text = " ".join(map(str, range(50)))
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            pair = {"prompt": f"{row} {text}", "chosen": text, "rejected": text[1:]}
            file.write(json.dumps(pair) + "\n")
    tracemalloc.start()
    stream = stream_pairs(path, visit=notes.add)
    view = PairView([Part(stream.read, notes, np.arange(len(notes)))])
    made = tokenize_pairs(view, TOKENIZER, cache_dir=folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(made.pairs) == rows
    return peak


@pytest.mark.slow
def test_four_times_the_rows_take_little_more_memory(tmp_path: Path) -> None:
    assert peak_bytes(tmp_path, 8192) < 1.6 * peak_bytes(tmp_path, 2048)
