"""Where the time of optimizer steps goes, taken without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

Mark = float | torch.cuda.Event


class StepClock:
    """Times the parts of steps; a step is always in one of them, so they add up to it.

    On a CUDA device a mark is an event in the stream of its work: a part is what the stream spends
    between two, and the host, which runs ahead, is not asked. Elsewhere it is the host's clock.

    Attributes:
        is_running: whether a step is being timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.is_running = device, False
        self._marks: list[tuple[str | None, Mark]] = []  # what begins, None for what is not timed

    @contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Time a ``with`` block, which begins in ``part``."""
        self.is_running = True
        self.begin(part)
        try:
            yield
        finally:
            self._marks.append((None, self._now()))
            self.is_running = False

    def begin(self, part: str) -> None:
        """Count what follows as ``part``, if a step is being timed."""
        if self.is_running:
            self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last reading; waits for the last mark."""
        marks, self._marks = self._marks, []
        if marks and isinstance(last := marks[-1][1], torch.cuda.Event):
            last.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (part, start), (_, end) in pairwise(marks):
            if part is not None:
                seconds[part] += _seconds(start, end)
        return dict(seconds)

    def _now(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(start.elapsed_time(end)) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - start
