"""Rows of files of pairs as they stand, the faulty ones included.

A row that training would refuse is still read as far as it can be, to say what ails it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dpo.data.texts import json_line
from dpo.errors import InputError
from dpo.pair import PreferencePair, Tokens
from dpo.pair_rows import parse_rows
from dpo.preferences import file_rows

_ASSISTANT_TURN = "\n\nAssistant:"


class Texts(NamedTuple):
    """Prompt and answers as plain text, to compare and to measure.

    A missing answer is empty; token ids are written as numbers.
    """

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class PairRow:
    """A row that training would take.

    Attributes:
        path: the file, as the user named it.
        number: position among the file's rows, from 0.
        place: file and line, for people.
        pair: as training takes it.
        texts: what it says.
    """

    path: Path
    number: int
    place: str
    pair: PreferencePair
    texts: Texts


@dataclass(frozen=True, slots=True)
class FaultyRow:
    """A row that training would refuse: the check that it belongs to, and the reader's words."""

    path: Path
    number: int
    place: str
    check: str
    detail: str


def read_rows(path: Path, columns: Mapping[str, str]) -> Iterator[PairRow | FaultyRow]:
    """Yield every row of a file; a row that ranks answers is yielded once for each pair of them.

    Args:
        path: JSON Lines, a JSON array, either also gzipped, or Parquet.
        columns: field of a pair -> column that holds it, for rows with other names.

    Raises:
        InputError: the file is absent, of another type, or damaged as a whole.
    """
    if path.is_dir():
        names = ", ".join(sorted(each.name for each in path.glob("*.jsonl*"))) or "none"
        raise InputError(f"{path} is a folder: name its files of pairs; it has {names}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    for number, row in enumerate(file_rows([path])):
        content, place = row.content, row.place
        try:
            content = row.decode()
            found = parse_rows(content, columns=columns, default_id=str(number))
        except InputError as error:
            check = _check_of_fault(content, columns)
            yield FaultyRow(path, number, place, check, str(error))
            continue
        for pair in (each.pair for each in found):
            texts = Texts(*map(plain_text, (pair.prompt, pair.chosen, pair.rejected)))
            yield PairRow(path, number, place, pair, texts)


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield every row of a file as one line, without the newline."""
    for row in file_rows([path]):
        if isinstance(row.content, bytes):
            yield row.content.strip()
        else:  # ASCII, because a faulty text may hold half of a surrogate pair
            yield json.dumps(row.content, default=str).encode()


def plain_text(value: object) -> str:
    """Return what a text, a message or a conversation says, without roles."""
    if isinstance(value, str):
        return value
    if isinstance(value, Tokens):
        return " ".join(map(str, value.ids))
    if isinstance(value, Mapping):
        said = value.get("content", value.get("value"))
        calls = value.get("tool_calls")
        return plain_text(said) + (json_line(calls) if calls else "")
    if isinstance(value, list | tuple):
        return "\n".join(
            plain_text(item.get("text", item) if _is_part(item) else item) for item in value
        )
    return ""


def _check_of_fault(row: object, columns: Mapping[str, str]) -> str:
    """Name the check that a faulty row belongs to."""
    names = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
    if not isinstance(row, Mapping):
        return "unreadable"
    found = [columns.get(name, name if name in row else other) for name, other in names.items()]
    completion = columns.get("completion", "completion")
    if row.keys().isdisjoint(found) and completion in row:
        return "unreadable" if plain_text(row[completion]).strip() else "empty"
    answers = [row.get(column, 0) for column in found]
    if not all(answer is None or isinstance(answer, str | list | Mapping) for answer in answers):
        return "unreadable"
    if not row.keys() & {columns.get("prompt", "prompt"), "input", "conversations"}:
        (first, *answers), (second, *others) = map(_split_last, answers)
        answers += others
        if first != second:
            return "different-prompts"
    chosen, rejected = map(plain_text, answers)
    if not chosen.strip() or not rejected.strip():
        return "empty"
    return "identical" if chosen == rejected else "unreadable"


def _split_last(value: object) -> tuple[str, str]:
    """Split a dialogue before its last answer."""
    if isinstance(value, list):
        return plain_text(value[:-1]), plain_text(value[-1:])
    prompt, mark, answer = plain_text(value).rpartition(_ASSISTANT_TURN)
    return prompt + mark, answer


def _is_part(item: object) -> bool:
    return isinstance(item, Mapping) and item.get("type") == "text"
