"""Runs cases on several ranks and alone, and prints how far apart the two are.

Usage: equality.py DEVICE COUNT CASES, with CASES in JSON: options of ``Case`` by name. The ranks
are processes that are forked when torch is loaded; on the CPU they join over gloo, on GPUs, of
which each takes its own, over NCCL.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from dpo.adapters import Adapter, add_adapter
from dpo.device import choose_device
from dpo.distributed import JoinedRanks, joined_ranks
from dpo.launch import Launch
from dpo.losses import LOSSES
from dpo.models import Decoder, init_model, parse_config
from dpo.models.transforms import compile_blocks, recompute
from dpo.precision import PRECISIONS
from dpo.ranks import Ranks
from dpo.sharding import HybridRanks, ShardedRanks
from dpo.tensor_parallel import TensorRanks
from dpo.tokenized_pairs import TokenizedPair, TokenizedPairs, columns_of
from dpo.train_config import TrainConfig
from dpo.trainer import NonFiniteError, Trainer

VOCAB = 31
NOTHING = np.empty(0, np.int32)
EXPERTS = {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2,
           "sliding_window": None, "tie_word_embeddings": False}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        loss: its name.
        options: of the training.
        pairs: how many.
        prompts: different ones; None for as many as pairs.
        steps: to do.
        dtype: of the weights.
        unpaired: whether most rows have one answer.
        lora: the layers that get an adapter, which is trained; None for all training.
        keeps_no_activations: whether they are computed again.
        is_compiled: whether the blocks are, by the part of a compiler that traces.
        experts: whether the model has some.
        is_sharded: whether each rank holds a part of the model.
        machines: that the ranks are on, each with all parts of it; 0 for one copy over all.
        tensor_ranks: ranks that share a model and the pairs.
        model: entries of its config.json, beside the usual ones.
        short_rank: the rank that finds no memory for more than 60 tokens; None for none.
        is_poisoned: whether some rows have a loss that is not finite.
    """

    loss: str = "sigmoid"
    options: dict[str, Any] = field(default_factory=dict)
    pairs: int = 10
    prompts: int | None = 6
    steps: int = 3
    dtype: str = "float64"
    unpaired: bool = False
    lora: str | None = None
    keeps_no_activations: bool = False
    is_compiled: bool = False
    experts: bool = False
    is_sharded: bool = False
    machines: int = 0
    tensor_ranks: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    short_rank: int | None = None
    is_poisoned: bool = False


def make_model(case: Case, seed: int) -> Decoder:
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "tie_word_embeddings": True,
        **(EXPERTS if case.experts else {}), **case.model,
    }  # fmt: skip
    model = init_model(parse_config(config), seed=seed, dtype=getattr(torch, case.dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))
    return model


def make_pairs(case: Case) -> TokenizedPairs:
    generator = np.random.default_rng(0)

    def text() -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return generator.integers(0, VOCAB, int(generator.integers(1, 12))).astype(np.int32)

    rows = [
        TokenizedPair(text(), text(), text(), weight=1.0 + row % 3, id=f"row-{row}")
        for row in range(case.pairs)
    ]
    for number, row in enumerate(rows):
        row = replace(row, prompt_ids=rows[number % (case.prompts or case.pairs)].prompt_ids)
        if case.loss.startswith("aot"):
            row = replace(row, weight=1.0)
        if case.loss == "odpo":
            row = replace(row, margin=0.5 + number % 3)
        if case.loss == "plackett_luce" and number % 3:
            above = rows[number - 1]
            row = replace(row, prompt_ids=above.prompt_ids, chosen_ids=above.rejected_ids)
        if case.unpaired and number % 3:
            is_chosen = number % 2 == 0
            row = replace(
                row,
                chosen_ids=row.chosen_ids if is_chosen else NOTHING,
                rejected_ids=NOTHING if is_chosen else row.rejected_ids,
            )
        rows[number] = row
    return columns_of(rows)


class Poisoned(nn.Module):
    """A policy that is not finite where token 30 is read."""

    def __init__(self, policy: Decoder) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, stream: Any) -> torch.Tensor:
        bad = (stream.input_ids == VOCAB - 1)[:, None]
        hidden: torch.Tensor = self.policy(stream)
        return hidden + torch.where(bad, math.inf, 0.0).to(hidden.dtype)

    def output_head(self) -> Any:
        return self.policy.output_head()


def limit_memory(model: nn.Module) -> None:
    """Let a model find no memory for the gradient of more than 60 tokens."""

    def before(_module: nn.Module, arguments: tuple[Any]) -> None:
        if torch.is_grad_enabled() and len(arguments[0].input_ids) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(before)


def own_device(ranks: Ranks) -> torch.device:
    """Return the device of a rank; the first one's is also that of what runs alone."""
    return ranks.device if isinstance(ranks, JoinedRanks) else torch.device(sys.argv[1])


def make_trainer(case: Case, ranks: Ranks) -> Trainer:
    """Make a trainer whose policy is not its reference."""
    device = own_device(ranks)
    pairs, other = make_pairs(case), make_model(case, seed=1).to(device)
    kind, reference, mismatched = LOSSES[case.loss], None, None
    if kind.needs_reference and kind.token_statistic != "reference_kl":
        plain = columns_of([replace(pair, margin=0.0) for pair in pairs])
        before = Trainer(
            other, plain, loss="kto" if kind.needs_mismatch or case.unpaired else "sigmoid"
        )
        reference = before.batches.reference
        mismatched = before.mismatched.reference if before.mismatched else None
    policy: Any = make_model(case, seed=0).to(device)
    ranks.prepare(policy)
    if case.lora:
        add_adapter(policy, Adapter(4, 8.0), targets=case.lora, seed=0)
    if case.is_compiled:
        with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
            compile_blocks(policy)
    if case.keeps_no_activations:
        recompute(policy, "layer")
    policy = Poisoned(policy) if case.is_poisoned else policy
    options = {
        "batch_size": 4, "learning_rate": 1e-2, "schedule": "constant", "steps": case.steps,
        **case.options,
    }  # fmt: skip
    trainer = Trainer(
        policy,
        pairs,
        TrainConfig(**options),
        loss=case.loss,
        reference=reference,
        mismatched_reference=mismatched,
        reference_weights=None if case.lora else dict(other.named_parameters()),
        eval_pairs=pairs,
        eval_reference=reference,
        eval_mismatched_reference=mismatched,
        starts_at_reference=False,
        ranks=ranks,
    )
    if case.short_rank is not None and ranks.rank == case.short_rank and ranks.count > 1:
        limit_memory(trainer.module)
    return trainer


@dataclass(frozen=True)
class Outcome:
    """What a run left: weights, lines of metrics, notes, and the rows that were not finite."""

    weights: dict[str, torch.Tensor]
    lines: list[dict[str, float]]
    notes: list[str]
    rows: list[int]


def run(case: Case, ranks: Ranks) -> Outcome:
    trainer, lines, rows = make_trainer(case, ranks), [], []
    try:
        for step in trainer:
            lines += [dict(line) for line in (step.metrics, step.evaluation) if line]
    except NonFiniteError as error:
        rows = error.rows
    lines.append(trainer.evaluate())
    held = trainer.tensors()["model"]
    weights = {name: ranks.whole(weight, name).cpu() for name, weight in held.items()}
    return Outcome(weights, lines, trainer.notes, rows)


def difference(found: float, expected: float) -> float:
    """Return how far two numbers are apart, relative to a large one."""
    both_are_nan = math.isnan(found) and math.isnan(expected)
    return 0.0 if both_are_nan else abs(found - expected) / max(1.0, abs(expected))


def kind_of(case: Case, ranks: Ranks) -> Ranks:
    """Return joined ranks that divide what a case says."""
    assert isinstance(ranks, JoinedRanks)
    kind: Any = JoinedRanks
    if case.is_sharded:
        products = PRECISIONS[case.options.get("dtype", "float32")].autocast
        kind = partial(HybridRanks if case.machines else ShardedRanks, products=products)
    if case.tensor_ranks > 1:
        kind = partial(TensorRanks, size=case.tensor_ranks, kind=kind)
    launch = Launch.of_environment()
    launch = replace(launch, local_count=launch.count // max(1, case.machines))
    found: Ranks = kind(launch, ranks.store, ranks.device)
    return found


def compare(case: Case, ranks: Ranks) -> dict[str, Any]:
    """Run a case on all ranks and, on the first, alone; say how far apart they are."""
    ranks = kind_of(case, ranks)
    found = run(case, ranks)
    notes, are_equal = (
        int(ranks.max(len(found.notes))),
        not ranks.any(not is_of_first(found, ranks)),
    )
    if not ranks.is_first:
        return {}
    alone, before = run(case, Ranks()), make_trainer(case, Ranks()).module
    missing = {"health/update_ratio"} if ranks.in_step else set()
    apart = [
        (difference(line[name], value), f"line {number}: {name}")
        for number, (line, expected) in enumerate(zip(found.lines, alone.lines, strict=True))
        for name, value in expected.items()
        if name not in missing and not name.startswith(("perf/", "mem/", "time/"))
    ]
    of_names = [
        line.keys() | missing == other.keys() | missing
        for line, other in zip(found.lines, alone.lines, strict=True)
    ]
    return {
        "weights": max(float((w - alone.weights[n]).abs().max()) for n, w in found.weights.items()),
        "metrics": max(apart, key=lambda each: math.inf if math.isnan(each[0]) else each[0]),
        "names_are_equal": all(of_names),
        "ranks_are_equal": are_equal,
        "moved": max(
            float((found.weights[name] - parameter.detach().cpu()).abs().max())
            for name, parameter in before.named_parameters()
            if parameter.requires_grad
        ),
        "notes": notes,
        "rows": [found.rows, alone.rows],
    }


def is_of_first(outcome: Outcome, ranks: Ranks) -> bool:
    """Say whether the weights of this rank are those of the first, bit for bit."""
    if ranks.in_step:
        return True
    device = own_device(ranks)
    of_first = [weight.to(device, copy=True) for weight in outcome.weights.values()]
    ranks.share_weights(of_first)
    return all(
        torch.equal(a.cpu(), b) for a, b in zip(of_first, outcome.weights.values(), strict=True)
    )


def forked(count: int, device: Any, work: Callable[[Ranks], None]) -> list[int]:
    """Do ``work`` in so many processes that have joined; return their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
            }  # fmt: skip
            code = 1
            try:
                with joined_ranks(choose_device(TrainConfig(device=device))) as ranks:
                    work(ranks)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    count, cases = int(sys.argv[2]), json.loads(sys.argv[3])

    def work(ranks: Ranks) -> None:
        found = {name: compare(Case(**options), ranks) for name, options in cases.items()}
        if ranks.is_first:
            print(json.dumps(found))

    torch.set_num_threads(1)
    sys.exit(max(forked(count, sys.argv[1], work)))


if __name__ == "__main__":
    main()
