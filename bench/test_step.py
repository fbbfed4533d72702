"""Benchmarks of whole training steps: prefix sharing and the reference cache."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from dpo.bench.conftest import Measure
from dpo.bench.scenarios import SCENARIOS, SHAPES
from dpo.bench.smollm2 import smollm2
from dpo.bench.step import make_trainer
from dpo.bench.training import random_pairs
from dpo.models import Decoder, init_model, load_model, parse_config
from dpo.preferences import read_pairs
from dpo.tokenization import TokenizedPairs, tokenize_pairs
from dpo.tokenizer import load_tokenizer
from dpo.train_config import TrainConfig

HH: Final = Path(__file__).resolve().parents[1] / "tests/fixtures/hh_pairs.jsonl"
BATCH: Final = 8
CASES: Final = {
    "shared": (True, False),
    "not-shared": (False, False),
    "live-reference": (True, True),
}


def measure_step(measure: Measure, policy: Decoder, pairs: TokenizedPairs, case: str) -> None:
    """Time optimizer steps that take all of ``pairs``."""
    share_prefix, live_reference = CASES[case]
    config = TrainConfig(batch_size=len(pairs), steps=1000, share_prefix=share_prefix)
    trainer = make_trainer(policy, pairs, config, live_reference=live_reference)
    measure(trainer.train_step, pairs=len(pairs), useful_tokens=int(pairs.lengths().sum()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scenario", ["5m-chat", "5m-agent"])
def test_small_step(measure: Measure, scenario: str, case: str) -> None:
    """A step of 8 pairs of random tokens on a random Llama of 5 million weights, float32."""
    policy = init_model(parse_config(SHAPES["5m"]))
    measure_step(measure, policy, random_pairs(SCENARIOS[scenario], BATCH), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_smollm2_step(measure: Measure, case: str) -> None:
    """A step of 8 HH pairs on SmolLM2-135M, float32."""
    folder = smollm2()
    pairs = tokenize_pairs(read_pairs(HH)[:BATCH], load_tokenizer(folder)).pairs
    measure_step(measure, load_model(folder), pairs, case)
