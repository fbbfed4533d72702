"""What a start does without: the compiler, and what is computed twice."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpo.adapter_config import AdapterConfig
from dpo.config import LossConfig, RunConfig
from dpo.memory_tracker import GRADIENTS, OPTIMIZER, REFERENCE, WEIGHTS
from dpo.models import Decoder, init_model, parse_config
from dpo.optim import OPTIMIZERS
from dpo.precision import precision_of
from dpo.prepare import prepare_policy
from dpo.quantization import quantize_linears
from dpo.rehearsal import Rows, outlined_policy, rehearse_step
from dpo.run_header import held_bytes
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "transformers", "matplotlib", "pyarrow")
RUNS = [
    *(["--optimizer", name] for name in OPTIMIZERS),
    ["--adapter", "lora"],
    ["--eval-split", "0.25", "--rates", "norm=0.1"],
]
CODE = """
import json, sys
from dpo.cli import main
for number, words in enumerate(json.loads(sys.argv[1])):
    main(["train", *words, "--out", f"run-{number}", "--quiet"], standalone_mode=False)
    print(json.dumps([words, sorted(set(json.loads(sys.argv[2])) & set(sys.modules))]))
"""
MODEL = parse_config(
    {
        "model_type": "llama",
        "vocab_size": 31,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
)


def test_run_that_compiles_nothing_imports_no_compiler(
    tmp_path: Path, make_model_folder: Callable[[Path], Path]
) -> None:
    model = make_model_folder(tmp_path / "model")
    rows = [{"prompt": f"say {n}", "chosen": " yes", "rejected": " no"} for n in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    usual = ["--model", str(model), "--data", "pairs.jsonl", "--steps", "2", "--batch-size", "2"]
    usual += ["--schedule", "constant"]
    words = [json.dumps([[*usual, *words] for words in RUNS]), json.dumps(HEAVY)]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(RUNS)
    assert [(words[len(usual) :], names) for words, names in found if names] == []


def count_passes(trainer: Trainer) -> list[None]:
    """A list that grows with each forward pass."""
    passes: list[None] = []
    trainer.module.register_forward_hook(lambda *_: passes.append(None))
    return passes


@pytest.mark.parametrize("has_held_out", [False, True])
def test_start_is_checked_with_what_the_first_step_computes(
    make_model: Callable[..., Decoder],
    make_pairs: Callable[..., TokenizedPairs],
    has_held_out: bool,
) -> None:
    """Four micro-batches for two steps; before an evaluation of two, one that shows the start."""
    pairs = make_pairs(4)
    config = TrainConfig(batch_size=4, micro_batch_size=2, steps=2, eval_every=None)
    held_out = pairs if has_held_out else None
    trainer = Trainer(make_model(), pairs, config, eval_pairs=held_out)
    passes = count_passes(trainer)
    trainer.train()
    assert len(passes) == (4 + 1 + 2 * 2 if has_held_out else 4)


def shapes(policy: nn.Module) -> dict[str, Any]:
    tensors = [*policy.named_parameters(), *policy.named_buffers()]
    return {name: (each.shape, each.dtype, each.requires_grad) for name, each in tensors}


@pytest.mark.parametrize("quantize", [None, "int8", "nf4-double"])
@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_outline_has_the_shapes_of_the_policy(kind: Any, quantize: Any) -> None:
    adapter = AdapterConfig(kind=kind, rank=4 if kind else None, quantize=quantize)
    train = TrainConfig(dtype="bfloat16")
    config = RunConfig(model="m", data="d", out="o", train=train, adapter=adapter)
    outline = outlined_policy(MODEL, config)
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    policy = Decoder(MODEL).to(precision_of(config.train).parameters)
    if quantize is not None:
        quantize_linears(policy, quantize)
    prepare_policy(policy, replace(config, train=train))
    assert shapes(outline) == shapes(policy)


KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, REFERENCE)


def run_config(**options: Any) -> RunConfig:
    """A run of one step on a row of 64 numbers a layer, an adapter of rank 4 if one is wanted."""
    names = {field.name for field in fields(AdapterConfig)}
    adapter: dict[str, Any] = {name: options.pop(name) for name in names & options.keys()}
    loss = LossConfig(name=options.pop("loss", "sigmoid"))
    usual = {"batch_size": 2, "steps": 3, "schedule": "constant", "device": "cpu"}
    train = TrainConfig(**{**usual, **options})
    if adapter:
        adapter["rank"] = 4
    return RunConfig(
        model="m",
        data="d",
        out="o",
        loss=loss,
        train=train,
        adapter=AdapterConfig(**adapter),
    )


@pytest.mark.parametrize("kind", [None, "lora"])
@pytest.mark.parametrize(
    "options",
    [
        *({"optimizer": name} for name in OPTIMIZERS),
        {"ema_decay": 0.9},
        {"dtype": "bfloat16", "stochastic_rounding": True, "optimizer": "lion"},
    ],
    ids=str,
)
def test_states_in_the_header_are_those_of_the_optimizer(
    make_pairs: Callable[..., TokenizedPairs], options: dict[str, Any], kind: Any
) -> None:
    if kind is not None and "stochastic_rounding" in options:
        options = {name: value for name, value in options.items() if name != "stochastic_rounding"}
    config = run_config(**options, **({} if kind is None else {"kind": kind}))
    policy = init_model(MODEL, dtype=precision_of(config.train).parameters)
    prepare_policy(policy, config)
    trainer = Trainer(policy, make_pairs(2), config.train)
    trainer.train_step()
    states = [each for state in trainer.optimizer.state.values() for each in state.values()]
    held = held_bytes(config, outlined_policy(MODEL, config))
    assert held[OPTIMIZER] == sum(each.nbytes for each in states)
    assert held[WEIGHTS] == sum(each.nbytes for each in policy.parameters())
    assert held[REFERENCE] == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bf16-mixed", "kind": "dora", "quantize": "nf4"},
        {"loss": "tdpo2", "optimizer": "adafactor"},
    ],
    ids=str,
)
def test_header_holds_what_the_rehearsal_of_an_update_holds(
    make_pairs: Callable[..., TokenizedPairs], options: dict[str, Any]
) -> None:
    config = run_config(**options)
    update = rehearse_step(config, MODEL, Rows(make_pairs(2), range(2)))["update"]
    held = held_bytes(config, outlined_policy(MODEL, config))
    assert held == {kind: update.get(kind, 0) for kind in KINDS}


def test_layers_draw_their_weights_where_there_is_memory() -> None:
    torch.manual_seed(0)
    policy = Decoder(MODEL)
    assert all(bool(weight.std() > 0) for weight in policy.parameters() if weight.dim() > 1)
