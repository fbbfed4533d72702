"""Small plots as inline SVG and HTML, without a script or a file beside them.

Colours come from the page (CSS variables and ``currentColor``), so that one plot serves light and
dark. Texts from the data pass through ``escape``.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo.eval.bootstrap import ConfidenceInterval
from dpo.eval.calibration import ReliabilityBin
from dpo.eval.rewards import HistogramBin, TimeWindow

SQUARE = 240.0  # inner side of the reliability plot
WIDE, HIGH = 400.0, 160.0  # inner size of charts over time


def escape(text: object) -> str:
    """Make a text safe inside HTML and quoted attributes."""
    return html.escape(str(text), quote=True)


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of an interval plot."""

    label: str
    interval: ConfidenceInterval | None
    """None leaves the plot empty; ``text`` says why."""
    text: str
    series: str = "a"
    """Colour: "a" or "b"."""


def interval_plot(bars: Sequence[Bar], *, zero: float | None = None) -> str:
    """Draw estimates with their intervals below each other, on one scale.

    Args:
        bars: the lines.
        zero: a value to mark; None marks nothing.
    """
    known = [bar.interval for bar in bars if bar.interval and math.isfinite(bar.interval.mean)]
    values = [
        value
        for interval in known
        for value in (interval.lower, interval.mean, interval.upper)
        if math.isfinite(value)
    ]
    scale = _Scale.around([*values, *([] if zero is None else [zero])])
    lines = "".join(
        f"<tr><th scope=row>{escape(bar.label)}</th>"
        f"<td class=figure>{escape(bar.text)}</td>"
        f"<td class=plot>{_bar(bar, scale, zero)}</td></tr>"
        for bar in bars
    )
    axis = f"<span>{scale.low:.2f}</span><span>{scale.high:.2f}</span>"
    return (
        f"<table class=intervals><tbody>{lines}</tbody>"
        f"<tfoot><tr><td></td><td></td><td class=axis>{axis}</td></tr></tfoot></table>"
    )


def reliability_plot(bins: Sequence[ReliabilityBin]) -> str:
    """Draw accuracy over confidence; on the diagonal the policy is right as often as it says."""
    marks = []
    for each in bins:
        x, y = each.confidence * SQUARE, (1.0 - each.accuracy.mean) * SQUARE
        if each.accuracy.is_defined:
            top, bottom = (
                (1.0 - end) * SQUARE for end in (each.accuracy.upper, each.accuracy.lower)
            )
            marks.append(_line(x, top, x, bottom, "a"))
        marks.append(
            f'<circle class=a cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{each.count} decisions, '
            f"confidence {each.confidence:.3f}, accuracy {each.accuracy.mean:.3f}</title></circle>"
        )
    diagonal = _line(0.0, SQUARE, SQUARE, 0.0, "faint")
    frame = _frame(SQUARE, SQUARE, ("0", "1"), ("0", "1"), "confidence", "accuracy")
    return _figure(SQUARE, SQUARE, "Accuracy by confidence", frame + diagonal + "".join(marks))


def histogram(bins: Sequence[HistogramBin]) -> str:
    """Draw how many rewards lie in each bin."""
    most = max((each.count for each in bins), default=0) or 1
    width = WIDE / max(len(bins), 1)
    marks = "".join(
        f'<rect class=a x="{index * width + 1:.1f}" y="{HIGH * (1 - each.count / most):.1f}" '
        f'width="{width - 2:.1f}" height="{HIGH * each.count / most:.1f}">'
        f"<title>{each.low:.3g} to {each.high:.3g}: {each.count}</title></rect>"
        for index, each in enumerate(bins)
    )
    ends = (f"{bins[0].low:.2f}", f"{bins[-1].high:.2f}") if bins else ("", "")
    frame = _frame(WIDE, HIGH, ends, ("0", str(most)), "reward", "examples")
    return _figure(WIDE, HIGH, "Distribution of the logged rewards", frame + marks)


def time_plot(windows: Sequence[TimeWindow]) -> str:
    """Draw the mean reward of each window of time."""
    first, last = windows[0].start, windows[-1].end
    scale = _Scale.around([*(window.mean_reward for window in windows), 0.0])
    points = [
        (
            WIDE * ((window.start - first) + (window.end - window.start) / 2) / (last - first),
            HIGH * (1.0 - scale.place(window.mean_reward)),
        )
        for window in windows
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle class=a cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{window.start:%Y-%m-%d}: '
        f"{window.mean_reward:.3f}, {window.count} examples</title></circle>"
        for (x, y), window in zip(points, windows, strict=True)
    )
    level = HIGH * (1.0 - scale.place(0.0))
    marks = _line(0.0, level, WIDE, level, "faint") + f'<polyline class=a points="{path}"/>' + dots
    ends = (f"{first:%Y-%m-%d}", f"{last:%Y-%m-%d}")
    heights = (f"{scale.low:.2f}", f"{scale.high:.2f}")
    frame = _frame(WIDE, HIGH, ends, heights, "", "mean reward")
    return _figure(WIDE, HIGH, "Mean logged reward over time", frame + marks)


def confusion_table(names: Sequence[str], rows: Sequence[Sequence[int]]) -> str:
    """Draw a confusion matrix as a table, darker where a row's share is larger."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in names)
    body = ""
    for name, row in zip(names, rows, strict=True):
        total = max(sum(row), 1)
        cells = "".join(f'<td style="--share:{count / total:.3f}">{count}</td>' for count in row)
        body += f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>"
    return (
        "<table class=confusion><caption>Rows: logged action. Columns: the policy's action."
        f"</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float

    @staticmethod
    def around(values: Sequence[float]) -> "_Scale":
        """Cover the values with a margin; [0, 1] if there are none."""
        if not values:
            return _Scale(0.0, 1.0)
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 0.5
        return _Scale(low - margin, high + margin)

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


def _bar(bar: Bar, scale: _Scale, zero: float | None) -> str:
    """Draw one interval, stretched to the width it is given."""
    marks = ""
    if zero is not None:
        x = 100.0 * scale.place(zero)
        marks += _line(x, 0.0, x, 20.0, "faint")
    interval = bar.interval
    if interval and interval.is_defined:
        low, high = 100.0 * scale.place(interval.lower), 100.0 * scale.place(interval.upper)
        marks += _line(low, 10.0, high, 10.0, bar.series)
    if interval and math.isfinite(interval.mean):
        x = 100.0 * scale.place(interval.mean)
        marks += _line(x, 4.0, x, 16.0, f"{bar.series} thick")
    return (
        '<svg viewBox="0 0 100 20" preserveAspectRatio="none" role=img '
        f'aria-label="{escape(bar.label)}: {escape(bar.text)}">{marks}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return (
        f'<line class="{style}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" '
        'vector-effect="non-scaling-stroke"/>'
    )


def _frame(
    width: float,
    height: float,
    x_ends: tuple[str, str],
    y_ends: tuple[str, str],
    x_name: str,
    y_name: str,
) -> str:
    """Draw both axes with the values at their ends and their names."""
    below = height + 16.0
    return (
        _line(0.0, height, width, height, "axis")
        + _line(0.0, 0.0, 0.0, height, "axis")
        + f'<text x="0" y="{below}">{escape(x_ends[0])}</text>'
        + f'<text x="{width}" y="{below}" text-anchor=end>{escape(x_ends[1])}</text>'
        + f'<text x="{width / 2}" y="{below}" text-anchor=middle>{escape(x_name)}</text>'
        + f'<text x="-6" y="{height}" text-anchor=end>{escape(y_ends[0])}</text>'
        + f'<text x="-6" y="10" text-anchor=end>{escape(y_ends[1])}</text>'
        + f'<text transform="translate(-10 {height / 2}) rotate(-90)" text-anchor=middle>'
        f"{escape(y_name)}</text>"
    )


def _figure(width: float, height: float, label: str, marks: str) -> str:
    box = f"-44 -8 {width + 56} {height + 32}"
    return (
        f'<figure><svg viewBox="{box}" role=img aria-label="{escape(label)}" '
        f'style="max-width:{1.4 * width:.0f}px">{marks}</svg><figcaption>{escape(label)}'
        "</figcaption></figure>"
    )
