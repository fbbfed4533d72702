"""The page of several runs: what differs between them, where each ended, and how they went."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from dpo.errors import InputError
from dpo.files import atomic_write
from dpo.report.charts import SERIES, charts_of_runs, frontier
from dpo.report.page import (
    NOTHING,
    charts,
    estimate,
    key,
    section,
    table,
    write_page,
)
from dpo.report.record import Record, check_run, read_record

ENDS = {  # where a run ended, and its words
    "loss": "loss",
    "rewards/accuracy": "accuracy",
    "rewards/margin": "margin",
    "kl/k3_tok": "KL",
}
_OWN = frozenset({"out", "train.resume"})  # what differs between any two runs
_MOST_LABELLED = 3  # keys in the label of a run


def write_comparison(folders: Sequence[Path], out: Path, *, title: str = "Runs compared") -> Path:
    """Write a page about several runs and return its path.

    Args:
        folders: of the runs.
        out: the page.
        title: of the page.

    Raises:
        InputError: one is no folder of a run, or is given twice.
    """
    for folder in folders:
        check_run(folder)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"a run is given twice: {', '.join(map(str, folders))}")
    records = [read_record(folder, SERIES) for folder in folders]
    atomic_write(out, write_page(title, _body(title, records)))
    return out


def differing(configs: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the keys, in order, that do not have one value in all configs; ``out`` apart."""
    keys = dict.fromkeys(name for config in configs for name in config)
    return [
        name
        for name in keys
        if name not in _OWN and any(config.get(name) != configs[0].get(name) for config in configs)
    ]


def _body(title: str, records: Sequence[Record]) -> Iterator[str]:
    keys = differing([record.config for record in records])
    labels = _labels(records, keys)
    yield f"<h1>{escape(title)}</h1>"
    yield f"<p>{escape(_overview(records, keys))}</p>"
    yield from section(
        "Where they ended", [_table(records, keys)], "Held out, at the model that each run saved."
    )
    is_told_apart = labels != [record.name for record in records]
    dots = frontier(
        records,
        [_values(record, keys) for record in records] if is_told_apart else labels,
        x_name="kl/k3_tok",
        y_name="rewards/accuracy",
        note=", ".join(map(_short, keys)) if is_told_apart else "",
    )
    legend = " ".join(key(label, color) for color, label in enumerate(labels))
    yield f'<h2>How they went</h2>\n<p class="legend">{legend}</p>'
    yield (
        "<p>Solid lines are moving averages over a tenth of the steps, dashed ones are held out. "
        "A KL to the reference is estimated on the answers that are given, not on the policy's "
        "own: it compares runs, and is no distance.</p>"
    )
    yield from charts([*([dots] if dots else []), *charts_of_runs(records, labels)])


def _overview(records: Sequence[Record], keys: Sequence[str]) -> str:
    if not keys:
        return f"{len(records)} runs, whose configs do not differ."
    return f"{len(records)} runs, which differ in {', '.join(keys)}."


def _labels(records: Sequence[Record], keys: Sequence[str]) -> list[str]:
    """Name each run by what differs, or by its folder where that is nothing, or much."""
    labels = [
        ", ".join(f"{_short(name)} {_value(record, name)}" for name in keys) for record in records
    ]
    if 0 < len(keys) <= _MOST_LABELLED and len(set(labels)) == len(labels):
        return labels
    return [record.name for record in records]


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _values(record: Record, keys: Sequence[str]) -> str:
    return ", ".join(_value(record, name) for name in keys)


def _table(records: Sequence[Record], keys: Sequence[str]) -> str:
    rows = [
        [record.name, *(_value(record, name) for name in keys), *_ends(record)]
        for record in records
    ]
    return table(["run", *keys, "steps", *ENDS.values()], rows)


def _ends(record: Record) -> Iterator[str]:
    history = record.history
    yield f"{max(history.steps):,}" if history.steps else NOTHING
    ends = record.ends()
    for name in ENDS:
        yield estimate(ends, name)


def _value(record: Record, name: str) -> str:
    value = record.config.get(name)
    return NOTHING if value is None else f"{value:g}" if isinstance(value, float) else f"{value}"
