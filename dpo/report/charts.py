"""The charts of the pages, from the records of runs.

To add one of metrics, add a line to ``CHARTS``.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dpo.report.page import COLORS, ERROR, INTERVAL, figure, key
from dpo.report.record import PARTS, DataSide, EvalPair, History, Record
from dpo.svg import Bars, Dot, Line, Point, histogram, line_chart, scatter, tick_step

_BINS = 30  # of a histogram, about
_MOST_DOTS = 500  # of a scatter


@dataclass(frozen=True, slots=True)
class Chart:
    """Metrics that share axes; those of the evaluations are drawn with them, dashed.

    Attributes:
        title: of the figure.
        names: metric to its word in the legend.
        is_averaged: whether a moving average says more than the single steps.
    """

    title: str
    names: Mapping[str, str]
    is_averaged: bool = True


CHARTS = (
    Chart("Loss", {"loss": "loss"}),
    Chart("Reward margin", {"rewards/margin": "margin"}),
    Chart("Reward accuracy", {"rewards/accuracy": "accuracy"}),
    Chart(
        "Log-prob of the answers (nats)",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    Chart("KL to the reference (nats a token)", {"kl/k3_tok": "k3 of the answers given"}),
    Chart("Gradient norm", {"grad_norm": "norm before clipping"}),
    Chart("Update by weights", {"health/update_ratio": "norm of the update / norm of the weights"}),
    Chart("Learning rate", {"learning_rate": "rate"}, is_averaged=False),
    Chart("Tokens per second", {"perf/tokens_per_s": "tokens/s"}),
    Chart("Peak memory (MiB)", {"mem/peak_mib": "peak so far"}, is_averaged=False),
)
SERIES = frozenset(
    f"{name}{ending}" for chart in CHARTS for name in chart.names for ending in ("", ERROR)
)


def charts_of_run(history: History) -> Iterator[str]:
    """Yield a figure for each chart of which something is recorded."""
    for chart in CHARTS:
        lines = [
            line
            for color, (name, word) in enumerate(chart.names.items())
            for line in _lines(history, name, word, color, is_averaged=chart.is_averaged)
        ]
        if lines:
            legend = [_key(line) for line in lines]
            svg = line_chart(lines, title=chart.title, x_label="step")
            yield figure(chart.title, svg, legend)


def charts_of_runs(records: Sequence[Record], labels: Sequence[str]) -> Iterator[str]:
    """Yield a figure for each charted metric, with a line for each run and one of its held-out."""
    for chart in CHARTS:
        for name, word in chart.names.items():
            lines = [
                Line(
                    line.label,
                    [Point(point.step, point.value) for point in line.points],
                    color % COLORS,
                    line.is_dashed,
                    is_averaged=line.is_averaged,
                    is_hidden=line.is_averaged,
                )
                for color, (record, label) in enumerate(zip(records, labels, strict=True))
                for line in _lines(
                    record.history, name, label, color, is_averaged=chart.is_averaged
                )
            ]
            if lines:
                title = chart.title if len(chart.names) == 1 else f"{chart.title}: {word}"
                yield figure(title, line_chart(lines, title=title, x_label="step"))


def margins(pairs: Sequence[EvalPair]) -> str:
    """Return the histogram of the margins, and of those before if they differ among themselves."""
    after = [pair.margin for pair in pairs]
    before = [pair.margin_before for pair in pairs if pair.margin_before is not None]
    has_before = len(set(before)) > 1
    edges = _edges([*after, *before] if has_before else [0.0, *after])
    wrong = [value for value in after if value < 0]
    right = [value for value in after if value >= 0]
    series = [
        Bars("below 0: the rejected answer has more reward", edges, _counts(wrong, edges), 1),
        Bars("above 0: the chosen answer has more", edges, _counts(right, edges), 0),
    ]
    if has_before:
        series.insert(0, Bars("before", edges, _counts(before, edges), 7))
    title = "Margins of the held-out pairs"
    svg = histogram(series, title=title, x_label="reward of chosen less that of rejected")
    return figure(title, svg, [key(bars.label, bars.color, "block") for bars in series])


def lengths_against_margins(pairs: Sequence[EvalPair]) -> str:
    """Return dots of how much longer the chosen answer is, and of the margin."""
    every = math.ceil(len(pairs) / _MOST_DOTS)
    dots = [
        Dot(
            pair.chosen_tokens - pair.rejected_tokens,
            pair.margin,
            f"{pair.id}: {pair.chosen_tokens} and {pair.rejected_tokens} tokens, "
            f"margin {pair.margin:.4g}",
            color=int(pair.margin < 0),
        )
        for pair in pairs[::every]
    ]
    title = "Margin by length"
    svg = scatter(dots, title=title, x_label="tokens of chosen less those of rejected")
    return figure(title, svg)


def lengths(side: DataSide, title: str) -> str:
    """Return the histogram of the lengths of prompts, chosen and rejected answers."""
    series = [
        Bars(part, side.edges, side.counts[part], color)
        for part, color in zip(PARTS, (2, 0, 1), strict=True)
    ]
    svg = histogram(series, title=title, x_label="tokens")
    return figure(title, svg, [key(bars.label, bars.color, "block") for bars in series])


def frontier(
    records: Sequence[Record], labels: Sequence[str], *, x_name: str, y_name: str, note: str
) -> str | None:
    """Return a dot for each run that has both held-out metrics, or None if none has.

    Args:
        records: of the runs.
        labels: what is written at each dot.
        x_name: metric that rises to the right.
        y_name: metric that rises to the top.
        note: what the labels are.
    """
    dots = []
    for color, (record, label) in enumerate(zip(records, labels, strict=True)):
        ends = record.ends()
        if x_name in ends and y_name in ends:
            x, y = ends[x_name], ends[y_name]
            error = INTERVAL * ends.get(f"{y_name}{ERROR}", 0.0)
            text = f"{record.name}: {y:.4g} at {x:.4g}"
            dots.append(Dot(x, y, text, color % COLORS, label, error))
    title = "Held-out accuracy against KL to the reference"
    if not dots:
        return None
    svg = scatter(dots, title=title, x_label="KL to the reference, nats a token")
    return figure(title, svg, [escape(note)] if note else [])


def _lines(
    history: History, name: str, label: str, color: int, *, is_averaged: bool
) -> Iterator[Line]:
    """Yield the line of a metric, and that of its evaluations, dashed, with their intervals."""
    if name in history.series:
        yield Line(label, _points(history, name), color, is_averaged=is_averaged)
    if f"eval/{name}" in history.series:
        points = _points(history, f"eval/{name}")
        yield Line(f"{label}, held out", points, color, is_dashed=True)


def _points(history: History, name: str) -> list[Point]:
    errors = history.series.get(f"{name}{ERROR}", {}) if name.startswith("eval/") else {}
    return [
        Point(step, value, INTERVAL * errors.get(step, 0.0))
        for step, value in sorted(history.series[name].items())
    ]


def _key(line: Line) -> str:
    return key(line.label, line.color, "dashed" if line.is_dashed else "solid")


def _edges(values: Sequence[float]) -> list[float]:
    """Return the edges of about ``_BINS`` bins of a round width that hold all values, 0 if near."""
    low, high = min(values), max(values)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    width = tick_step(low, high, count=_BINS)
    first, last = math.floor(low / width), math.floor(high / width) + 1
    return [index * width for index in range(first, last + 1)]


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Count the values in each bin, which includes its lower edge."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    return counts
