"""Prints what a rank of many holds and exchanges in a micro-batch, without numbers or other ranks.

Usage: volumes.py CASES, with CASES in JSON: by name the ``count`` of ranks, the ``shape`` of a
config.json and the ``options`` of the training. The process group is one of torch's that only
counts, tensors have no memory, and of all layers two and three are run: the rest follows.

Shapes: N tokens, K answer tokens.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401  lets them take such tensors
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo.config import RunConfig
from dpo.launch import Launch
from dpo.log_probs import token_log_probs
from dpo.models import Decoder, ModelConfig, parse_config
from dpo.parallel import kind_of_ranks
from dpo.precision import precision_of
from dpo.segments import Segments, TokenStream, plan_attention
from dpo.train_config import TrainConfig

TOKENS, ANSWER_TOKENS = 2048, 512
A_MACHINE = 8


class Exchanged(TorchDispatchMode):
    """Counts the bytes of the largest tensor that each collective is given, by its name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            name = func._schema.name.removeprefix("c10d::").strip("_")
            self.nbytes[name] += max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def with_layers(model: ModelConfig, layers: int) -> ModelConfig:
    per_layer = {name: getattr(model, name)[:layers] for name in ("windows", "ropes", "experts")}
    return replace(model, layers=layers, **per_layer)


def measure(model: ModelConfig, ranks: Any) -> Counter[str]:
    """Return the bytes that are exchanged, and the numbers ``held`` by this rank and by all."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = Decoder(model)
        whole = sum(parameter.numel() for parameter in policy.parameters())
        ranks.prepare(policy)
        own = sum(ranks.part_of(parameter).numel() for parameter in policy.parameters())
        ids = torch.arange(TOKENS)
        stream = TokenStream(ids, ids, plan_attention(Segments((TOKENS,), (None,))))
        with Exchanged() as exchanged:
            hidden = policy(stream)[:ANSWER_TOKENS]
            scored = token_log_probs(hidden, ids[:ANSWER_TOKENS], policy.output_head())
            scored.log_probs.sum().backward()
    found: Counter[str] = exchanged.nbytes
    found.update(held=own, whole=whole)
    return found


def case(count: int, shape: dict[str, Any], options: dict[str, Any]) -> dict[str, int]:
    launch = Launch(count=count, local_count=A_MACHINE)
    kinds = {"MASTER_ADDR": "", "RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": A_MACHINE}
    os.environ.update({name: str(value) for name, value in kinds.items()})
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=count)
    train = TrainConfig(**options)
    kind = kind_of_ranks(RunConfig(model="M", data="D", out="R", train=train))
    ranks = kind(launch, store, torch.device("cpu"))
    model = parse_config(shape)
    with precision_of(train).context(ranks.device):
        two, three = (measure(with_layers(model, layers), ranks) for layers in (2, 3))
    dist.destroy_process_group()
    return {name: two[name] + (model.layers - 2) * (three[name] - two[name]) for name in three}


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps({name: case(**options) for name, options in cases.items()}))
