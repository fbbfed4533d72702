"""One page about a run: its charts, its figures and its config, in one HTML file without scripts.

``write_report`` reads ``metrics.jsonl``, ``config.toml`` and, if there is one, ``summary.json`` of
a run's folder. The latter holds what was measured before and after the training::

    {"reward accuracy": {"before": {"value": 0.5, "low": 0.45, "high": 0.55}, "after": {...}}}

To add a chart, add a line to ``CHARTS``.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from dpo.files import atomic_write, read_json
from dpo.svg import MAX_POINTS, Line, Point, line_chart

REPORT = "report.html"
_NOTHING = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Chart:
    """Metrics that share axes; those of the evaluations are drawn with them, dashed."""

    title: str
    names: Mapping[str, str]  # metric to its word in the legend


CHARTS = (
    Chart("Loss", {"loss": "loss"}),
    Chart("Reward margin", {"rewards/margin": "margin"}),
    Chart("Reward accuracy", {"rewards/accuracy": "accuracy"}),
    Chart(
        "Log-prob of the answers (nats)",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    Chart("Gradient norm", {"grad_norm": "norm before clipping"}),
    Chart("Update by weights", {"health/update_ratio": "norm of the update / norm of the weights"}),
    Chart("Pairs per second", {"perf/pairs_per_s": "pairs/s"}),
)


@dataclass(slots=True)
class _Ends:
    """First and last value of a metric."""

    first: float
    last: float


@dataclass(slots=True)
class _History:
    """What a page needs of ``metrics.jsonl``: the series of the charts, the ends of all metrics."""

    series: dict[str, dict[int, float]] = field(default_factory=dict)
    ends: dict[str, _Ends] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    unreadable_lines: int = 0

    def add(self, record: Mapping[str, object]) -> None:
        """Take in one line; a step that was run again after a resume replaces the old one."""
        step = record.get("step")
        if not isinstance(step, int):
            self.unreadable_lines += 1
            return
        if "loss" in record:
            self.steps.add(step)
        for name, value in record.items():
            number = _number(value)
            if name == "step" or number is None:
                continue
            self.ends.setdefault(name, _Ends(number, number)).last = number
            if name.removeprefix("eval/") in _CHARTED:
                self.series.setdefault(name, {})[step] = number


_CHARTED = frozenset(name for chart in CHARTS for name in chart.names)


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run and return its path.

    Raises:
        OSError: the folder cannot be read or written.
    """
    history = _read_history(run_folder / "metrics.jsonl")
    config_path, summary_path = run_folder / "config.toml", run_folder / "summary.json"
    config = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
    summary = read_json(summary_path) if summary_path.exists() else {}
    name = escape(run_folder.resolve().name)
    body = [
        f"<h1>Run {name}</h1>",
        f"<p>{_overview(history)}</p>",
        *_summary_table(summary),
        *_charts(history),
        *_metrics_table(history),
        *([f"<h2>Config</h2>\n<pre>{escape(config)}</pre>"] if config else []),
    ]
    path = run_folder / REPORT
    atomic_write(path, _PAGE.format(title=f"Run {name}", style=_STYLE, body="\n".join(body)))
    return path


def _read_history(path: Path) -> _History:
    history = _History()
    if not path.exists():
        return history
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a run that was killed while it wrote
                history.unreadable_lines += 1
                continue
            history.add(record if isinstance(record, dict) else {})
    return history


def _number(value: object) -> float | None:
    """Return a number, NaN for null, None for what is neither."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _overview(history: _History) -> str:
    if not history.steps:
        return "No optimizer step is recorded."
    first, last = min(history.steps), max(history.steps)
    words = [f"Optimizer steps {first} to {last}, {len(history.steps)} recorded."]
    gaps = sum(not math.isfinite(value) for value in history.series.get("loss", {}).values())
    if gaps:
        words.append(f"Steps whose loss is not finite: {gaps}.")
    if len(history.steps) > MAX_POINTS:
        words.append("Lines are means of neighbouring steps, bands go from least to greatest.")
    if history.unreadable_lines:
        words.append(f"Lines of metrics.jsonl that cannot be read: {history.unreadable_lines}.")
    return " ".join(words)


def _charts(history: _History) -> Iterator[str]:
    drawn = [figure for chart in CHARTS if (figure := _chart(chart, history))]
    if drawn:
        yield '<div class="charts">'
        yield from drawn
        yield "</div>"


def _chart(chart: Chart, history: _History) -> str | None:
    lines = [
        Line(label, [Point(*item) for item in sorted(history.series[name].items())], color, dashed)
        for color, (metric, word) in enumerate(chart.names.items())
        for name, label, dashed in (
            (metric, word, False),
            (f"eval/{metric}", f"{word}, held out", True),
        )
        if name in history.series
    ]
    if not lines:
        return None
    legend = " ".join(
        f'<span class="c{line.color}"><i class="{"dashed" if line.is_dashed else "solid"}"></i>'
        f"{escape(line.label)}</span>"
        for line in lines
    )
    return (
        f'<figure><figcaption><b>{escape(chart.title)}</b> <span class="legend">{legend}</span>'
        f"</figcaption>{line_chart(lines, title=chart.title, x_label='step')}</figure>"
    )


def _summary_table(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    if summary:
        rows = [
            [name, *(_estimate(row.get(moment, {})) for moment in ("before", "after"))]
            for name, row in summary.items()
        ]
        yield "<h2>Before and after</h2>"
        yield _table(["", "before", "after"], rows)
        yield "<p>In brackets: 95 % intervals.</p>"


def _estimate(estimate: Mapping[str, float]) -> str:
    if "value" not in estimate:
        return _NOTHING
    interval = (
        f" [{_shown(estimate['low'])}, {_shown(estimate['high'])}]" if "low" in estimate else ""
    )
    return _shown(estimate["value"]) + interval


def _metrics_table(history: _History) -> Iterator[str]:
    names = dict.fromkeys(name.removeprefix("eval/") for name in history.ends)
    if names:
        rows = [
            [
                name,
                *_end_cells(history.ends.get(name)),
                *_end_cells(history.ends.get(f"eval/{name}")),
            ]
            for name in names
        ]
        yield "<h2>Metrics</h2>"
        yield _table(["", "first", "last", "first, held out", "last, held out"], rows)


def _end_cells(ends: _Ends | None) -> list[str]:
    return [_NOTHING, _NOTHING] if ends is None else [_shown(ends.first), _shown(ends.last)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(
        f"<tr><th>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _shown(value: float | None) -> str:
    if value is None or math.isnan(value):
        return _NOTHING
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2330; --faint: #5b6472; --line: #d9dde3;
  --c0: #0067a5; --c1: #c24e00; }
@media (prefers-color-scheme: dark) { :root { --back: #14181f; --text: #e4e8ee; --faint: #9aa4b2;
  --line: #333b47; --c0: #62b5ec; --c1: #f0a050; } }
@media print { :root { --back: #fff; --text: #000; --faint: #444; --line: #bbb;
  --c0: #0067a5; --c1: #c24e00; } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 1rem; color: var(--faint); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.5rem; margin-top: 1.5rem; }
figure { margin: 0; break-inside: avoid; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; color: var(--faint); }
.legend i { display: inline-block; width: 1.5em; margin-right: .4em; vertical-align: middle;
  border-top: 2px solid; }
.legend i.dashed { border-top-style: dashed; }
.c0 i, .c0 { --c: var(--c0); } .c1 i, .c1 { --c: var(--c1); }
.legend i { border-color: var(--c); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); }
svg .line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 6 4; }
svg .dot { fill: var(--c); }
svg .band { fill: var(--c); opacity: .2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; }
td, tr > th:first-child { white-space: nowrap; }
th { font-weight: 600; } tr > th:first-child { text-align: left; font-weight: 400; }
@media (max-width: 30rem) { svg text { font-size: 15px; } th, td { font-size: 13px; } }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 4px;
  font-size: 13px; }
@media print { pre { white-space: pre-wrap; } }
"""
