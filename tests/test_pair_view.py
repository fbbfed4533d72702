"""Pairs that are read anew each time."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

import numpy as np
import pytest

from dpo.pair import PreferencePair
from dpo.pair_view import PairView, Part, RowNumbers, view_of

TEXT = PreferencePair("2+2=", "4", "5", id="text")
GOOD = PreferencePair("3+3=", "6", None)
BAD = PreferencePair("3+3=", None, "7", id="bad")
SAID = ({"role": "assistant", "content": "4"},)
TALK = PreferencePair(({"role": "user", "content": "2+2?"},), SAID, None, id="talk")
PAIRS = [TEXT, GOOD, BAD, TALK]


def flags(*values: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array(values, dtype=np.bool_)


def test_view_is_read_anew_each_time() -> None:
    reads = []

    def read(rows: RowNumbers) -> Iterator[PreferencePair]:
        reads.append(rows.tolist())
        return (PAIRS[row] for row in rows)

    view = PairView([view_of(PAIRS).parts[0]._replace(read=read, rows=np.array([0, 2]))])
    assert (len(view), [*view], [*view], reads) == (2, [TEXT, BAD], [TEXT, BAD], [[0, 2]] * 2)


def test_ids_number_the_rows_without_one_and_mark_repeated_ones() -> None:
    (part,) = view_of(PAIRS).parts
    view = PairView([part, part._replace(rows=np.array([1, 2]), time=1)])
    assert [*view.ids] == ["text", "row-2", "bad", "talk", "row-2#2", "bad#2"]
    assert [pair.id for pair in view] == ["text", None, "bad", "talk", "row-2#2", "bad#2"]
    assert [*view][4:] == [GOOD, BAD]


def test_unpaired_rows_are_counted() -> None:
    notes = view_of(PAIRS).parts[0].notes
    assert (len(notes), notes.chosen_alone, notes.rejected_alone) == (4, 2, 1)


def test_pairs_are_taken_across_parts() -> None:
    view = PairView([*view_of(PAIRS[:2]).parts, *view_of(PAIRS[2:]).parts])
    taken = view.take(flags(0, 1, 0, 1))
    assert [*taken] == [GOOD, TALK]
    assert [*taken.take(flags(0, 1))] == [TALK]
    assert taken.has_conversations
    assert not view.take(flags(1, 1, 1, 0)).has_conversations


def test_hash_is_of_all_that_pairs_hold_their_order_and_the_other_texts() -> None:
    view = view_of(PAIRS)
    (part,) = view.parts
    hashes = [
        view.hash(),
        view.hash("x"),
        view_of(PAIRS[::-1]).hash(),
        view_of([*PAIRS[:3], replace(TALK, weight=2.0)]).hash(),
        view_of([replace(TEXT, id="other"), *PAIRS[1:]]).hash(),
        view.take(flags(1, 1, 1, 0)).hash(),
        PairView([part, part]).hash(),
        PairView([part, part._replace(time=1)]).hash(),
    ]
    assert len(set(hashes)) == len(hashes)
    assert view_of([replace(pair) for pair in PAIRS]).hash() == hashes[0]


def test_hash_and_ids_need_no_reading() -> None:
    def read(rows: RowNumbers) -> NoReturn:
        pytest.fail(f"{rows} are read")

    (part,) = view_of(PAIRS).parts
    blind = PairView([Part(read, part.notes, part.rows)])
    assert blind.hash() == view_of(PAIRS).hash()
    assert [*blind.take(flags(1, 0, 0, 0)).ids] == ["text"]
