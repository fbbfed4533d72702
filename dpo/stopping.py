"""What ends a run early, so that it can go on later: signals and limits of time."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

from dpo.duration import seconds_of
from dpo.errors import InputError
from dpo.progress import Console
from dpo.train_config import TrainConfig

OUT_OF_TIME: Final = 124  # exit code, that of timeout(1)
END_OF_JOB: Final = "SLURM_JOB_END_TIME"  # which Slurm sets in a job: seconds since 1970
SIGNALS: Final = (  # of people, terminals that close, and schedulers before they end a job
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip


class TimeLimit:
    """The moment by which a run is to have done its last step.

    Args:
        config: its ``max_time`` and ``save_before_end``.
        environment: of the process.
        clock: seconds, monotonic: a wall clock that is set meanwhile changes nothing.

    Raises:
        InputError: the end of a job is asked for, and there is none.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._end = clock() + min(_seconds_left(config, environment), default=math.inf)
        self._begun = clock()
        self._longest_step = 0.0

    def begin_step(self) -> None:
        """Hear that a step begins."""
        self._begun = self._clock()

    def end_step(self) -> None:
        """Hear that a step is done, with its evaluation and checkpoint, and the next one begins."""
        self._longest_step = max(self._longest_step, self._clock() - self._begun)
        self.begin_step()

    def leaves_a_step(self) -> bool:
        """Say whether another step, as long as the longest so far, would end in time."""
        return self._clock() + self._longest_step < self._end


def _seconds_left(config: TrainConfig, environment: Mapping[str, str]) -> Iterator[float]:
    if config.max_time is not None:
        yield seconds_of(config.max_time)
    if config.save_before_end is not None:
        end = environment.get(END_OF_JOB, "")
        if not end.isdecimal():
            raise InputError(
                f"train.save_before_end is of a job of Slurm, and {END_OF_JOB} is not set: give "
                "train.max_time, or save_before_end = none"
            )
        yield int(end) - time.time() - seconds_of(config.save_before_end)


@contextmanager
def heeding_signals(
    stop: Callable[[], None], console: Console, *, is_alone: bool = True
) -> Iterator[list[int]]:
    """Call ``stop`` at the first of ``SIGNALS``; a second one of its kind ends the run at once.

    Not so, nor is it told, where the process is one of several (not ``is_alone``): their launcher
    passes on what the system has told them already, or means that another process is gone.

    Yields the signals that came. One that the caller ignores, as nohup does, stays ignored. Python
    heeds signals in the main thread alone: in another one they stay the caller's affair.
    """
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    previous = {
        number: signal.getsignal(number) or signal.SIG_DFL
        for number in (SIGNALS if is_main else ())
    }
    previous = {n: handler for n, handler in previous.items() if handler is not signal.SIG_IGN}

    def heed(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        stop()
        if not is_alone:
            return
        signal.signal(number, previous[signal.Signals(number)])
        with suppress(RuntimeError):  # the console was just writing, and cannot be entered twice
            console.warn(f"{signal.Signals(number).name}: stopping after this step")

    try:
        for number in previous:
            signal.signal(number, heed)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
