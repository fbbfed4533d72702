"""What is installed here, what it can do, and whether it does: ``dpo doctor``.

To tell of another extra, add a line to ``EXTRAS``.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch

from dpo.errors import RunError
from dpo.inputs import cache_folder
from dpo.models.tiny import make_tiny_model
from dpo.preferences import PreferencePair
from dpo.tokenization import TokenizedPairs, tokenize_pairs
from dpo.tokenizer import Tokenizer, byte_tokenizer
from dpo.train_config import Dtype, TrainConfig
from dpo.trainer import Trainer

PACKAGES = ("torch", "tokenizers", "safetensors", "huggingface-hub", "numpy", "jinja2", "click")
EXTRAS = {  # extra: the package that it brings, and what for
    "parquet": ("pyarrow", "Parquet files in and out"),
    "mlflow": ("mlflow-skinny", "metrics to MLflow"),
    "tensorboard": ("tensorboard", "metrics to TensorBoard"),
    "wandb": ("wandb", "metrics to Weights & Biases"),
    "postgres": ("psycopg", "feedback stores in PostgreSQL"),
}
STEPS = 10
# How far the first loss may be from ln 2: what rounding leaves of a policy that is its reference.
NOISE: dict[Dtype, float] = {"float32": 1e-5, "bf16-mixed": 2e-2, "fp16-mixed": 2e-2}


@dataclass(frozen=True, slots=True)
class SelfTest:
    """A few steps of training on one device in one dtype.

    Attributes:
        device: where.
        dtype: in which numerics.
        first_loss: ln 2, but for rounding.
        last_loss: after ``STEPS`` steps on the same pairs, smaller.
        seconds: for all of it.
    """

    device: str
    dtype: Dtype
    first_loss: float
    last_loss: float
    seconds: float

    @property
    def is_sound(self) -> bool:
        """Whether the first loss is ln 2 and training lowered it."""
        return (
            abs(self.first_loss - math.log(2)) <= NOISE[self.dtype]
            and self.last_loss < self.first_loss
        )

    def describe(self) -> str:
        """Return one line."""
        verdict = "sound" if self.is_sound else "NOT SOUND: the first is ln 2, the last is smaller"
        return (
            f"  {self.device:<8}{self.dtype:<12}loss {self.first_loss:.6f}, after {STEPS} steps "
            f"{self.last_loss:.6f}: {verdict} ({self.seconds:.1f} s)"
        )


def describe_installation() -> Iterator[str]:
    """Yield lines on versions, devices, extras and caches."""
    yield (
        f"dpo-engine {metadata.version('dpo-engine')}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )
    yield ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    yield "devices"
    yield f"  cpu     {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield from _gpus()
    yield "extras"
    for extra, (package, use) in EXTRAS.items():
        yield f"  {extra:<12}{_extra(extra, package)} ({use})"
    yield f"caches  {cache_folder('reference').parent}"


def self_tests() -> Iterator[SelfTest]:
    """Train a tiny model on each device in each dtype that is for it.

    Raises:
        RunError: training fails.
    """
    yield _train("cpu", "float32")
    yield _train("cpu", "bf16-mixed")
    if torch.cuda.is_available():
        for dtype in NOISE:
            yield _train("cuda", dtype)


def _gpus() -> Iterator[str]:
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without it"
        yield f"  cuda    none seen; this torch is built {built}"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield (
            f"  cuda:{index}  {found.name}, {found.total_memory / 2**30:.0f} GiB, compute "
            f"capability {found.major}.{found.minor}"
        )


def _extra(extra: str, package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"missing: pip install 'dpo-engine[{extra}]'"


def _train(device: str, dtype: Dtype) -> SelfTest:
    started = time.perf_counter()
    tokenizer = byte_tokenizer()
    config = TrainConfig(
        batch_size=4, steps=STEPS, learning_rate=1e-2, schedule="constant", dtype=dtype
    )
    policy = make_tiny_model(tokenizer, seed=0).to(device)
    trainer = Trainer(policy, _pairs(tokenizer), config)
    losses = [step.metrics["loss"] for step in trainer if step.metrics is not None]
    if len(losses) < STEPS:
        raise RunError(f"self-test on {device} in {dtype}: only {len(losses)} of {STEPS} steps")
    return SelfTest(device, dtype, losses[0], losses[-1], time.perf_counter() - started)


def _pairs(tokenizer: Tokenizer) -> TokenizedPairs:
    pairs = [
        PreferencePair(f"What is {number} and one?", f"It is {number + 1}.", "I do not know.")
        for number in range(4)
    ]
    return tokenize_pairs(pairs, tokenizer).pairs
