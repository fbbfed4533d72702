"""Spans of time, and what ends a run early."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.duration import seconds_of
from dpo.errors import InputError
from dpo.progress import Console
from dpo.stopping import SIGNALS, TimeLimit, heeding_signals
from dpo.train_config import TrainConfig


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


# --- time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("2h30m", 9000), ("1d", 86400), ("1d1h1m1s", 90061), ("03m", 180)],
)
def test_span_of_time_is_read_by_its_units(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_span_of_time_is_the_sum_of_its_parts(d: int, h: int, m: int, s: int) -> None:
    assert seconds_of(f"{d}d{h}h{m}m{s}s") == ((d * 24 + h) * 60 + m) * 60 + s


@pytest.mark.parametrize(
    "text", ["", "90", "0s", "1.5h", "-1s", "1m1h", "1 h", "٣s", "9" * 99 + "s"]
)
def test_what_is_no_span_of_time_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a span of time such as 90s, 15m, 2h30m or 1d"):
        seconds_of(text)


@pytest.mark.parametrize("name", ["max_time", "save_before_end"])
def test_faulty_span_is_refused_by_its_option(name: str) -> None:
    with pytest.raises(InputError, match=rf"^train\.{name}: expected a span of time"):
        TrainConfig(**{name: "soon"})  # type: ignore[arg-type]  # of one of two options


def test_limit_leaves_a_step_while_one_as_long_as_the_longest_ends_in_time() -> None:
    clock = Clock()
    limit = TimeLimit(TrainConfig(max_time="10s"), environment={}, clock=clock)
    clock.seconds += 4  # the loading is no step
    limit.begin_step()
    left = []
    for seconds in (1.0, 2.0, 0.5, 0.4, 0.2):
        clock.seconds += seconds
        limit.end_step()
        left.append(limit.leaves_a_step())
    # After 5, 7, 7.5, 7.9 and 8.1 seconds; a step may last 1, then 2 seconds, the limit is at 10.
    assert left == [True, True, True, True, False]


def test_run_without_limit_always_has_a_step_left() -> None:
    clock = Clock()
    limit = TimeLimit(TrainConfig(), environment={}, clock=clock)
    clock.seconds += 1e9
    assert limit.leaves_a_step()


def test_limit_is_so_long_before_the_end_of_the_job() -> None:
    clock = Clock()
    environment = {"SLURM_JOB_END_TIME": f"{int(time.time()) + 600}"}
    limit = TimeLimit(TrainConfig(save_before_end="5m"), environment=environment, clock=clock)
    clock.seconds += 298
    assert limit.leaves_a_step()
    clock.seconds += 4
    assert not limit.leaves_a_step()


def test_earlier_of_two_limits_counts() -> None:
    clock = Clock()
    config = TrainConfig(save_before_end="5m", max_time="1m")
    environment = {"SLURM_JOB_END_TIME": f"{int(time.time()) + 600}"}
    limit = TimeLimit(config, environment=environment, clock=clock)
    clock.seconds += 61
    assert not limit.leaves_a_step()


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_END_TIME": "Unknown"}])
def test_end_of_a_job_that_there_is_not_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"SLURM_JOB_END_TIME is not set: give train\.max_time"):
        TimeLimit(TrainConfig(save_before_end="5m"), environment=environment)


# --- signals ------------------------------------------------------------------------------------


@pytest.fixture
def untouched() -> Iterator[None]:
    """Handlers as they were, whatever a test does."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # whoever started us may ignore some
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_the_run_and_is_told(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    stops: list[None] = []
    with heeding_signals(lambda: stops.append(None), Console()) as received:
        os.kill(os.getpid(), number)
    assert (received, len(stops)) == ([number], 1)
    assert capsys.readouterr().err == f"{number.name}: stopping after this step\n"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_that_the_caller_ignores_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with heeding_signals(lambda: pytest.fail("it was heeded"), Console()) as received:
        os.kill(os.getpid(), number)
    assert received == []
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.usefixtures("untouched")
def test_second_signal_of_a_kind_goes_to_the_caller() -> None:
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: came.append(number))
    with heeding_signals(lambda: None, Console()) as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert (received, came) == ([signal.SIGTERM], [signal.SIGTERM])
