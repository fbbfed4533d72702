"""Hold the planner's peak of a step against the resident memory that a real one takes.

    MALLOC_MMAP_THRESHOLD_=65536 python -m dpo.bench.memory 135m-chat --recompute layer

Prints one JSON object: both peaks in MiB and the scenario. The variable makes the C library give
memory back that is not in use, which it else keeps: only then is resident what is in use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from typing import get_args

from dpo.bench.machine import peak_mib
from dpo.bench.scenarios import SCENARIOS, SHAPES, Scenario
from dpo.bench.training import random_pairs
from dpo.config import RunConfig
from dpo.models import init_model, parse_config
from dpo.models.config import ModelConfig
from dpo.precision import precision_of
from dpo.prepare import prepare_policy
from dpo.rehearsal import Rows, peak, rehearse_step
from dpo.tokenization import TokenizedPairs
from dpo.train_config import Recompute, TrainConfig
from dpo.trainer import Trainer

_WARM_UP = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


def predicted_mib(scenario: Scenario) -> float:
    """Return the peak of a step of a scenario in one micro-batch, rehearsed."""
    rows = Rows(_pairs(scenario), range(scenario.batch_size), is_alone=True)
    model = parse_config(SHAPES[scenario.shape])
    return sum(peak(rehearse_step(_config(scenario), model, rows)).values()) / 2**20


def measured_mib(scenario: Scenario) -> float | None:
    """Return the same of two real steps, the model included; None where it cannot be known."""
    shape = SHAPES[scenario.shape]
    train = partial(_train, _config(scenario), _pairs(scenario))
    train(parse_config(shape | _WARM_UP))  # loads what is loaded once
    return peak_mib(partial(train, parse_config(shape)))


def _train(config: RunConfig, pairs: TokenizedPairs, model: ModelConfig) -> None:
    """Make a model and do two steps."""
    policy = init_model(model, dtype=precision_of(config.train).parameters)
    prepare_policy(policy, config)
    trainer = Trainer(policy, pairs, config.train)
    trainer.train_step()
    trainer.train_step()


def _pairs(scenario: Scenario) -> TokenizedPairs:
    return random_pairs(scenario, scenario.batch_size)


def _config(scenario: Scenario) -> RunConfig:
    train = TrainConfig(
        batch_size=scenario.batch_size,
        micro_batch_size=scenario.batch_size,
        steps=10,
        dtype=scenario.dtype,
        device="cpu",
        share_prefix=scenario.shares_prefix,
        recompute=scenario.recompute,
    )
    return RunConfig(model="random", data="random", out="nothing", train=train)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=list(SCENARIOS))
    parser.add_argument("--recompute", choices=get_args(Recompute))
    options = parser.parse_args()
    scenario = replace(SCENARIOS[options.scenario], recompute=options.recompute)
    found = {
        "predicted_mib": predicted_mib(scenario),
        "measured_mib": measured_mib(scenario),
        "settings": asdict(scenario),
        "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
