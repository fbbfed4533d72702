"""Preference pairs in the formats of other tools.

A format is an `Exporter`; to add one, write a function that puts an `ExportSource` into an empty
folder and name it in ``EXPORTERS``. The same source gives the same bytes.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from dpo.data.arms import find_arms, number_by_appearance
from dpo.data.card import data_facts, simulation_notice
from dpo.data.dataset_files import load_dataset, read_metadata
from dpo.data.examples import Examples
from dpo.data.kinds import PolicyKind
from dpo.data.kinds.base import Action, State
from dpo.data.texts import json_line
from dpo.errors import InputError
from dpo.files import JSON, atomic_directory, check_replaceable, write_manifest
from dpo.pair import Content, Message, PreferencePair, Text, Tokens
from dpo.pair_rows import FIELDS, OPTIONAL, pair_to_row
from dpo.preferences import stream_pairs
from dpo.progress import Bar, Console

Row = TypeVar("Row")


class Demonstration(NamedTuple):
    """A prompt with an answer worth imitating."""

    prompt: Text
    answer: Text


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What is exported; both mappings are by split, "train" and "eval", empty splits left out.

    Attributes:
        name: of the data, for people.
        facts: Markdown for the card: where the pairs come from; empty where nobody knows.
        pairs: all pairs.
        demonstrations: good answers alone; a function, because they take time to find.
        bar: of the rows that are written; None where nobody looks.
    """

    name: str
    facts: str
    pairs: Mapping[str, Sequence[PreferencePair]]
    demonstrations: Callable[[], Mapping[str, Sequence[Demonstration]]]
    bar: Bar | None = None

    def counted(self, rows: Iterable[Row]) -> Iterable[Row]:
        """Yield rows that are written, and count them."""
        return rows if self.bar is None else self.bar.each(rows)


@dataclass(frozen=True, slots=True)
class Exporter:
    """One format.

    Attributes:
        write: puts a source into an empty folder.
        keeps: which optional fields of a pair the format can hold.
        usage: Markdown for the card: what the files hold and how to load them.
        demonstrates: whether it writes good answers alone.
    """

    write: Callable[[ExportSource, Path], None]
    keeps: frozenset[str]
    usage: str
    demonstrates: bool = False


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: where.
        file_bytes: size of each file.
        notes: what the format could not hold, one sentence each.
    """

    folder: Path
    file_bytes: Mapping[str, int]
    notes: Sequence[str]


def export_pairs(
    source: str | Path,
    folder: str | Path,
    *,
    format_name: str,
    columns: Mapping[str, str] | None = None,
    kind: PolicyKind | None = None,
    replace_folder: bool = False,
    console: Console | None = None,
) -> ExportReport:
    """Write the pairs of a data set folder or of a file of pairs in another format.

    Args:
        source: a folder of `write_dataset`, or whatever `load_pairs` reads.
        folder: is made; must not exist unless ``replace_folder``.
        format_name: one of ``EXPORTERS``.
        columns: field of a pair -> column that holds it, for a file of pairs with other names.
        kind: of a data set whose policy is not in ``KINDS``; the format "chat" asks for it.
        replace_folder: whether an existing folder is replaced.
        console: where progress is shown; None shows nothing.

    Raises:
        InputError: an unknown format, an unreadable source, the folder exists, or it holds the
            source or other files that would be lost.
    """
    if format_name not in EXPORTERS:
        raise InputError(f"there is no format {format_name!r}, only {', '.join(EXPORTERS)}")
    exporter = EXPORTERS[format_name]
    target = Path(folder)
    if Path(source).exists() and Path(source).resolve().is_relative_to(target.resolve()):
        raise InputError(f"{folder} holds the source {source}: choose another folder")
    check_replaceable(target, replace=replace_folder)
    console = console or Console(quiet=True)
    with console.bar("read", unit="pairs") as bar:
        exported = read_source(source, columns=columns, kind=kind, bar=bar)
    total = None if exporter.demonstrates else sum(map(len, exported.pairs.values()))
    with atomic_directory(target, replace=replace_folder) as temporary:
        with console.bar("write", total, unit="rows") as bar:
            exporter.write(replace(exported, bar=bar), temporary)
        if not (temporary / "README.md").exists():
            _write_text(temporary / "README.md", _card(exported, format_name))
        write_manifest(temporary)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    return ExportReport(target, sizes, _lost(exported, exporter, format_name))


def read_source(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    kind: PolicyKind | None = None,
    bar: Bar | None = None,
) -> ExportSource:
    """Read a data set folder, or a source of pairs, which becomes the training split.

    Pairs that are read are counted in ``bar``.

    Raises:
        InputError: it is unreadable.
    """
    folder = Path(source)
    if any(folder.glob("*_metadata.json")):
        if columns:
            raise InputError(
                f"columns have no effect: {source} is a data set, whose names are known"
            )
        metadata = read_metadata(folder)
        name = metadata.policy
        facts = data_facts(metadata.stats, metadata.options, metadata.pair_options)
        files = {side: folder / f"{name}_dpo_{side}.jsonl" for side in ("train", "eval")}
        pairs = {side: _pairs(file, bar=bar) for side, file in files.items() if _size(file)}
        return ExportSource(
            f"{name} policy",
            simulation_notice(metadata.stats) + facts,
            pairs,
            lambda: _best_actions(folder, kind),
        )
    loaded = {"train": _pairs(source, columns, bar=bar)}
    return ExportSource(folder.name, "", loaded, lambda: _chosen(loaded))


def _size(path: Path) -> int:
    """Return the size of a file of the data set.

    Raises:
        InputError: it is not there.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file, though the data set names it")
    return path.stat().st_size


def _pairs(
    source: str | Path, columns: Mapping[str, str] | None = None, *, bar: Bar | None
) -> list[PreferencePair]:
    """Read pairs without the ids that the reader makes up."""
    pairs: list[PreferencePair] = []

    def take(pair: PreferencePair) -> None:
        made_up = pair.id == f"row-{len(pairs) + 1}"
        pairs.append(replace(pair, id=None) if made_up else pair)
        if bar is not None:
            bar.advance()

    stream_pairs(source, columns=columns, visit=take)
    return pairs


def _chosen(pairs: Mapping[str, Sequence[PreferencePair]]) -> dict[str, list[Demonstration]]:
    """Return the chosen answers; a file of pairs does not say how good they are."""
    return {
        split: [
            Demonstration(_text(pair.prompt), _text(pair.chosen))
            for pair in rows
            if pair.chosen is not None
        ]
        for split, rows in pairs.items()
    }


def _best_actions(folder: Path, kind: PolicyKind | None) -> dict[str, list[Demonstration]]:
    """Return, for each prompt, the action that earned most, if its mean reward is above zero."""
    dataset = load_dataset(folder, kind)
    sides = {"train": dataset.train, "eval": dataset.eval}
    return {side: _good(examples) for side, examples in sides.items() if len(examples)}


def _good(examples: Examples[State, Action]) -> list[Demonstration]:
    columns = examples.columns()
    contexts = number_by_appearance(columns.prompts)
    arms = find_arms(contexts, columns.actions, columns.rewards)
    by_reward = np.lexsort((-arms.reward, arms.context))
    is_best = np.diff(arms.context[by_reward], prepend=-1) > 0
    best = by_reward[is_best & (arms.reward[by_reward] > 0)]
    rows = arms.best_row[best].tolist()
    return [Demonstration(examples.prompt(row), examples.response(row)) for row in rows]


# --- formats -------------------------------------------------------------------------------------


def _write_jsonl(source: ExportSource, folder: Path) -> None:
    for split, pairs in source.pairs.items():
        _write_lines(folder / f"{split}.jsonl", map(pair_to_row, source.counted(pairs)))


def _write_huggingface(source: ExportSource, folder: Path) -> None:
    """Write one file a split; the card's header tells ``datasets`` which file is which split."""
    names = {split: _HUGGINGFACE_SPLITS.get(split, split) for split in source.pairs}
    for split, pairs in source.pairs.items():
        _write_lines(folder / f"{names[split]}.jsonl", map(pair_to_row, source.counted(pairs)))
    files = "".join(
        f"      - split: {name}\n        path: {name}.jsonl\n" for name in names.values()
    )
    header = f"---\nconfigs:\n  - config_name: default\n    data_files:\n{files}---\n\n"
    _write_text(folder / "README.md", header + _card(source, "huggingface"))


def _write_openai(source: ExportSource, folder: Path) -> None:
    for split, pairs in source.pairs.items():
        _write_lines(folder / f"{split}.jsonl", map(_openai_row, source.counted(pairs)))


def _openai_row(pair: PreferencePair) -> JSON:
    if pair.chosen is None or pair.rejected is None:
        raise InputError("the format openai holds pairs alone, and a row has one answer alone")
    return {
        "input": {
            "messages": _messages(_text(pair.prompt), "user"),
            "tools": list(pair.tools or ()),
            "parallel_tool_calls": True,
        },
        "preferred_output": _messages(_text(pair.chosen), "assistant"),
        "non_preferred_output": _messages(_text(pair.rejected), "assistant"),
    }


def _write_chat(source: ExportSource, folder: Path) -> None:
    for split, rows in source.demonstrations().items():
        messages = (
            _messages(row.prompt, "user") + _messages(row.answer, "assistant")
            for row in source.counted(rows)
        )
        _write_lines(folder / f"{split}.jsonl", ({"messages": each} for each in messages))


def _write_prompt_completion(source: ExportSource, folder: Path) -> None:
    for split, rows in source.demonstrations().items():
        _write_lines(
            folder / f"{split}.jsonl",
            ({"prompt": row.prompt, "completion": row.answer} for row in source.counted(rows)),
        )


def _text(content: Content) -> Text:
    if isinstance(content, Tokens):
        raise InputError("this format holds texts, and a row holds token ids")
    return content


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _write_csv(source: ExportSource, folder: Path) -> None:
    columns = _columns(source)
    for split, pairs in source.pairs.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(columns)
            for row in map(pair_to_row, source.counted(pairs)):
                writer.writerow([_cell(row.get(column)) for column in columns])


def _cell(value: JSON) -> str:
    """Return a cell that no spreadsheet takes for a formula; what is not text is JSON."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return json_line(value)
    return f"'{value}" if value.lstrip()[:1] in _FORMULA_STARTS else value


def _write_parquet(source: ExportSource, folder: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("Parquet needs pyarrow: pip install 'dpo-engine[parquet]'") from error
    columns = _columns(source)
    for split, pairs in source.pairs.items():
        rows = [pair_to_row(pair) for pair in source.counted(pairs)]
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
        parquet.write_table(table, folder / f"{split}.parquet", compression="zstd")


def _columns(source: ExportSource) -> list[str]:
    """Return the fields that any pair has, in the order of `FIELDS`."""
    used = {name for pairs in source.pairs.values() for pair in pairs for name in pair_to_row(pair)}
    return [name for name in FIELDS if name in used]


_HUGGINGFACE_SPLITS = {"eval": "test"}
_FORMULA_STARTS = tuple("=+-@'\uff1d\uff0b\uff0d\uff20")  # the last four are full-width = + - @
_ALL = frozenset(OPTIONAL)

EXPORTERS: dict[str, Exporter] = {
    "huggingface": Exporter(
        _write_huggingface,
        keeps=_ALL,
        usage="`datasets.load_dataset(FOLDER)` gives the splits `train` and `test` with the "
        "columns `prompt`, `chosen` and `rejected`, which TRL's `DPOTrainer` takes as they are, or "
        "`prompt`, `completion` and `label` of unpaired answers, which `KTOTrainer` takes.",
    ),
    "openai": Exporter(
        _write_openai,
        keeps=frozenset({"tools"}),
        usage="One object a line for preference fine-tuning at OpenAI: `input.messages`, "
        "`preferred_output`, `non_preferred_output`.",
    ),
    "chat": Exporter(
        _write_chat,
        keeps=frozenset(),
        demonstrates=True,
        usage="One conversation a line, `{messages: [...]}`, for supervised fine-tuning: of a data "
        "set of decisions the best action of each prompt, if its reward is above zero; of a file "
        "of pairs every chosen answer, of unpaired answers those of label true. Rewards are not in "
        "the text.",
    ),
    "prompt-completion": Exporter(
        _write_prompt_completion,
        keeps=frozenset(),
        demonstrates=True,
        usage="One object a line with `prompt` and `completion`, for supervised fine-tuning: of a "
        "data set of decisions the best action of each prompt, if its reward is above zero; of a "
        "file of pairs every chosen answer, of unpaired answers those of label true.",
    ),
    "csv": Exporter(
        _write_csv,
        keeps=_ALL,
        usage="UTF-8, every cell quoted, newlines kept, conversations as JSON. A text that begins "
        "(after blanks) with one of `= + - @ '` has a `'` put before it, so that no spreadsheet "
        "takes it for a formula: remove that one letter to get the text back.",
    ),
    "parquet": Exporter(_write_parquet, keeps=_ALL, usage="One Parquet file a split."),
    "jsonl": Exporter(
        _write_jsonl, keeps=_ALL, usage="One pair a line, as `dpo train --data` reads it."
    ),
}


# --- what goes with the files --------------------------------------------------------------------


def _card(source: ExportSource, format_name: str) -> str:
    counts = "\n".join(f"- {split}: {len(pairs)} pairs" for split, pairs in source.pairs.items())
    usage = EXPORTERS[format_name].usage
    facts = f"\n## The data\n\n{source.facts}\n" if source.facts else ""
    return (
        f"# {source.name}: preference pairs, format {format_name}\n\n{usage}\n\n{counts}\n{facts}"
    )


def _lost(source: ExportSource, exporter: Exporter, format_name: str) -> list[str]:
    """Say which fields of the pairs the format cannot hold."""
    rows = [pair_to_row(pair) for pairs in source.pairs.values() for pair in pairs]
    counts = {
        name: sum(name in row for row in rows) for name in OPTIONAL if name not in exporter.keeps
    }
    return [
        f"{count} pairs have a {name}, which the format {format_name} cannot hold"
        for name, count in counts.items()
        if count
    ]


def _write_lines(path: Path, rows: Iterable[JSON]) -> None:
    _write_text(path, "".join(f"{json_line(row)}\n" for row in rows))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
