"""What training costs in memory, with adapters and without: ``python -m dpo.bench.adapter_memory``.

Each form is measured in a process of its own: the sizes of its tensors, by how much resident memory
rose at most while the model was loaded, and by how much more while two optimizer steps were done,
beside what the planner says of that. The model has the shape of SmolLM2-135M and random weights, on
disk in bfloat16. The C library is told to give back memory that is not in use. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from dpo.adapter_config import AdapterConfig
from dpo.bench.machine import peak_mib
from dpo.config import RunConfig
from dpo.models import Decoder, init_model, load_model, parse_config, save_model
from dpo.precision import precision_of
from dpo.prepare import prepare_policy
from dpo.rehearsal import Rows, peak, rehearse_step
from dpo.tokenization import TokenizedPair, columns_of
from dpo.train_config import Dtype, TrainConfig
from dpo.trainer import Trainer

SHAPE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
FORMS: dict[str, tuple[AdapterConfig, Dtype]] = {
    "all weights": (AdapterConfig(), "float32"),
    "LoRA": (AdapterConfig(kind="lora"), "float32"),
    "DoRA": (AdapterConfig(kind="dora"), "float32"),
    "LoRA on int8": (AdapterConfig(kind="lora", quantize="int8"), "float32"),
    "LoRA on nf4": (AdapterConfig(kind="lora", quantize="nf4"), "float32"),
    "LoRA on nf4-double": (AdapterConfig(kind="lora", quantize="nf4-double"), "float32"),
    "LoRA, bfloat16": (AdapterConfig(kind="lora"), "bfloat16"),
    "LoRA on nf4, bfloat16": (AdapterConfig(kind="lora", quantize="nf4"), "bfloat16"),
    "LoRA on nf4-double, bfloat16": (
        AdapterConfig(kind="lora", quantize="nf4-double"),
        "bfloat16",
    ),
}
COLUMNS = ("weights", "gradients", "optimizer", "peak of loading", "step above it", "planned")


@click.command
@click.option("--form", type=click.Choice(list(FORMS)), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(form: str | None, folder: Path | None) -> None:
    """Print a table of the memory that each form of training takes, in MiB."""
    if form is not None and folder is not None:
        click.echo(json.dumps(measure(folder, form)))
        return
    click.echo(f"| MiB | {' | '.join(COLUMNS)} |\n| --- |{' --- |' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as temporary:
        save_model(init_model(parse_config(SHAPE)).bfloat16(), Path(temporary))
        for name in FORMS:
            command = [sys.executable, "-m", __spec__.name, "--form", name, "--folder", temporary]
            tight = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=tight
            ).stdout
            found: dict[str, float] = json.loads(output)
            click.echo(f"| {name} | {' | '.join(f'{found[name]:.0f}' for name in COLUMNS)} |")


def measure(folder: Path, form: str) -> dict[str, float | None]:
    """Load the model in a form, train two steps of two pairs, and return the columns in MiB."""
    adapter, dtype = FORMS[form]
    config = TrainConfig(batch_size=2, micro_batch_size=2, steps=2, dtype=dtype)
    run = RunConfig(model="random", data="random", out="nothing", train=config, adapter=adapter)
    pairs = columns_of([_pair(0), _pair(1)])
    models: list[Decoder] = []
    trainers: list[Trainer] = []

    def load() -> None:
        kind = precision_of(config).parameters
        models.append(load_model(folder, dtype=kind, quantize=adapter.quantize))
        prepare_policy(models[0], run)

    def train() -> None:
        trainers.append(Trainer(models[0], pairs, config))
        trainers[0].train()

    peaks = peak_mib(load), peak_mib(train)
    states = [tensor for state in trainers[0].optimizer.state.values() for tensor in state.values()]
    trained = [parameter for parameter in models[0].parameters() if parameter.requires_grad]
    held = [*models[0].parameters(), *models[0].buffers()]
    planned = peak(rehearse_step(run, models[0].config, Rows(pairs, range(2), is_alone=True)))
    above = sum(planned.values()) / 2**20 - _mib(held)
    columns = (_mib(held), _mib(trained), _mib(states), *peaks, above)
    return dict(zip(COLUMNS, columns, strict=True))


def _pair(seed: int) -> TokenizedPair:
    generator = np.random.default_rng(seed)
    prompt, chosen, rejected = generator.integers(0, 49152, (3, 64)).astype(np.int32)
    return TokenizedPair(prompt, chosen, rejected, id=f"pair-{seed}")


def _mib(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 2**20


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
