"""Time the optimizer steps of one scenario, and say what they came to.

    python -m dpo.bench.training 135m-chat --steps 5

Prints one JSON object, a ``Measurement``. ``dpo bench`` runs each scenario so, in a process of its
own, because memory that another one used would count.

Shapes: P pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dpo.bench.machine import cpu_model
from dpo.bench.results import Measurement
from dpo.bench.scenarios import PROFILES, SCENARIOS, SHAPES, Scenario
from dpo.device import choose_device
from dpo.flops import training_flops
from dpo.models import Decoder, init_model, parse_config
from dpo.models.config import ModelConfig
from dpo.models.transforms import checkpoint_activations
from dpo.precision import PRECISIONS, Precision
from dpo.throughput import peak_memory_mib
from dpo.tokenization import TokenizedPair, TokenizedPairs, columns_of
from dpo.train_config import Device, TrainConfig
from dpo.trainer import Trainer

PRODUCT_SIZES = (1024, 2048, 4096)  # of the square products whose fastest rate is the yardstick
PRODUCT_SECONDS = 0.5  # a size whose product takes longer is the last that is tried


def random_pairs(scenario: Scenario, count: int) -> TokenizedPairs:
    """Draw pairs of random tokens whose lengths are those of the scenario's profile."""
    generator = np.random.default_rng(0)
    profile, vocabulary = PROFILES[scenario.profile], SHAPES[scenario.shape]["vocab_size"]

    def text(bounds: tuple[int, int]) -> NDArray[np.int32]:
        size = int(generator.integers(bounds[0], bounds[1] + 1))
        return generator.integers(0, vocabulary, size).astype(np.int32)

    return columns_of(
        [
            TokenizedPair(
                text(profile.prompt), text(profile.answer), text(profile.answer), id=f"row-{row}"
            )
            for row in range(1, count + 1)
        ]
    )


def useful_flops(config: ModelConfig, lengths: NDArray[np.int64]) -> float:
    """Count the arithmetic that training on some pairs cannot do without (``training_flops``).

    Args:
        config: of the decoder.
        lengths: (P, 3) tokens of prompt, chosen and rejected answer.
    """
    with torch.device("meta"):
        return training_flops(Decoder(config), lengths)


def matrix_rate(
    precision: Precision, device: torch.device, sizes: Sequence[int] | None = None
) -> float:
    """Return the best rate of square matrix products in these numerics, in operations per second.

    The median of five of each size, so that one lucky or disturbed product does not count.

    Args:
        precision: gives the dtype.
        device: where.
        sizes: of the matrices; ``PRODUCT_SIZES`` if None.
    """
    dtype = precision.autocast or precision.parameters
    best = 0.0
    for size in sizes or PRODUCT_SIZES:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(6):  # the first warms up
            synchronize(device)
            started = time.perf_counter()
            torch.mm(left, right)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds[1:])
        best = max(best, 2 * size**3 / median)
        if median > PRODUCT_SECONDS:
            break
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    name: str, *, steps: int, device_kind: Device = "auto", threads: int | None = None
) -> Measurement:
    """Time ``steps`` optimizer steps of a scenario, after one that warms up.

    Args:
        name: of the scenario.
        steps: at least 1.
        device_kind: as for ``dpo train --device``.
        threads: of the CPU; None leaves torch's choice.

    Raises:
        InputError: the device is not there.
    """
    scenario = SCENARIOS[name]
    options = _options(scenario, device_kind, threads)
    device, precision = choose_device(options), PRECISIONS[scenario.dtype]
    config = parse_config(SHAPES[scenario.shape])
    model = init_model(config, dtype=precision.parameters, device=device)
    if scenario.activation_checkpointing:
        checkpoint_activations(model)
    pairs = random_pairs(scenario, scenario.batch_size)
    lengths = pairs.lengths()
    started = time.perf_counter()
    trainer = Trainer(model, pairs, options, loss=scenario.loss)
    synchronize(device)
    reference_seconds = time.perf_counter() - started
    trainer.train_step()
    trainer.close_window()
    step_seconds = [_timed_step(trainer) for _ in range(steps)]
    line = trainer.close_window()
    peak, median = peak_memory_mib(device), statistics.median(step_seconds)
    rate, flops = matrix_rate(precision, device), useful_flops(config, lengths)
    copies = 1 if scenario.shares_prefix else 2
    return Measurement(
        scenario=name,
        settings=asdict(scenario),
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        step_seconds=step_seconds,
        pairs_per_s=len(pairs) / median,
        useful_tokens_per_s=float(lengths.sum() / median),
        useful_share=float(lengths.sum() / (lengths @ np.array([copies, 1, 1])).sum()),
        useful_flops=flops,
        matrix_flops_per_s=rate,
        mfu=flops / (median * rate),
        peak_mib=peak,
        state_mib=_state_bytes(trainer) / 2**20,
        reference_tokens_per_s=float(lengths.sum() / reference_seconds),
        split={n.removeprefix("time/"): t for n, t in line.items() if n.startswith("time/")},
    )


def device_name(device: torch.device) -> str:
    """Return what the processor calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def _options(scenario: Scenario, device: Device, threads: int | None) -> TrainConfig:
    return TrainConfig(
        batch_size=scenario.batch_size,
        steps=10**6,
        learning_rate=1e-6,
        schedule="constant",
        dtype=scenario.dtype,
        device=device,
        threads=threads,
        share_prefix=scenario.shares_prefix,
    )


def _timed_step(trainer: Trainer) -> float:
    synchronize(trainer.device)
    started = time.perf_counter()
    trainer.train_step()
    synchronize(trainer.device)
    return time.perf_counter() - started


def _state_bytes(trainer: Trainer) -> int:
    """Bytes of the weights, of as many gradients, and of the optimizer's state."""
    tensors = trainer.tensors()
    weights = sum(tensor.nbytes for tensor in tensors["model"].values())
    return 2 * weights + sum(tensor.nbytes for tensor in tensors["optimizer"].values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=list(SCENARIOS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="auto", choices=get_args(Device))
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    result = measure(
        options.scenario,
        steps=options.steps,
        device_kind=options.device,
        threads=options.threads,
    )
    sys.stdout.write(json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    main()
