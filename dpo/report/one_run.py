"""The page of one run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpo.files import OTHER_SHAPE, atomic_write
from dpo.report.charts import (
    SERIES,
    charts_of_run,
    lengths,
    lengths_against_margins,
    margins,
)
from dpo.report.page import NOTHING, charts, estimate, section, shown, table, write_page
from dpo.report.record import (
    PARTS,
    REPORT,
    DataSide,
    Ends,
    EvalPair,
    History,
    Record,
    Sample,
    read_record,
)
from dpo.svg import MAX_POINTS

_HEADLINE = {  # of an evaluation, and their words
    "loss": "loss",
    "rewards/accuracy": "reward accuracy",
    "rewards/margin": "reward margin",
    "logps/chosen": "log-prob of the chosen answer (nats)",
    "logps/rejected": "log-prob of the rejected answer (nats)",
    "kl/k3_tok": "KL to the reference (nats a token)",
}
_LINES = (
    "Strong lines are moving averages over a tenth of the steps, faint ones the steps; dashed "
    "lines are held out, with their 95 % intervals."
)
_SHARE_NAMES = ("least", "median", "95 % quantile", "greatest")


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run and return its path.

    Args:
        run_folder: of the run.
        out: the page; ``report.html`` in the run's folder if None.

    Raises:
        OSError: the folder cannot be read or written.
    """
    record = read_record(run_folder, SERIES)
    path = out or run_folder / REPORT
    atomic_write(path, write_page(f"Run {record.name}", _body(record)))
    return path


def _body(record: Record) -> Iterator[str]:
    history = record.history
    yield f"<h1>Run {escape(record.name)}</h1>"
    yield f"<p>{escape(_overview(history))}</p>"
    yield from section(
        "Held out, before and after",
        _headline(record),
        "In brackets: 95 % intervals, as if the pairs were drawn independently.",
    )
    yield from section("Before and after", _summary(record.summary), "In brackets: 95 % intervals.")
    yield from section("How it went", list(charts(list(charts_of_run(history)))), _LINES)
    yield from section(
        "The held-out pairs", _eval_pairs(record.eval_pairs), _of_eval_pairs(record.eval_pairs)
    )
    yield from section("Answers to held-out prompts", _samples(record.samples), _GREEDY)
    yield from section("The data", list(_data(record)))
    yield from section("Metrics", _metrics(history))
    yield from section("Config", [f"<pre>{escape(record.config_text)}</pre>"] * bool(record.config))


def _overview(history: History) -> str:
    if not history.steps:
        return "No optimizer step is recorded."
    first, last = min(history.steps), max(history.steps)
    words = [f"Optimizer steps {first} to {last}, {len(history.steps)} recorded."]
    gaps = sum(not math.isfinite(value) for value in history.series.get("loss", {}).values())
    if gaps:
        words.append(f"Steps whose loss is not finite: {gaps}.")
    if len(history.steps) > MAX_POINTS:
        words.append("Faint lines are means of neighbours, bands go from least to greatest.")
    if history.unreadable_lines:
        words.append(f"Lines of metrics.jsonl that cannot be read: {history.unreadable_lines}.")
    return " ".join(words)


def _headline(record: Record) -> list[str]:
    history, after = record.history, record.ends()
    before = {
        name.removeprefix("eval/"): ends.first
        for name, ends in history.ends.items()
        if name.startswith("eval/")
    }
    rows = [
        [word, *(estimate(ends, name) for ends in (before, after))]
        for name, word in _HEADLINE.items()
        if f"eval/{name}" in history.ends
    ]
    return [table(["", "before", "after"], rows)] if rows else []


def _summary(summary: Mapping[str, Any]) -> list[str]:
    try:
        rows = [
            [name, *(_estimate(row.get(moment, {})) for moment in ("before", "after"))]
            for name, row in summary.items()
        ]
    except OTHER_SHAPE:
        return []
    return [table(["", "before", "after"], rows)] if rows else []


def _estimate(estimate: Mapping[str, float]) -> str:
    if "value" not in estimate:
        return NOTHING
    interval = (
        f" [{shown(estimate['low'])}, {shown(estimate['high'])}]" if "low" in estimate else ""
    )
    return shown(estimate["value"]) + interval


def _eval_pairs(pairs: Sequence[EvalPair]) -> list[str]:
    if not pairs:
        return []
    return list(charts([margins(pairs), lengths_against_margins(pairs)]))


def _of_eval_pairs(pairs: Sequence[EvalPair]) -> str:
    if not pairs:
        return ""
    text = f"{len(pairs):,} pairs at the evaluation of step {pairs[0].step}"
    (before, *others) = {pair.margin_before for pair in pairs}
    if others or before is None:
        return f"{text}."
    return f"{text}; before the first step every margin is {shown(before)}."


_GREEDY = "The likeliest token each time."


def _samples(samples: Sequence[Sample]) -> list[str]:
    if not samples:
        return []
    return ['<div class="samples">', *map(_sample, samples), "</div>"]


def _sample(sample: Sample) -> str:
    entries = {
        "row": sample.id,
        "prompt": sample.prompt,
        "chosen": sample.chosen,
        "before": sample.before,
        "after": NOTHING if sample.after is None else sample.after,
    }
    parts = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in entries.items())
    return f'<div class="sample"><dl>{parts}</dl></div>'


def _data(record: Record) -> Iterator[str]:
    sides = [("Trained on", record.train), ("Held out", record.held_out)]
    known = [(name, side) for name, side in sides if side is not None]
    if known:
        yield from charts([lengths(side, f"{name}: tokens of each text") for name, side in known])
        yield table(["tokens", "texts", *_SHARE_NAMES], [*_length_rows(known)])
    if record.told:
        yield "<ul>"
        yield from (f"<li>{escape(line)}</li>" for line in record.told)
        yield "</ul>"


def _length_rows(sides: Sequence[tuple[str, DataSide]]) -> Iterator[list[str]]:
    for name, side in sides:
        yield [f"{name}, all texts", f"{side.pairs:,} rows", f"{side.tokens:,} in all", "", "", ""]
        for part in PARTS:
            count = f"{sum(side.counts[part]):,}"
            yield [f"{name}, {part}", count, *map(shown, side.lengths[part])]


def _metrics(history: History) -> list[str]:
    names = dict.fromkeys(name.removeprefix("eval/") for name in history.ends)
    if not names:
        return []
    rows = [
        [name, *_end_cells(history.ends.get(name)), *_end_cells(history.ends.get(f"eval/{name}"))]
        for name in names
    ]
    return [table(["", "first", "last", "first, held out", "last, held out"], rows)]


def _end_cells(ends: Ends | None) -> list[str]:
    return [NOTHING, NOTHING] if ends is None else [shown(ends.first), shown(ends.last)]
