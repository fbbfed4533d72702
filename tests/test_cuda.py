"""The CUDA path: on a GPU by value, without one by placement, dtypes and host reads."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo.batching import collate
from dpo.models import Decoder
from dpo.models.transforms import compile_blocks
from dpo.throughput import peak_memory_mib
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

PLAIN = TrainConfig(batch_size=4, learning_rate=1e-3, schedule="constant", steps=3)
HAS_VARLEN = {"float32": False, "bfloat16": True, "bf16-mixed": True, "fp16-mixed": True}


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fake_cuda")


@pytest.mark.slow
@pytest.mark.parametrize("precision", HAS_VARLEN)
def test_step_on_fake_cuda_has_the_right_devices_dtypes_and_no_host_read(
    build_folder: Path, precision: str
) -> None:
    script = Path(__file__).parent / "fake_cuda/step.py"
    command = [sys.executable, str(script), str(build_folder), precision]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    gradients = "torch.bfloat16" if precision == "bfloat16" else "torch.float32"
    assert json.loads(printed.splitlines()[-1]) == {
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
    return [s.metrics["loss"] for s in Trainer(model, pairs, config) if s.metrics is not None]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "noise"), [("float32", 1e-4), ("bf16-mixed", 0.02), ("fp16-mixed", 0.01)]
)
def test_losses_on_cuda_equal_those_on_the_cpu(
    make_model: Callable[..., Decoder],
    make_pairs: Callable[..., TokenizedPairs],
    dtype: Any,
    noise: float,
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    expected = losses(make_model(**sizes), make_pairs(), PLAIN)
    found = losses(make_model(**sizes).cuda(), make_pairs(), replace(PLAIN, dtype=dtype))
    assert found == pytest.approx(expected, abs=noise)


@pytest.mark.gpu
def test_compiled_blocks_train_on_cuda(
    make_model: Callable[..., Decoder], make_pairs: Callable[..., TokenizedPairs]
) -> None:
    expected = losses(make_model().cuda(), make_pairs(), PLAIN)
    model = make_model().cuda()
    compile_blocks(model)
    assert losses(model, make_pairs(), PLAIN) == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
def test_batches_move_to_cuda_whole(make_pairs: Callable[..., TokenizedPairs]) -> None:
    batch = collate(list(make_pairs())).to(torch.device("cuda"))
    assert batch.texts.stream.input_ids.is_cuda
    assert batch.texts.stream.plan.branch_keys.is_cuda
    assert batch.weight.is_cuda


def test_batches_move_to_another_device_whole(make_pairs: Callable[..., TokenizedPairs]) -> None:
    batch = collate(list(make_pairs())).to(torch.device("meta"))
    texts, plan = batch.texts, batch.texts.stream.plan
    tensors = [texts.stream.input_ids, texts.stream.positions, texts.predictors, texts.targets]
    tensors += [texts.answers, plan.branch_keys, plan.root_bounds, plan.branch_bounds]
    tensors += [plan.branch_key_bounds, batch.weight, batch.margin, batch.label_prob]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.gpu
def test_peak_memory_on_cuda_is_what_torch_allocated() -> None:
    tensor = torch.ones(2**20, device="cuda")
    assert peak_memory_mib(tensor.device) >= 4


def test_peak_memory_on_the_cpu_is_that_of_this_process() -> None:
    assert 50 < peak_memory_mib(torch.device("cpu")) < 50_000
