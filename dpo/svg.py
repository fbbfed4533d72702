"""Line charts as SVG text, for a page whose style sheet colours the classes ``c0``, ``c1``, ...

A series of many points is drawn as the mean of neighbouring points with a band from their least to
their greatest. Where nothing is finite is a gap.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import NamedTuple

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 420, 10, 184  # the plot within the picture
MAX_POINTS = 200  # drawn per line
MAX_DOTS = 30  # a line of so few points shows each of them


class Point(NamedTuple):
    """A value at a step."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class Line:
    """A series in the order of its steps, its word in the legend and the number of its colour."""

    label: str
    points: Sequence[Point]
    color: int = 0
    is_dashed: bool = False


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
    drawn = [_buckets(line.points) for line in lines]
    axes = _axes([bucket for buckets in drawn for bucket in buckets])
    parts = [*_grid(axes, x_label)]
    for line, buckets in zip(lines, drawn, strict=True):
        parts += _draw(line, buckets, axes)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def tick_step(low: float, high: float, *, count: int = 5) -> float:
    """Return 1, 2 or 5 times a power of ten that cuts [low, high] into about ``count`` parts."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _buckets(points: Sequence[Point]) -> list[_Bucket]:
    """Gather neighbours so that at most ``MAX_POINTS`` are left."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), max(size, 1))]
    return [_bucket(group) for group in groups]


def _bucket(points: Sequence[Point]) -> _Bucket:
    step = sum(point.step for point in points) / len(points)
    values = [point.value for point in points if math.isfinite(point.value)]
    if not values:
        return _Bucket(step, math.nan, math.nan, math.nan)
    return _Bucket(step, min(values), math.fsum(values) / len(values), max(values))


def _axes(buckets: Sequence[_Bucket]) -> _Axes:
    seen = [bucket for bucket in buckets if math.isfinite(bucket.mean)]
    steps = [bucket.step for bucket in buckets] or [0.0]
    low = min((bucket.low for bucket in seen), default=0.0)
    high = max((bucket.high for bucket in seen), default=0.0)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    side = 0 if max(steps) > min(steps) else 1
    return _Axes(min(steps) - side, max(steps) + side, low - pad, high + pad)


def _grid(axes: _Axes, x_label: str) -> Iterator[str]:
    for value, text in _ticks(axes.low, axes.high):
        y = axes.y(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    for step, text in _ticks(axes.first, axes.last, least=1.0):
        x = axes.x(step)
        yield f'<path class="grid" d="M{x:.1f} {BOTTOM}v4"/>'
        yield f'<text x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{text}</text>'
    middle = (LEFT + RIGHT) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'


def _ticks(low: float, high: float, *, least: float = 0.0) -> Iterator[tuple[float, str]]:
    """Yield round numbers within [low, high], ``least`` apart or more, with short texts."""
    step = max(tick_step(low, high), least)
    size, letter = next(
        (size, letter)
        for size, letter in ((1e6, "M"), (1e3, "k"), (1.0, ""))
        if size == 1.0 or (step >= size / 10 and max(abs(low), abs(high)) >= 10 * size)
    )
    decimals = max(0, -math.floor(math.log10(step / size) + 1e-9))
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield index * step, f"{index * step / size:.{decimals}f}{letter if index else ''}"


def _draw(line: Line, buckets: Sequence[_Bucket], axes: _Axes) -> Iterator[str]:
    dash = " dashed" if line.is_dashed else ""
    yield f'<g class="c{line.color}">'
    for is_seen, run in groupby(buckets, key=lambda bucket: math.isfinite(bucket.mean)):
        if not is_seen:
            continue
        part = list(run)
        if any(bucket.low < bucket.high for bucket in part):
            upper = [(bucket.step, bucket.high) for bucket in part]
            lower = [(bucket.step, bucket.low) for bucket in reversed(part)]
            yield f'<path class="band" d="{_path([*upper, *lower], axes)}Z"/>'
        centre = [(bucket.step, bucket.mean) for bucket in part]
        yield f'<path class="line{dash}" d="{_path(centre, axes)}"/>'
        if len(part) == 1 or len(line.points) <= MAX_DOTS:
            for step, value in centre:
                x, y = axes.x(step), axes.y(value)
                yield f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
    yield "</g>"


def _path(points: Sequence[tuple[float, float]], axes: _Axes) -> str:
    return "M" + "L".join(f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in points)
