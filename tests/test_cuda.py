"""The CUDA path: on a GPU by value, without one by placement, dtypes and host reads."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo.batching import collate
from dpo.device import choose_device
from dpo.losses import make_loss
from dpo.metrics import MetricSums
from dpo.models import Decoder
from dpo.models.transforms import compile_blocks
from dpo.precision import PRECISIONS
from dpo.scoring import score_batch
from dpo.segments import move
from dpo.throughput import peak_memory_mib
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

PLAIN = TrainConfig(batch_size=4, learning_rate=5e-3, schedule="constant", steps=3)
HAS_VARLEN = {"float32": False, "bfloat16": True, "bf16-mixed": True, "fp16-mixed": True}
TESTS = Path(__file__).parent
MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

# Every test that needs a GPU, and those that hold the same lines where there is none.
FAKE_STEP = "test_cuda.py::test_step_on_fake_cuda_has_the_right_devices_dtypes_and_no_host_read"
COUNTERPARTS = {
    "test_attention.py::test_varlen_equals_the_reference_on_cuda": (
        "test_attention.py::test_varlen_asks_the_kernel_for_what_sdpa_computes",
        FAKE_STEP,  # 16-bit floats take it, float32 does not
    ),
    "test_cuda.py::test_losses_on_cuda_equal_those_on_the_cpu": (
        FAKE_STEP,
        "test_cuda.py::test_losses_in_a_narrow_dtype_on_the_cpu_equal_float32",
        "test_cuda.py::test_overflow_of_float16_halves_the_scale_and_takes_no_step",
    ),
    "test_cuda.py::test_micro_batch_on_cuda_never_waits": (FAKE_STEP,),
    "test_cuda.py::test_run_on_cuda_goes_on_from_its_state": (
        "test_trainer.py::test_resumed_run_equals_unbroken_run_bit_for_bit",
    ),
    "test_cuda.py::test_compiled_blocks_train_on_cuda": (
        "test_trainer.py::test_compiled_blocks_equal_eager_ones",
    ),
    "test_cuda.py::test_batches_move_to_cuda_whole": (
        "test_cuda.py::test_batches_move_to_another_device_whole",
        "test_cuda.py::test_tensors_go_to_cuda_from_pinned_memory_without_waiting",
    ),
    "test_cuda.py::test_peak_memory_on_cuda_is_what_torch_allocated": (
        "test_cuda.py::test_peak_memory_of_cuda_is_asked_of_torch_in_mib",
        "test_cuda.py::test_peak_memory_on_the_cpu_is_that_of_this_process",
    ),
    "test_cuda.py::test_times_of_the_parts_on_cuda_add_up_to_the_step": (
        "test_throughput.py::test_times_of_the_parts_add_up_to_the_step",
        "test_throughput.py::test_clock_of_a_gpu_marks_its_stream_and_waits_for_the_last_mark_alone",
    ),
    "test_cuda.py::test_gpu_that_is_there_is_taken": (
        "test_device.py::test_auto_takes_the_gpu_if_there_is_one",
    ),
    "test_cuda.py::test_tf32_rounds_float32_products_on_cuda": (
        "test_device.py::test_tf32_is_switched_on_and_off",
    ),
    "test_distributed.py::test_steps_over_nccl_equal_those_of_one_gpu": (
        "test_distributed.py::test_steps_on_two_ranks_equal_those_of_one",
        "test_distributed.py::test_steps_of_a_model_in_parts_equal_those_of_one_rank",
    ),
    "test_distributed.py::test_run_on_two_gpus_goes_on_on_one": (
        "test_distributed.py::test_run_goes_on_with_any_number_of_ranks",
    ),
    "test_metrics.py::test_metrics_on_cuda_equal_the_cpu": (
        "test_metrics.py::test_adding_never_waits_for_the_device",
    ),
    "test_offload.py::test_gradients_on_cuda_are_equal_and_memory_is_less": (
        "test_offload.py::test_gradients_are_bit_equal",
        "test_offload.py::test_memory_of_the_device_does_not_grow_with_the_layers",
        "test_offload.py::test_lane_of_cuda_orders_its_copies",
    ),
    "test_optim.py::test_fused_on_cuda_equals_the_cpu": (
        "test_optim.py::test_is_fused_on_the_cpu",
        FAKE_STEP,
    ),
}


def test_every_test_of_a_gpu_has_a_counterpart_without_one() -> None:
    functions = {
        f"{path.relative_to(TESTS)}::{node.name}": [
            ast.unparse(each) for each in node.decorator_list
        ]
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    of_a_gpu = {name for name, marks in functions.items() if "pytest.mark.gpu" in marks}
    assert set(COUNTERPARTS) == of_a_gpu
    named = {name for names in COUNTERPARTS.values() for name in names}
    assert named <= set(functions) - of_a_gpu
    assert all(COUNTERPARTS.values())


# --- a step -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What a step on fake CUDA tensors is like, by precision."""
    script, folder = TESTS / "fake_cuda/step.py", tmp_path_factory.mktemp("fake_cuda")
    command = [sys.executable, str(script), str(folder), *HAS_VARLEN]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, dict[str, object]] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", HAS_VARLEN)
def test_step_on_fake_cuda_has_the_right_devices_dtypes_and_no_host_read(
    fake_steps: dict[str, dict[str, object]], precision: str
) -> None:
    gradients = "torch.bfloat16" if precision == "bfloat16" else "torch.float32"
    assert fake_steps[precision] == {
        "devices": ["cuda"],
        "gradients": [gradients],
        "log_probs": "torch.float32",
        "loss": "torch.float32",
        "loss_device": "cuda",
        "norm": "torch.float32",
        "has_varlen": HAS_VARLEN[precision],
        "has_fused_adamw": True,
        "has_host_read": False,
    }


def losses(model: Decoder, pairs: TokenizedPairs, config: TrainConfig) -> list[float]:
    trainer = Trainer(model, pairs, config)
    if trainer.precision.scales_loss:  # the usual first scale is found too large, and steps skipped
        trainer.scaler = torch.GradScaler(trainer.device.type, init_scale=2.0**8)
    return [step.metrics["loss"] for step in trainer if step.metrics is not None]


@pytest.fixture
def make_smooth_model(make_model: MakeModel) -> MakeModel:
    """A model whose training does not make much of round-off."""
    return partial(make_model, scale=1.0, hidden_size=64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "noise"), [("float32", 1e-4), ("bf16-mixed", 5e-3), ("fp16-mixed", 2e-3)]
)
def test_losses_on_cuda_equal_those_on_the_cpu(
    make_smooth_model: MakeModel, make_pairs: MakePairs, dtype: Any, noise: float
) -> None:
    expected = losses(make_smooth_model(), make_pairs(), PLAIN)
    found = losses(make_smooth_model().cuda(), make_pairs(), replace(PLAIN, dtype=dtype))
    assert found == pytest.approx(expected, abs=noise)


@pytest.mark.parametrize(("dtype", "noise"), [("bf16-mixed", 5e-3), ("fp16-mixed", 2e-3)])
def test_losses_in_a_narrow_dtype_on_the_cpu_equal_float32(
    make_smooth_model: MakeModel, make_pairs: MakePairs, dtype: Any, noise: float
) -> None:
    """Commands refuse float16 on a CPU, where it is slow; autocast and the scaler work there."""
    expected = losses(make_smooth_model(), make_pairs(), PLAIN)
    found = losses(make_smooth_model(), make_pairs(), replace(PLAIN, dtype=dtype))
    assert found == pytest.approx(expected, abs=noise)
    assert found != expected
    assert abs(expected[-1] - expected[0]) > 0.05


def test_overflow_of_float16_halves_the_scale_and_takes_no_step(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = Trainer(model, make_pairs(), replace(PLAIN, dtype="fp16-mixed", steps=2))
    trainer.scaler = torch.GradScaler("cpu", init_scale=2.0**40)
    steps = iter(trainer)
    next(steps)
    assert trainer.scaler.get_scale() == 2.0**39
    assert trainer.skipped_steps == 1
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    trainer.scaler.update(2.0**8)
    next(steps)
    assert trainer.skipped_steps == 1
    assert not all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.gpu
def test_micro_batch_on_cuda_never_waits(make_model: MakeModel, make_pairs: MakePairs) -> None:
    model, batch, sums = (
        make_model(hidden_size=64).cuda(),
        collate(list(make_pairs())),
        MetricSums(),
    )
    device, loss = torch.device("cuda"), make_loss("sigmoid")

    def micro_batch() -> None:
        with PRECISIONS["bf16-mixed"].context(device):
            scored = score_batch(model, batch.to(device))
        values = loss(scored.pairs)
        values.mean().backward()
        sums.add(loss, scored, values.detach())

    micro_batch()  # libraries wait while they are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_run_on_cuda_goes_on_from_its_state(
    make_smooth_model: MakeModel, make_pairs: MakePairs
) -> None:
    expected = losses(make_smooth_model().cuda(), make_pairs(), PLAIN)
    first = Trainer(make_smooth_model().cuda(), make_pairs(), PLAIN)
    next(iter(first))
    second = Trainer(make_smooth_model().cuda(), make_pairs(), PLAIN)
    second.restore(first.tensors(), first.state())
    found = [step.metrics["loss"] for step in second if step.metrics is not None]
    assert found == pytest.approx(expected[1:], abs=1e-4)


@pytest.mark.gpu
def test_compiled_blocks_train_on_cuda(make_smooth_model: MakeModel, make_pairs: MakePairs) -> None:
    expected = losses(make_smooth_model().cuda(), make_pairs(), PLAIN)
    model = make_smooth_model().cuda()
    compile_blocks(model)
    assert losses(model, make_pairs(), PLAIN) == pytest.approx(expected, abs=1e-4)


# --- batches, memory, devices -------------------------------------------------------------------


@pytest.mark.gpu
def test_batches_move_to_cuda_whole(make_pairs: MakePairs) -> None:
    batch = collate(list(make_pairs())).to(torch.device("cuda"))
    assert batch.texts.stream.input_ids.is_cuda
    assert batch.texts.stream.plan.branch_keys.is_cuda
    assert batch.weight.is_cuda


def test_batches_move_to_another_device_whole(make_pairs: MakePairs) -> None:
    batch = collate(list(make_pairs())).to(torch.device("meta"))
    texts, plan = batch.texts, batch.texts.stream.plan
    tensors = [texts.stream.input_ids, texts.stream.positions, texts.predictors, texts.targets]
    tensors += [texts.answers, plan.branch_keys, plan.root_bounds, plan.branch_bounds]
    tensors += [plan.branch_key_bounds, batch.weight, batch.margin, batch.label_prob]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(("device", "asked"), [("cuda", ["pin"]), ("meta", [])])
def test_tensors_go_to_cuda_from_pinned_memory_without_waiting(
    monkeypatch: pytest.MonkeyPatch, device: str, asked: list[object]
) -> None:
    seen: list[object] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        seen.append("pin")
        return tensor

    def to(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        seen.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    move(torch.ones(2), torch.device(device))
    assert seen == [*asked, (device, True)]


@pytest.mark.gpu
def test_peak_memory_on_cuda_is_what_torch_allocated() -> None:
    tensor = torch.ones(2**20, device="cuda")
    assert peak_memory_mib(tensor.device) >= 4


def test_peak_memory_of_cuda_is_asked_of_torch_in_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of = {torch.device("cuda", 1): 3 * 2**20}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", bytes_of.__getitem__)
    assert peak_memory_mib(torch.device("cuda", 1)) == 3.0


def test_peak_memory_on_the_cpu_is_that_of_this_process() -> None:
    assert 50 < peak_memory_mib(torch.device("cpu")) < 50_000


@pytest.mark.gpu
def test_times_of_the_parts_on_cuda_add_up_to_the_step(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    for step in Trainer(make_model().cuda(), make_pairs(), PLAIN):
        assert step.metrics is not None
        parts = [step.metrics[f"time/{p}"] for p in ("data", "forward", "backward", "optimizer")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(step.metrics["perf/step_s"])


@pytest.mark.gpu
def test_gpu_that_is_there_is_taken() -> None:
    assert choose_device(TrainConfig()).type == "cuda"


@pytest.mark.gpu
def test_tf32_rounds_float32_products_on_cuda() -> None:
    factor = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).cuda()
    exact, errors = factor.double() @ factor.double(), []
    try:
        for tf32 in (False, True):
            choose_device(TrainConfig(tf32=tf32))
            errors.append((factor @ factor - exact).abs().max().item())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert errors[0] < 1e-3 < errors[1]
