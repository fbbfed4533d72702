"""Where the time of steps goes, and what it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpo.accelerators import ACCELERATORS, accelerator_of
from dpo.flops import training_flops
from dpo.models import Decoder
from dpo.quantization import quantize_linears
from dpo.step_clock import StepClock
from dpo.throughput import Throughput
from dpo.tokenized_pairs import TokenizedPair, TokenizedPairs, columns_of
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

PLAIN = TrainConfig(batch_size=4, learning_rate=1e-2, schedule="constant", steps=2)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = np.array([[3, 2, 1]])


# The clock


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's clock that shows 1, 2, 4, 8, ... seconds."""
    shown = iter([2.0**power for power in range(20)])
    monkeypatch.setattr("time.perf_counter", lambda: next(shown))


@pytest.mark.usefixtures("seconds")
def test_clock_adds_up_the_parts_of_steps_and_nothing_between() -> None:
    clock = StepClock(CPU)
    clock.begin("data")  # of an evaluation
    with clock.running("data"):  # 1
        clock.begin("forward")  # 2
        clock.begin("data")  # 4
        clock.begin("forward")  # 8
    # 16
    clock.begin("forward")
    with clock.running("data"):  # 32
        pass  # 64
    assert clock.read() == {"data": 1 + 4 + 32, "forward": 2 + 8}
    assert clock.read() == {}


@pytest.mark.usefixtures("seconds")
def test_clock_stops_when_a_step_fails() -> None:
    clock = StepClock(CPU)
    with pytest.raises(RuntimeError), clock.running("data"):
        raise RuntimeError
    clock.begin("forward")
    assert clock.read() == {"data": 1}


@dataclass
class Event:
    """An event of a stream that has passed it only when it is waited for."""

    enable_timing: bool
    waited_for: list["Event"] = field(default_factory=list)
    stream: Any = None
    milliseconds: float = 0.0

    def record(self, stream: list["Event"]) -> None:
        stream.append(self)
        self.stream, self.milliseconds = stream, 250.0 * len(stream)

    def synchronize(self) -> None:
        assert self is self.stream[-1]
        self.waited_for.append(self)

    def elapsed_time(self, end: "Event") -> float:
        assert self.stream[-1].waited_for
        return end.milliseconds - self.milliseconds


def test_clock_of_a_gpu_marks_its_stream_and_waits_for_the_last_mark_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream: list[Event] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    clock = StepClock(CUDA)
    with clock.running("data"):
        clock.begin("forward")
    assert len(stream) == 3
    assert all(event.enable_timing and not event.waited_for for event in stream)
    assert clock.read() == {"data": 0.25, "forward": 0.25}
    assert [event.waited_for for event in stream] == [[], [], [stream[-1]]]


# A run


def lines_of(trainer: Trainer) -> list[dict[str, float]]:
    return [dict(step.metrics) for step in trainer if step.metrics is not None]


def test_times_of_the_parts_add_up_to_the_step(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    config = replace(PLAIN, micro_batch_size=2, tokens_per_micro_batch=None)
    for line in lines_of(Trainer(make_model(), make_pairs(), config, eval_pairs=make_pairs(4))):
        parts = {name: value for name, value in line.items() if name.startswith("time/")}
        assert set(parts) == {f"time/{p}" for p in ("data", "forward", "backward", "optimizer")}
        assert all(value > 0 for value in parts.values())
        assert sum(parts.values()) == pytest.approx(line["perf/step_s"])


def test_time_of_a_live_reference_is_its_own(make_model: MakeModel, make_pairs: MakePairs) -> None:
    config = replace(PLAIN, reference_sync_every=1, reference_sync_share=0.5)
    for line in lines_of(Trainer(make_model(), make_pairs(), config)):
        assert line["time/reference"] > 0


def test_time_of_a_part_is_of_what_is_done_in_it(
    make_model: MakeModel, make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves only where the model runs, and where the optimizer steps."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def passing(seconds: float) -> Callable[..., None]:
        def pass_time(*_: object) -> None:
            now[0] += seconds

        return pass_time

    config = replace(PLAIN, micro_batch_size=1, tokens_per_micro_batch=None, log_every=2)
    model = make_model()
    trainer = Trainer(model, make_pairs(), config, eval_pairs=make_pairs(4))
    model.register_forward_hook(passing(3.0))
    model.lm_head.weight.register_hook(passing(5.0))
    trainer.optimizer.register_step_pre_hook(passing(7.0))
    (line,) = lines_of(trainer)
    found = {name: line[f"time/{name}"] for name in ("data", "forward", "backward", "optimizer")}
    assert found == {"data": 0, "forward": 4 * 3.0, "backward": 4 * 5.0, "optimizer": 7.0}
    assert line["perf/pairs_per_s"] == pytest.approx(4 / 39)


# The arithmetic


def test_rate_of_arithmetic_is_that_of_the_useful_tokens(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    model, pairs = make_model(), make_pairs(8)
    (line,) = lines_of(Trainer(model, pairs, replace(PLAIN, log_every=2)))
    found = line["perf/tflops_per_s"] * 1e12 * 2 * line["perf/step_s"]
    assert found == pytest.approx(training_flops(model, pairs.lengths()))
    assert "perf/mfu" not in line


def test_share_of_a_gpus_rate_is_that_of_its_datasheet_in_the_runs_numerics(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    for dtype, rate in (("bf16-mixed", 989), ("float32", 67)):
        throughput = Throughput(make_model(), TrainConfig(dtype=dtype), CUDA)  # type: ignore[arg-type]
        throughput.add_step(LENGTHS)
        found = throughput.close()
        assert found["perf/mfu"] == pytest.approx(found["perf/tflops_per_s"] / rate)


@pytest.mark.parametrize("name", ["NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 D"])
def test_gpu_that_is_like_a_known_one_is_not_taken_for_it(
    name: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    throughput = Throughput(make_model(), PLAIN, CUDA)
    throughput.add_step(LENGTHS)
    found = throughput.close()
    assert found["perf/tflops_per_s"] > 0
    assert "perf/mfu" not in found


def test_every_known_gpu_is_found_by_the_names_that_torch_gives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for accelerator in ACCELERATORS.values():
        for name in accelerator.device_names:
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
            assert accelerator_of(CUDA) is accelerator
    assert accelerator_of(CPU) is None


def test_arithmetic_of_another_kind_of_model_is_not_known() -> None:
    throughput = Throughput(nn.Linear(1, 1), PLAIN, CPU)
    throughput.add_step(LENGTHS)
    assert "perf/tflops_per_s" not in throughput.close()


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantized_weights_count_as_frozen_ones(scheme: str, make_model: MakeModel) -> None:
    frozen, quantized = make_model(), make_model()
    frozen.model.layers.requires_grad_(False)
    quantized.model.layers.requires_grad_(False)
    quantize_linears(quantized, scheme)
    assert training_flops(quantized, LENGTHS) == training_flops(frozen, LENGTHS)


# Tokens that are computed


def test_fractions_of_filler_and_of_shared_prefixes_by_hand(make_model: MakeModel) -> None:
    """3 + 2 + 1 tokens and 10 of filler, or 3 + 2 + 3 + 1 and 7."""
    ids = np.arange(3, dtype=np.int32)
    pairs = columns_of([TokenizedPair(ids, ids[:2], ids[:1], id="row")])
    for shares, filler, shared in ((True, 10 / 16, 3 / 9), (False, 7 / 16, 0)):
        config = replace(PLAIN, steps=1, batch_size=1, share_prefix=shares)
        (line,) = lines_of(Trainer(make_model(), pairs, config, eval_pairs=pairs))
        assert line["perf/pad_fraction"] == pytest.approx(filler)
        assert line["perf/shared_fraction"] == pytest.approx(shared)


def test_prompt_of_a_row_with_one_answer_is_not_shared(make_model: MakeModel) -> None:
    ids, nothing = np.arange(4, dtype=np.int32), np.zeros(0, np.int32)
    pairs = columns_of([TokenizedPair(ids, ids, nothing, id="row")])
    config = replace(PLAIN, steps=1, batch_size=1)
    (line,) = lines_of(Trainer(make_model(), pairs, config, loss="bco"))
    assert line["perf/shared_fraction"] == 0
