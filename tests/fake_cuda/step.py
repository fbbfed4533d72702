"""A training step on fake CUDA tensors in each of some precisions, in a process of its own.

    python tests/fake_cuda/step.py BUILD_FOLDER float32 bf16-mixed

Prints what it found as JSON, by precision.

Placement, dtypes and the absence of host reads are real; values are not. A host read in a
micro-batch (``.item()``, ``bool(tensor)``) raises on fake tensors, and so does mixing devices.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.batching import collate
from dpo.losses import make_loss
from dpo.metrics import MetricSums
from dpo.models import Decoder, parse_config
from dpo.models.transforms import recompute
from dpo.optim import clip_gradients, parameter_groups
from dpo.optim.torchs import adamw
from dpo.precision import PRECISIONS
from dpo.scoring import score_batch
from dpo.tokenization import TokenizedPair


def install_fake_cuda(build_folder: Path) -> None:
    """Let autograd run on fake CUDA tensors."""
    if torch.version.cuda:
        torch._C._ensureCUDADeviceGuardSet()
        return
    from torch.utils.cpp_extension import load

    build_folder.mkdir(parents=True, exist_ok=True)
    guard: Any = load(
        "dpo_fake_cuda",
        [str(Path(__file__).with_name("guard.cpp"))],
        extra_cflags=["-O0"],
        build_directory=str(build_folder),
    )
    guard.install()


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def pairs() -> list[TokenizedPair]:
    """Two pairs of different lengths."""

    def ids(count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.arange(count, dtype=np.int32)

    return [TokenizedPair(ids(7), ids(3), ids(4)), TokenizedPair(ids(5), ids(6), ids(2))]


def step(precision_name: str) -> dict[str, object]:
    """Run the step and return what it found."""
    precision, device = PRECISIONS[precision_name], torch.device("cuda")
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    batch = collate(pairs())
    with FakeTensorMode(allow_non_fake_inputs=True), Operations() as operations:
        torch.set_default_dtype(precision.parameters)
        with device:
            model = Decoder(parse_config(config))
        torch.set_default_dtype(torch.float32)
        recompute(model, "layer")
        loss, sums = make_loss("sigmoid"), MetricSums()
        optimizer = adamw(parameter_groups(model, 0.1), learning_rate=1e-6)
        with precision.context(device):
            moved = batch.to(device)
            scored = score_batch(model, moved)
        values = loss(scored.pairs)
        sums.add(loss, scored, values.detach())
        values.mean().backward()
        norm = clip_gradients(model.parameters(), 1.0)
        optimizer.step()
    parameters = list(model.parameters())
    return {
        "devices": sorted({str(p.grad.device.type) for p in parameters if p.grad is not None}),
        "gradients": sorted({str(p.grad.dtype) for p in parameters if p.grad is not None}),
        "log_probs": str(scored.tokens.log_probs.dtype),
        "loss": str(values.dtype),
        "loss_device": values.device.type,
        "norm": str(norm.dtype),
        "has_varlen": any("varlen_attn" in name for name in operations.names),
        "has_fused_adamw": any("_fused_adamw" in name for name in operations.names),
        "has_host_read": any("_local_scalar_dense" in name for name in operations.names),
    }


def main(build_folder: str, *precisions: str) -> None:
    """Run and print."""
    install_fake_cuda(Path(build_folder))
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_: True
    sys.stdout.write(json.dumps({name: step(name) for name in precisions}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
