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
from dataclasses import asdict
from functools import partial
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dpo.accelerators import accelerator_of
from dpo.bench.clock import device_name, matrix_rate, seconds_of
from dpo.bench.results import LACK_OF_MEMORY, Measurement
from dpo.bench.scenarios import PROFILES, SCENARIOS, SHAPES, Scenario
from dpo.bench.step import own_reference
from dpo.device import choose_device, is_lack_of_memory
from dpo.flops import training_flops
from dpo.losses import make_loss
from dpo.models import Decoder, init_model, parse_config
from dpo.models.config import ModelConfig
from dpo.models.transforms import recompute
from dpo.precision import PRECISIONS
from dpo.throughput import peak_memory_mib
from dpo.tokenization import TokenizedPair, TokenizedPairs, columns_of
from dpo.train_config import Device, TrainConfig
from dpo.trainer import Trainer, uses_live_reference

FEWEST_STEPS = 2  # that are timed, however little time there is


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


def measure(
    name: str,
    *,
    steps: int,
    device_kind: Device = "auto",
    threads: int | None = None,
    seconds: float | None = None,
) -> Measurement:
    """Time ``steps`` optimizer steps of a scenario, after one that warms up.

    Args:
        name: of the scenario.
        steps: at least 1.
        device_kind: as for ``dpo train --device``.
        threads: of the CPU; None leaves torch's choice.
        seconds: take fewer steps, but ``FEWEST_STEPS``, where that many would take longer in all.

    Raises:
        InputError: the device is not there.
    """
    began = time.perf_counter()
    scenario = SCENARIOS[name]
    options = _options(scenario, device_kind, threads)
    device, precision = choose_device(options), PRECISIONS[scenario.dtype]
    config = parse_config(SHAPES[scenario.shape])
    model = init_model(config, dtype=precision.parameters, device=device)
    if scenario.recompute is not None:
        recompute(model, scenario.recompute)
    pairs = random_pairs(scenario, scenario.batch_size)
    lengths = pairs.lengths()
    loss, reference, reference_seconds = make_loss(scenario.loss), None, None
    if loss.needs_reference and not uses_live_reference(loss, options):
        reference = own_reference(model, pairs, options)  # which warms up
        (reference_seconds,) = seconds_of(partial(own_reference, model, pairs, options), 1, device)
    trainer = Trainer(model, pairs, options, loss=loss, reference=reference)
    (warm_up,) = seconds_of(trainer.train_step, 1, device)
    if seconds is not None:
        fitting = int((seconds - (time.perf_counter() - began)) / warm_up)
        steps = min(steps, max(fitting, FEWEST_STEPS))
    trainer.close_window()
    step_seconds = seconds_of(trainer.train_step, steps, device)
    line = trainer.close_window()
    peak, median = peak_memory_mib(device), statistics.median(step_seconds)
    rate, flops = matrix_rate(precision, device), useful_flops(config, lengths)
    card = accelerator_of(device)
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
        datasheet_flops_per_s=None if card is None else card.flops_per_s(options),
        peak_mib=peak,
        state_mib=_state_bytes(trainer) / 2**20,
        reference_seconds=reference_seconds,
        split={n.removeprefix("time/"): t for n, t in line.items() if n.startswith("time/")},
        notes=trainer.notes,
        wall_seconds=time.perf_counter() - began,
    )


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
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    try:
        result = measure(
            options.scenario,
            steps=options.steps,
            device_kind=options.device,
            threads=options.threads,
            seconds=options.seconds,
        )
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        sys.stderr.write(f"{str(error).splitlines()[0]}\n")
        raise SystemExit(LACK_OF_MEMORY) from error
    sys.stdout.write(json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    main()
