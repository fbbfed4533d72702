"""Times, rates and names of processors."""

import pytest
import torch

from dpo.bench import clock
from dpo.bench.clock import matrix_rate, seconds_of
from dpo.precision import PRECISIONS


def test_seconds_on_the_cpu_are_those_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.0, 13.5])
    monkeypatch.setattr("dpo.bench.clock.time.perf_counter", times.__next__)
    assert seconds_of(lambda: None, 3, torch.device("cpu")) == [1.0, 2.0, 0.5]


class Gpu:
    """A GPU that does work milliseconds after it was given."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.milliseconds = 0.0

    def work(self) -> None:
        self.log.append("work")
        self.milliseconds += 250.0

    def synchronize(self, device: torch.device) -> None:
        self.log.append("wait")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            gpu.log.append("mark")
            self.at = gpu.milliseconds

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    return gpu


def test_seconds_on_a_gpu_lie_between_events_without_waiting(gpu: Gpu) -> None:
    assert seconds_of(gpu.work, 2, torch.device("cuda")) == [0.25, 0.25]
    assert gpu.log == ["wait", "mark", "work", "mark", "work", "mark", "wait"]


def test_the_yardstick_is_a_rate_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "PRODUCT_SIZES", (128, 256))
    assert matrix_rate(PRECISIONS["float32"], torch.device("cpu")) > 1e6
