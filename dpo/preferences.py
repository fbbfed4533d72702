"""Preference pairs on disk and on the Hub.

``read_pairs`` reads JSON Lines, JSON arrays (both also gzipped), Parquet and data sets of the Hub,
in any layout of ``dpo.pair_rows``, and ``stream_pairs`` does without holding the pairs;
``write_pairs`` writes JSON Lines that read back as the same pairs. To add a file type, add its
reader to ``_READERS``.
"""

import codecs
import gzip
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from dpo.errors import InputError
from dpo.files import JSON, atomic_write
from dpo.hub import commit_of, fetch_dataset_files, is_dataset_id, split_files
from dpo.pair import AnswerTurns, Message, PreferencePair, Text, Tokens, plain_json
from dpo.pair_rows import (
    OPTIONAL,
    ParsedRow,
    RankedPairs,
    check_columns,
    pair_to_row,
    parse_rows,
)

__all__ = [
    "JSON", "LoadedPairs", "Message", "PairStream", "PreferencePair", "Text", "Tokens",
    "load_pairs", "read_pairs", "stream_pairs", "write_pairs",
]  # fmt: skip

_SHOWN_FAULTS = 20
_MOST_BYTES = 2**28  # of a row as text, or of a packed array, which may be a bomb


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSource:
    """What is to be told about a source of pairs.

    Attributes:
        format: the layout of the rows, in words.
        skipped: ``place: reason`` of each faulty row that was left out.
        ignored_columns: columns of the rows that mean nothing to a pair.
        revision: commit of the data set on the Hub; None for local files.
    """

    format: str
    skipped: tuple[str, ...] = ()
    ignored_columns: tuple[str, ...] = ()
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPairs(PairSource):
    """The pairs of a source and what is to be told about them.

    Attributes:
        pairs: in the order of the source; each has an id, ``row-<number>`` if the row gives none.
    """

    pairs: list[PreferencePair]


class FileRow(NamedTuple):
    """A row as it stands in a file: bytes of JSON, or what an array or a table holds.

    Attributes:
        number: from 1; counts on from file to file.
        place: file and line, or file and row, for people.
        content: bytes are still to be decoded; see `decode`.
    """

    number: int
    place: str
    content: "bytes | JSON"

    @property
    def default_id(self) -> str:
        """The id of a pair whose row gives none."""
        return f"row-{self.number}"

    def decode(self) -> JSON:
        """Return the row's JSON value.

        Raises:
            InputError: it is not UTF-8, malformed, or has one key twice.
        """
        return _decode(self.content) if isinstance(self.content, bytes) else self.content


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStream(PairSource):
    """The pairs of ``LoadedPairs``, read anew each time that they are gone through.

    Attributes:
        files: what is read, and the state that each was in the first time.
        counts: how many pairs each row of the files holds; a faulty one none.
        parse: makes the pairs of a row.
    """

    files: "Mapping[Path, _State]"
    counts: "array[int]"
    parse: Callable[..., list[ParsedRow]]

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[PreferencePair]:
        return self.read(np.arange(len(self)))

    def read(self, numbers: NDArray[np.int64]) -> Iterator[PreferencePair]:
        """Yield the pairs of some numbers, counted from 0 and rising; other rows are not decoded.

        Raises:
            InputError: a file has changed since the first time, or is a pipe.
        """
        is_wanted = np.zeros(len(self), dtype=np.bool_)
        is_wanted[numbers] = True
        self._refuse_changes()
        begin = 0
        for row, count in zip(file_rows(self.files), self.counts, strict=False):
            wanted = is_wanted[begin : begin + count]
            begin += count
            if wanted.any():
                found = self.parse(row.decode(), default_id=row.default_id)
                yield from compress((parsed.pair for parsed in found), wanted)
        self._refuse_changes()

    def _refuse_changes(self) -> None:
        for path, state in self.files.items():
            if not path.is_file():
                raise InputError(f"{path} can be read once only: give a file, which is read again")
            if _state(path) != state:
                raise InputError(f"{path}: changed while it was used: start again")


class ReadKeywords(TypedDict, total=False):
    """The options of ``stream_pairs`` that ``load_pairs`` and ``read_pairs`` take too."""

    columns: Mapping[str, str] | None
    revision: str | None
    split: str | None
    on_bad_row: str
    ranked: RankedPairs
    answer_turns: AnswerTurns | None


def read_pairs(source: str | Path, **options: Unpack[ReadKeywords]) -> list[PreferencePair]:
    """Return the pairs of ``load_pairs``, which takes the same arguments.

    Example:
        >>> from dpo import read_pairs
        >>> read_pairs("pairs.jsonl")[0].prompt
        '0 + 1 ='
    """
    return load_pairs(source, **options).pairs


def load_pairs(source: str | Path, **options: Unpack[ReadKeywords]) -> LoadedPairs:
    """Return the pairs of ``stream_pairs``, which takes the same arguments, in memory."""
    pairs: list[PreferencePair] = []
    stream = stream_pairs(source, **options, visit=pairs.append)
    return LoadedPairs(
        pairs=pairs,
        format=stream.format,
        skipped=stream.skipped,
        ignored_columns=stream.ignored_columns,
        revision=stream.revision,
    )


def stream_pairs(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    split: str | None = None,
    on_bad_row: str = "error",
    ranked: RankedPairs = "all",
    answer_turns: AnswerTurns | None = None,
    visit: Callable[[PreferencePair], object] | None = None,
) -> PairStream:
    """Go through every pair of a file, a folder of files, or a data set of the Hub.

    Rows are read one after another (a JSON array: at once). The layout of the first good row is
    that of all: a row in another layout is faulty.

    Args:
        source: a path, or the id of a data set on the Hub (``owner/name``).
        columns: field of a pair -> column that holds it, for rows with other names.
        revision: branch, tag or commit of a Hub data set.
        split: which of the splits that a folder's or a data set's file names tell; "train" if None.
        on_bad_row: "error" refuses the source if any row is faulty, "skip" leaves such rows out.
        ranked: of rows that rank several answers: "all" two of different scores make a pair, the
            "best" with each worse one, or as a "list" each with the next worse one.
        answer_turns: of rows without a column of this name, as of ``PreferencePair``.
        visit: called with each pair on the way.

    Raises:
        InputError: the source is not found, unreadable, or has faulty rows: 20 are listed.
    """
    columns = dict(columns or {})
    check_columns(columns)
    if on_bad_row not in ("error", "skip"):
        raise InputError(f"on_bad_row must be 'error' or 'skip', got {on_bad_row!r}")
    if ranked not in get_args(RankedPairs):
        expected = ", ".join(map(repr, get_args(RankedPairs)))
        raise InputError(f"ranked must be one of {expected}, got {ranked!r}")
    if answer_turns not in (None, *get_args(AnswerTurns)):
        raise InputError(f"answer_turns must be 'all' or 'last', got {answer_turns!r}")
    files = _locate(source, revision=revision, split=split)
    parse = partial(parse_rows, columns=columns, ranked=ranked, answer_turns=answer_turns)
    reading = _Reading(files, columns, parse)
    for row in file_rows(files):
        for pair in reading.add(row):
            if visit is not None:
                visit(pair)
    return reading.result(str(source), on_bad_row)


def write_pairs(pairs: Iterable[PreferencePair], path: str | Path) -> None:
    """Write pairs as JSON Lines, whole or not at all; the same pairs give the same bytes.

    Raises:
        InputError: the name does not end in ``.jsonl`` or ``.jsonl.gz``.

    Example:
        >>> from dpo import PreferencePair, read_pairs, write_pairs
        >>> write_pairs([PreferencePair("2 + 2 =", " 4", " 5")], "two.jsonl")
        >>> len(read_pairs("two.jsonl"))
        1
    """
    path = Path(path)
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{path}: pairs are written to .jsonl or .jsonl.gz")
    rows = map(pair_to_row, pairs)
    lines = (json.dumps(row, ensure_ascii=False, default=plain_json) + "\n" for row in rows)
    data = "".join(lines).encode()
    atomic_write(path, gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)


def file_rows(files: Iterable[Path]) -> Iterator[FileRow]:
    """Yield the rows of all files as they stand, whether or not they are pairs.

    Raises:
        InputError: a file is of an unknown type or damaged as a whole.
    """
    last = 0
    for path in files:
        read = _reader(path)
        if read is None:
            raise InputError(f"{path}: unknown type of file; known are {', '.join(_READERS)}")
        before, place = last, ""
        try:
            for row in read(path):
                last, place = before + row.number, row.place
                yield row._replace(number=last)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{path}: damaged gzip file after {place or 'its start'}: {error}"
            ) from error


class FaultyRowsError(InputError):
    """Rows of a source are no pairs; the message lists them."""


def list_faults(source: str, faults: Sequence[str]) -> str:
    """Return the message that lists faulty rows, no more than the first 20 of them."""
    title = f"{source}: {len(faults)} faulty row{'s' * (len(faults) > 1)}"
    more = [f"and {len(faults) - _SHOWN_FAULTS} more"] if len(faults) > _SHOWN_FAULTS else []
    return "\n".join([title, *faults[:_SHOWN_FAULTS], *more])


class _Reading:
    """What has been found while going through the rows of a source."""

    def __init__(
        self,
        files: Sequence[Path],
        columns: Mapping[str, str],
        parse: Callable[..., list[ParsedRow]],
    ) -> None:
        self.files = {path: _state(path) for path in files}
        self.columns = columns
        self.parse = parse
        self.counts = array("L")
        self.faults: list[str] = []
        self.layout: str | None = None
        self.fields: tuple[str, ...] = ()  # of the layout
        self.place_of_id: dict[str, str] = {}
        self.seen_columns: dict[str, None] = {}

    def add(self, row: FileRow) -> list[PreferencePair]:
        """Return the pairs of a row; of a faulty one none, and note the fault."""
        try:
            content = row.decode()
            found = self.parse(content, default_id=row.default_id)
            for parsed in found:
                self._check(parsed, row.place)
        except InputError as error:
            self.faults.append(f"{row.place}: {error}")
            self.counts.append(0)
            return []
        self.counts.append(len(found))
        if isinstance(content, Mapping):
            self.seen_columns |= dict.fromkeys(content)
        return [parsed.pair for parsed in found]

    def _check(self, parsed: ParsedRow, place: str) -> None:
        """Compare a row with those before it: all have one layout, and no two have one id."""
        if self.layout is None:
            self.layout, self.fields = parsed.layout, parsed.fields
        if parsed.layout != self.layout:
            raise InputError(f"layout '{parsed.layout}', but the rows before: '{self.layout}'")
        name = str(parsed.pair.id)
        first = self.place_of_id.setdefault(name, place)
        if first != place:
            raise InputError(f"id {name!r} is already that of {first}")

    def result(self, source: str, on_bad_row: str) -> PairStream:
        """Return what was read, or refuse it."""
        if self.faults and (on_bad_row == "error" or not any(self.counts)):
            raise FaultyRowsError(list_faults(source, self.faults))
        if self.layout is None:
            raise InputError(f"{source}: no rows; expected at least one preference pair")
        used = {*self.fields, *OPTIONAL, *self.columns.values()}
        used |= set() if "prompt" in self.seen_columns else {"conversations"}
        if self.layout == "OpenAI preference":
            used |= {"input", "preferred_output", "non_preferred_output"}
        ignored = tuple(column for column in self.seen_columns if column not in used)
        return PairStream(
            format=self.layout,
            skipped=tuple(self.faults),
            ignored_columns=ignored,
            revision=commit_of(next(iter(self.files))),
            files=self.files,
            counts=self.counts,
            parse=self.parse,
        )


class _State(NamedTuple):
    """What changes when a file does."""

    node: int
    size: int
    changed_ns: int


def _state(path: Path) -> _State:
    found = path.stat()
    return _State(found.st_ino, found.st_size, found.st_mtime_ns)


def _locate(source: str | Path, *, revision: str | None, split: str | None) -> list[Path]:
    """Return the files of a source, fetching those of a Hub data set."""
    path = Path(source)
    if path.is_dir():
        _refuse(source, revision=revision)
        return split_files(path, split)
    if path.exists():
        _refuse(source, revision=revision, split=split)
        return [path]
    if isinstance(source, str) and is_dataset_id(source) and _reader(path) is None:
        return fetch_dataset_files(source, revision, split)
    raise InputError(f"{source}: no such file")


def _refuse(source: str | Path, **options: str | None) -> None:
    """Refuse options that would be ignored."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} {value!r} has no meaning for the local {source}")


def _reader(path: Path) -> Callable[[Path], Iterator[FileRow]] | None:
    name = path.name.lower()
    return next((read for suffix, read in _READERS.items() if name.endswith(suffix)), None)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _json_lines(path: Path) -> Iterator[FileRow]:
    """Yield a row for each line that is not blank, numbered by its line."""
    with _open(path) as stream:
        lines = iter(partial(stream.readline, _MOST_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > _MOST_BYTES:
                raise InputError(f"{path}:{number}: a line of more than {_MOST_BYTES:,} bytes")
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield FileRow(number, f"{path}:{number}", content)


def _json_array(path: Path) -> Iterator[FileRow]:
    """Yield a row for each item of an array; JSON Lines named ``.json`` are read as such."""
    with _open(path) as stream:
        is_packed = isinstance(stream, gzip.GzipFile)
        data = stream.read(_MOST_BYTES + 1 if is_packed else -1).removeprefix(codecs.BOM_UTF8)
    if is_packed and len(data) > _MOST_BYTES and data.lstrip().startswith(b"["):
        raise InputError(f"{path}: an array of more than {_MOST_BYTES:,} bytes: write JSON Lines")
    if not data.lstrip().startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        items = _decode(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    assert isinstance(items, list)
    for number, item in enumerate(items, start=1):
        yield FileRow(number, f"{path}: row {number}", item)


def _parquet(path: Path) -> Iterator[FileRow]:
    """Yield a row for each row of a Parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pip install 'dpo-engine[parquet]'") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for content in batch.to_pylist():
                number += 1
                yield FileRow(number, f"{path}: row {number}", content)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system, not of what is in the file
        raise InputError(f"{path}: damaged Parquet file: {error}") from error


def _decode(data: bytes) -> JSON:
    """Decode JSON, refusing a key that is there twice: one of the two would be lost."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    try:
        content: JSON = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"malformed JSON: {error}") from error
    return content


def _object(items: list[tuple[str, JSON]]) -> dict[str, JSON]:
    content = dict(items)
    if len(content) < len(items):
        raise ValueError("an object has one key twice")
    return content


_READERS: dict[str, Callable[[Path], Iterator[FileRow]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_array,
    ".json.gz": _json_array,
    ".parquet": _parquet,
}
