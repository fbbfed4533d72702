"""Charts as SVG text, for a page whose style sheet colours the classes ``c0``, ``c1``, ...

Lines, histograms and scattered dots. A series of many points is drawn as the mean of neighbouring
points with a band from their least to their greatest. Where nothing is finite is a gap.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 62, 420, 10, 184  # the plot within the picture
MAX_POINTS = 200  # drawn per line
MAX_DOTS = 30  # a line of so few points shows each of them
_AVERAGED_SHARE = 10  # a moving average is over a tenth of the points
_TINY = 1e-2  # values below are written with a power of ten
_LETTER_WIDTH, _LINE_HEIGHT = 6.2, 13.0  # of the texts at dots, about


class Point(NamedTuple):
    """A value at a step, and the half width of its interval."""

    step: float
    value: float
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Line:
    """A series.

    Attributes:
        label: its word in the legend.
        points: in the order of their steps.
        color: number of its class.
        is_dashed: how it is drawn.
        is_averaged: draw a moving average over the line, which stays, faintly.
        is_hidden: draw the moving average alone.
    """

    label: str
    points: Sequence[Point]
    color: int = 0
    is_dashed: bool = False
    is_averaged: bool = False
    is_hidden: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """Counts between edges, of which there is one more."""

    label: str
    edges: Sequence[float]
    counts: Sequence[int]
    color: int = 0


@dataclass(frozen=True, slots=True)
class Dot:
    """A dot, what a pointer over it shows, and a text beside it; ``error`` as in ``Point``."""

    x: float
    y: float
    title: str
    color: int = 0
    text: str = ""
    error: float = 0.0


class _Bucket(NamedTuple):
    step: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True, slots=True)
class _Axes:
    """Maps steps and values to the picture."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        """Return the place of a step from the left."""
        return LEFT + (step - self.first) / (self.last - self.first) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        """Return the place of a value from the top."""
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)


def line_chart(lines: Sequence[Line], *, title: str, x_label: str) -> str:
    """Draw series on shared axes."""
    averaged = [_buckets(moving_average(line.points)) if line.is_averaged else [] for line in lines]
    plain = [[] if line.is_hidden else _buckets(line.points) for line in lines]
    seen = [bucket for buckets in (*plain, *averaged) for bucket in buckets]
    xs = [bucket.step for bucket in seen]
    axes = _axes(xs, [bucket.low for bucket in seen], [bucket.high for bucket in seen])
    drawn = zip(lines, plain, averaged, strict=True)
    parts = [part for each in drawn for part in _draw(*each, axes)]
    return _picture([*_grid(axes, x_label, least=1.0), *parts], title)


def histogram(series: Sequence[Bars], *, title: str, x_label: str) -> str:
    """Draw counts as bars, those of several series over each other."""
    edges = [edge for bars in series for edge in bars.edges]
    most = max((count for bars in series for count in bars.counts), default=0)
    axes = _Axes(*_apart(min(edges, default=0.0), max(edges, default=1.0)), 0.0, most * 1.05 or 1.0)
    parts = [part for bars in series for part in _draw_bars(bars, axes)]
    return _picture([*_grid(axes, x_label), *parts], title)


def scatter(dots: Sequence[Dot], *, title: str, x_label: str) -> str:
    """Draw dots, whose places are finite, and their texts beside them."""
    lows, highs = [dot.y - dot.error for dot in dots], [dot.y + dot.error for dot in dots]
    plain = _axes([dot.x for dot in dots], lows, highs)
    side = (plain.last - plain.first) * 0.05
    axes = _Axes(plain.first - side, plain.last + side, plain.low, plain.high)
    parts = [part for dot in dots for part in _draw_dot(dot, axes)]
    return _picture([*_grid(axes, x_label), *parts, *_texts(dots, axes)], title)


def tick_step(low: float, high: float, *, count: int = 5) -> float:
    """Return 1, 2 or 5 times a power of ten that cuts [low, high] into about ``count`` parts."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def moving_average(points: Sequence[Point]) -> list[Point]:
    """Return the mean of the finite values around each point, a tenth of all; gaps stay."""
    half = len(points) // (2 * _AVERAGED_SHARE)
    sums, counts = [0.0], [0]
    for point in points:
        is_seen = math.isfinite(point.value)
        sums.append(sums[-1] + (point.value if is_seen else 0.0))
        counts.append(counts[-1] + is_seen)
    averaged = []
    for index, point in enumerate(points):
        first, last = max(index - half, 0), min(index + half + 1, len(points))
        seen = counts[last] - counts[first]
        is_gap = not math.isfinite(point.value)
        value = math.nan if is_gap else (sums[last] - sums[first]) / seen
        averaged.append(Point(point.step, value))
    return averaged


def _picture(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _buckets(points: Sequence[Point]) -> list[_Bucket]:
    """Gather neighbours so that at most ``MAX_POINTS`` are left."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), max(size, 1))]
    return [_bucket(group) for group in groups]


def _bucket(points: Sequence[Point]) -> _Bucket:
    step = sum(point.step for point in points) / len(points)
    seen = [point for point in points if math.isfinite(point.value)]
    if not seen:
        return _Bucket(step, math.nan, math.nan, math.nan)
    return _Bucket(
        step,
        min(point.value - point.error for point in seen),
        math.fsum(point.value for point in seen) / len(seen),
        max(point.value + point.error for point in seen),
    )


def _axes(xs: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> _Axes:
    low = min(filter(math.isfinite, lows), default=0.0)
    high = max(filter(math.isfinite, highs), default=0.0)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return _Axes(*_apart(min(xs, default=0.0), max(xs, default=0.0)), low - pad, high + pad)


def _apart(first: float, last: float) -> tuple[float, float]:
    """Return two ends, one to either side of a single place."""
    if last > first:
        return first, last
    side = abs(first) * 0.05 if 0 < abs(first) < 1 else 1.0
    return first - side, last + side


def _grid(axes: _Axes, x_label: str, *, least: float = 0.0) -> Iterator[str]:
    for value, text in _ticks(axes.low, axes.high):
        y = axes.y(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    for step, text in _ticks(axes.first, axes.last, least=least):
        x = axes.x(step)
        yield f'<path class="grid" d="M{x:.1f} {BOTTOM}v4"/>'
        yield f'<text x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{text}</text>'
    middle = (LEFT + RIGHT) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'


def _ticks(low: float, high: float, *, least: float = 0.0) -> Iterator[tuple[float, str]]:
    """Yield round numbers within [low, high], ``least`` apart or more, with short texts."""
    step = max(tick_step(low, high), least)
    if max(abs(low), abs(high)) < _TINY:
        power = math.floor(math.log10(max(abs(low), abs(high))) + 1e-9)
        for value, text in _ticks(low / 10.0**power, high / 10.0**power):
            yield value * 10.0**power, text if float(text) == 0 else f"{text}e{power}"
        return
    size, letter = next(
        (size, letter)
        for size, letter in ((1e6, "M"), (1e3, "k"), (1.0, ""))
        if size == 1.0 or (step >= size / 10 and max(abs(low), abs(high)) >= 10 * size)
    )
    decimals = max(0, -math.floor(math.log10(step / size) + 1e-9))
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield index * step, f"{index * step / size:.{decimals}f}{letter if index else ''}"


def _draw(
    line: Line, plain: Sequence[_Bucket], averaged: Sequence[_Bucket], axes: _Axes
) -> Iterator[str]:
    dash = " dashed" if line.is_dashed else ""
    raw = " raw" if line.is_averaged else ""
    yield f'<g class="c{line.color}">'
    for part in _parts(plain):
        if any(bucket.low < bucket.high for bucket in part):
            upper = [(bucket.step, bucket.high) for bucket in part]
            lower = [(bucket.step, bucket.low) for bucket in reversed(part)]
            yield f'<path class="band" d="{_path([*upper, *lower], axes)}Z"/>'
        yield f'<path class="line{raw}{dash}" d="{_centre(part, axes)}"/>'
        if len(part) == 1 or (len(line.points) <= MAX_DOTS and not line.is_averaged):
            for bucket in part:
                x, y = axes.x(bucket.step), axes.y(bucket.mean)
                yield f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
    for part in _parts(averaged):
        yield f'<path class="line{dash}" d="{_centre(part, axes)}"/>'
    yield "</g>"


def _parts(buckets: Sequence[_Bucket]) -> Iterator[list[_Bucket]]:
    """Yield the runs of buckets between gaps."""
    for is_seen, run in groupby(buckets, key=lambda bucket: math.isfinite(bucket.mean)):
        if is_seen:
            yield list(run)


def _centre(part: Sequence[_Bucket], axes: _Axes) -> str:
    return _path([(bucket.step, bucket.mean) for bucket in part], axes)


def _path(points: Sequence[tuple[float, float]], axes: _Axes) -> str:
    return "M" + "L".join(f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in points)


def _draw_bars(bars: Bars, axes: _Axes) -> Iterator[str]:
    yield f'<g class="c{bars.color}">'
    outline = [(bars.edges[0], 0.0)]
    for (left, right), count in zip(pairwise(bars.edges), bars.counts, strict=True):
        outline += [(left, count), (right, count)]
        if count:
            x, y = axes.x(left), axes.y(count)
            size = f'width="{axes.x(right) - x:.1f}" height="{BOTTOM - y:.1f}"'
            shown = escape(f"{left:.4g} to {right:.4g}: {count:,} {bars.label}")
            yield f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" {size}><title>{shown}</title></rect>'
    yield f'<path class="line outline" d="{_path([*outline, (bars.edges[-1], 0.0)], axes)}"/></g>'


def _draw_dot(dot: Dot, axes: _Axes) -> Iterator[str]:
    x, y = axes.x(dot.x), axes.y(dot.y)
    yield f'<g class="c{dot.color}">'
    if dot.error:
        top, bottom = axes.y(dot.y + dot.error), axes.y(dot.y - dot.error)
        yield f'<path class="line whisker" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>'
    size = 4 if dot.text else 2
    yield f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{size}">'
    yield f"<title>{escape(dot.title)}</title></circle></g>"


def _texts(dots: Sequence[Dot], axes: _Axes) -> Iterator[str]:
    """Write the texts of dots beside them, from the top down, so that none covers anything."""
    taken = [(axes.x(dot.x) - 5, axes.x(dot.x) + 5, axes.y(dot.y) + 4) for dot in dots]
    for dot in sorted((dot for dot in dots if dot.text), key=lambda dot: -dot.y):
        x, y, width = axes.x(dot.x), axes.y(dot.y) + 4, _LETTER_WIDTH * len(dot.text)
        is_left = x + 8 + width > WIDTH
        left = x - 8 - width if is_left else x + 8
        beside = [place for first, last, place in taken if left < last and first < left + width]
        while covered := [place for place in beside if abs(y - place) < _LINE_HEIGHT]:
            y = max(covered) + _LINE_HEIGHT
        taken.append((left, left + width, y))
        anchor = f'x="{x - 8:.1f}" text-anchor="end"' if is_left else f'x="{x + 8:.1f}"'
        color = f'class="label c{dot.color}"'
        yield f'<text {color} {anchor} y="{y:.1f}">{escape(dot.text)}</text>'
