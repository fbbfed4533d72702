"""What a person sees while something runs: a live bar on a terminal, an occasional line elsewhere.

Everything goes to stderr, so that stdout holds results only. A library function shows nothing
unless it is given a ``Console``.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TextIO, TypeVar

REFRESH_SECONDS = 0.1  # a terminal is redrawn at most ten times a second
LINE_SECONDS = 10.0  # a log file gets at most one line in this time
RATE_SAMPLES = 50  # draws over which the rate is taken: recent enough to follow a change of pace
BAR_CELLS = 20

Item = TypeVar("Item")


class Console:
    """Where progress and notes are shown.

    Args:
        stream: where to write; stderr as it is at the time of the call if not given.
        quiet: show nothing but warnings.
        clock: seconds, monotonic.

    Attributes:
        told: every line so far, shown or not.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._clock = clock
        self._is_live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._has_color = self._is_live and not os.environ.get("NO_COLOR")
        self._cells = _bar_cells(self._stream.encoding)
        self._bars: list[Bar] = []  # the last one is on the screen
        self.told: list[str] = []

    def say(self, text: str) -> None:
        """Write a line, above the bar if there is one."""
        self.told.append(text)
        if not self._quiet:
            self._write_line(text)

    def warn(self, text: str) -> None:
        """Write a line that even a quiet console shows."""
        self.told.append(text)
        self._write_line(text)

    def _write_line(self, text: str) -> None:
        self._write(f"\r\x1b[K{text}\n" if self._is_drawn() else f"{text}\n")
        if self._is_drawn():
            self._draw(self._bars[-1])

    @contextmanager
    def bar(
        self, label: str, total: int | None = None, *, unit: str = "", start: int = 0
    ) -> Iterator["Bar"]:
        """Show a bar while the block runs; one inside another is shown in its place.

        Args:
            label: what is being done.
            total: how many units there are, if that is known.
            unit: name of a unit, in the plural.
            start: units done before, as in a resumed run; the rate does not count them.
        """
        bar = Bar(self, label, total=total, unit=unit, done=start)
        self._bars.append(bar)
        bar.samples.append(_Sample(self._clock(), start))
        bar.started = bar.shown = self._clock()
        if self._is_drawn():
            self._draw(bar)
        is_done = False
        try:
            yield bar
            is_done = True
        finally:
            self._close(bar, is_done=is_done)

    def refresh(self, bar: "Bar") -> None:
        """Show the bar's state, unless it was shown a moment ago or something covers it."""
        if self._quiet or bar is not self._bars[-1]:
            return
        wait = REFRESH_SECONDS if self._is_live else LINE_SECONDS
        if self._clock() - bar.shown >= wait:
            self._show(bar)

    def _show(self, bar: "Bar") -> None:
        bar.shown = self._clock()
        bar.samples.append(_Sample(bar.shown, bar.done))
        if self._is_live:
            self._draw(bar)
        else:
            self._write(_line(bar, bar.shown) + "\n")

    def _close(self, bar: "Bar", *, is_done: bool) -> None:
        is_inner = len(self._bars) > 1
        if is_inner and self._is_drawn():
            self._bars.pop()
            self._draw(self._bars[-1])
            return
        if not self._quiet and (self._is_live or (is_done and self._is_news(bar))):
            self._show(bar)
        if self._is_drawn():
            self._write("\n")
        self._bars.pop()

    def _is_news(self, bar: "Bar") -> bool:
        """Tell whether a log file lacks the end of a bar; of one inside another if it was long."""
        was_shown, is_inner = len(bar.samples) > 1, len(self._bars) > 1
        return not is_inner if not was_shown else bar.samples[-1].done != bar.done

    def _is_drawn(self) -> bool:
        return self._is_live and not self._quiet and bool(self._bars)

    def _draw(self, bar: "Bar") -> None:
        columns = _columns(self._stream)
        text = _line(bar, self._clock(), cells=self._cells)[: columns - 1]
        if self._has_color:
            text = f"\x1b[36m{text[: len(bar.label)]}\x1b[0m{text[len(bar.label) :]}"
        self._write(f"\r\x1b[K{text}")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a run outlives its terminal, and the disk of its log
            self._stream.write(text)
            self._stream.flush()


class SilentConsole(Console):
    """Shows nothing, not even warnings: for the processes beside one that speaks for all."""

    def _write(self, text: str) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Sample:
    seconds: float
    done: int


@dataclass(slots=True, eq=False)
class Bar:
    """One running task; made by ``Console.bar``."""

    console: Console
    label: str
    total: int | None
    unit: str
    done: int
    status: str = ""
    started: float = 0.0
    shown: float = 0.0
    samples: deque[_Sample] = field(default_factory=lambda: deque(maxlen=RATE_SAMPLES))

    def update(self, done: int, total: int | None = None, *, status: str | None = None) -> None:
        """Set how many units are done, of how many, and the text behind them."""
        self.done = done
        self.total = self.total if total is None else total
        self.status = self.status if status is None else status
        self.console.refresh(self)

    def advance(self, units: int = 1, *, status: str | None = None) -> None:
        """Count further units as done."""
        self.update(self.done + units, status=status)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items; each counts as done when the next is asked for."""
        for item in items:
            yield item
            self.advance()


def _line(bar: Bar, seconds: float, *, cells: str | None = None) -> str:
    """Label, share, count, time, rate and status; with ``cells`` (empty, full) also the bar."""
    parts = [bar.label]
    if bar.total:
        share = min(bar.done / bar.total, 1.0)
        parts.append(f"{share:4.0%}")
        if cells:
            full = int(share * BAR_CELLS)
            parts.append(f"|{cells[1] * full}{cells[0] * (BAR_CELLS - full)}|")
    parts.append(f"{bar.done}/{bar.total}" if bar.total is not None else f"{bar.done}")
    rate = _rate(bar, seconds)
    times = _clock_time(seconds - bar.started)
    if bar.total is not None and rate > 0 and bar.done < bar.total:
        times += f"<{_clock_time((bar.total - bar.done) / rate)}"
    pace = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    parts.append(f"[{times}, {pace} {bar.unit or 'it'}/s]")
    return " ".join([*parts, bar.status] if bar.status else parts)


def _rate(bar: Bar, seconds: float) -> float:
    first = bar.samples[0]
    elapsed = seconds - first.seconds
    return (bar.done - first.done) / elapsed if elapsed > 0 else 0.0


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _bar_cells(encoding: str | None) -> str:
    try:
        "░█".encode(encoding or "ascii")
    except UnicodeEncodeError:
        return "-#"
    return "░█"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
