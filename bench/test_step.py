"""Benchmarks of whole training steps: prefix sharing, the reference cache, and collation."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest

from dpo.batching import collate
from dpo.bench.conftest import Measure
from dpo.bench.smollm2 import smollm2
from dpo.bench.step import make_trainer
from dpo.models import Decoder, init_model, load_model, parse_config
from dpo.preferences import read_pairs
from dpo.tokenization import TokenizedPair, TokenizedPairs, columns_of, tokenize_pairs
from dpo.tokenizer import load_tokenizer
from dpo.train_config import TrainConfig

HH: Final = Path(__file__).resolve().parents[1] / "tests/fixtures/hh_pairs.jsonl"
VOCAB: Final = 8192
BATCH: Final = 8
PROFILES: Final = {"even": (100, 60, 60), "long-prompt": (350, 20, 20)}  # tokens of each part
CASES: Final = {
    "shared": (True, False),
    "not-shared": (False, False),
    "live-reference": (True, True),
}


def small_llama() -> Decoder:
    """Make a random Llama of 5 million parameters."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    return init_model(parse_config(config), seed=0)


def random_pairs(profile: str, count: int = BATCH) -> TokenizedPairs:
    """Make pairs of random tokens whose parts have the lengths of ``profile``."""
    generator = np.random.default_rng(0)

    def pair(row: int) -> TokenizedPair:
        prompt, chosen, rejected = (
            generator.integers(0, VOCAB, size).astype(np.int32) for size in PROFILES[profile]
        )
        return TokenizedPair(prompt, chosen, rejected, id=f"row-{row + 1}")

    return columns_of([pair(row) for row in range(count)])


def measure_step(measure: Measure, policy: Decoder, pairs: TokenizedPairs, case: str) -> None:
    """Time optimizer steps that take all of ``pairs``."""
    share_prefix, live_reference = CASES[case]
    config = TrainConfig(batch_size=len(pairs), steps=1000, share_prefix=share_prefix)
    trainer = make_trainer(policy, pairs, config, live_reference=live_reference)
    measure(trainer.train_step, pairs=len(pairs), useful_tokens=int(pairs.lengths().sum()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("profile", PROFILES)
def test_small_step(measure: Measure, profile: str, case: str) -> None:
    """A step of 8 pairs on a small Llama, float32."""
    measure_step(measure, small_llama(), random_pairs(profile), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_smollm2_step(measure: Measure, case: str) -> None:
    """A step of 8 HH pairs on SmolLM2-135M, float32."""
    folder = smollm2()
    pairs = tokenize_pairs(read_pairs(HH)[:BATCH], load_tokenizer(folder)).pairs
    measure_step(measure, load_model(folder), pairs, case)


@pytest.mark.parametrize("profile", PROFILES)
def test_collate(measure: Measure, profile: str) -> None:
    """Putting 64 pairs into a stream."""
    pairs = list(random_pairs(profile, 64))
    measure(lambda: collate(pairs), rounds=20, pairs=len(pairs))
