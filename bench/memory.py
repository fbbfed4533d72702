"""Hold the planner's peak of a step against the resident memory that a real one takes.

    MALLOC_MMAP_THRESHOLD_=65536 python -m dpo.bench.memory 135m-chat --recompute layer
    MALLOC_MMAP_THRESHOLD_=65536 torchrun --nproc-per-node 2 -m dpo.bench.memory 135m-chat \
        --parallel shard

Prints one JSON object: both peaks in MiB and the scenario; of several processes, those of the first
on its part of so many pairs for each. The variable makes the C library give memory back that is not
in use, which it else keeps: only then is resident what is in use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, get_args

import torch

from dpo.bench.machine import peak_mib
from dpo.bench.scenarios import SCENARIOS, SHAPES, Scenario
from dpo.bench.training import random_pairs
from dpo.config import RunConfig
from dpo.distributed import joined_ranks
from dpo.launch import Launch
from dpo.models import Decoder, init_model, parse_config
from dpo.models.config import ModelConfig
from dpo.parallel import kind_of_ranks
from dpo.precision import precision_of
from dpo.prepare import prepare_policy
from dpo.ranks import Ranks
from dpo.rehearsal import Rows, peak, rehearse_step
from dpo.rehearsed_ranks import ranks_alike
from dpo.scoring import MicroBatches
from dpo.tokenization import TokenizedPairs
from dpo.train_config import Parallel, Recompute, TrainConfig
from dpo.trainer import Trainer

_WARM_UP = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


def predicted_mib(scenario: Scenario) -> float:
    """Return the peak of a step of a scenario in one micro-batch of one process, rehearsed."""
    return Comparison(scenario, run_of(scenario)).predicted_mib()


@dataclass(frozen=True)
class Comparison:
    """A step of a scenario on this process, which may be one of several.

    Attributes:
        scenario: its pairs are those of each model, all in one micro-batch.
        config: of the run.
        ranks: that train together.
        alike: what they are to a rehearsal.
    """

    scenario: Scenario
    config: RunConfig
    ranks: Ranks = field(default_factory=Ranks)
    alike: Ranks = field(default_factory=Ranks)

    @property
    def pairs(self) -> TokenizedPairs:
        """Those of all ranks."""
        return random_pairs(self.scenario, self.config.train.batch_size)

    def predicted_mib(self) -> float:
        """Return the peak of the step, rehearsed."""
        pairs, ranks = self.pairs, self.ranks
        shares = MicroBatches.of_run(self.config.train, pairs).divide(
            range(len(pairs)), ranks.count
        )
        rows = Rows(pairs, shares[ranks.rank], is_alone=True)
        model = parse_config(SHAPES[self.scenario.shape])
        return sum(peak(rehearse_step(self.config, model, rows, self.alike)).values()) / 2**20

    def measured_mib(self) -> float | None:
        """Return the same of two real steps, the model included; None where it cannot be known."""
        shape = SHAPES[self.scenario.shape]
        train = partial(self._train, self.pairs)
        train(parse_config(shape | _WARM_UP))  # loads what is loaded once
        return peak_mib(partial(train, parse_config(shape)))

    def _train(self, pairs: TokenizedPairs, model: ModelConfig) -> None:
        """Make a model and do two steps."""
        policy = _make_policy(model, precision_of(self.config.train).parameters, self.ranks)
        prepare_policy(policy, self.config)
        trainer = Trainer(policy, pairs, self.config.train, ranks=self.ranks)
        trainer.train_step()
        trainer.train_step()


def _make_policy(model: ModelConfig, dtype: torch.dtype, ranks: Ranks) -> Decoder:
    """Make an untrained model, of which each of several ranks has its part, as one is loaded."""
    if ranks.processes == 1:
        return init_model(model, dtype=dtype)
    with torch.device("meta"):
        policy = Decoder(model).to(dtype)
    shapes = {name: weight.shape for name, weight in policy.named_parameters()}
    ranks.prepare(policy)
    weights = {
        name: ranks.divide(torch.randn(shapes[name], dtype=dtype) / shapes[name][-1] ** 0.5, place)
        for name, place in policy.named_parameters()
    }
    policy.load_state_dict(weights, strict=False, assign=True)
    policy.tie_weights()
    return policy


def run_of(scenario: Scenario, models: int = 1, **divided: Any) -> RunConfig:
    """Return a run of a scenario, with so many models that have its pairs each."""
    train = TrainConfig(
        batch_size=models * scenario.batch_size,
        micro_batch_size=models * scenario.batch_size,
        steps=10,
        dtype=scenario.dtype,
        device="cpu",
        share_prefix=scenario.shares_prefix,
        recompute=scenario.recompute,
        **divided,
    )
    return RunConfig(model="random", data="random", out="nothing", train=train)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=list(SCENARIOS))
    parser.add_argument("--recompute", choices=get_args(Recompute))
    parser.add_argument("--parallel", choices=get_args(Parallel), default="data")
    parser.add_argument("--tensor-ranks", type=int, default=1)
    options = parser.parse_args()
    scenario = replace(SCENARIOS[options.scenario], recompute=options.recompute)
    divided = {"parallel": options.parallel, "tensor_ranks": options.tensor_ranks}
    launch = Launch.of_environment()
    config = run_of(scenario, launch.count // options.tensor_ranks, **divided)
    with joined_ranks(torch.device("cpu"), kind_of_ranks(config)) as ranks:
        comparison = Comparison(scenario, config, ranks, ranks_alike(config, launch))
        found = {
            "predicted_mib": comparison.predicted_mib() if ranks.is_first else None,
            "measured_mib": comparison.measured_mib(),
            "settings": asdict(scenario) | divided,
            "ranks": ranks.processes,
            "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        }
        if ranks.is_first:
            sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
