"""Step-for-step equality with TRL, whose losses ``bench/peers/record_trl_losses.py`` wrote down."""

import json
from pathlib import Path

import pytest

from dpo.bench.peers.record_trl_losses import PAIRS, SETTINGS, make_model
from dpo.models import load_model
from dpo.preferences import read_pairs
from dpo.tokenization import tokenize_pairs
from dpo.tokenizer import load_tokenizer
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

RECORD = json.loads((Path(__file__).parent / "fixtures/trl_losses.json").read_text())


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("tokens_per_micro_batch", [300, 100_000])
def test_losses_of_five_steps_equal_those_of_trl(
    tmp_path: Path, share_prefix: bool, tokens_per_micro_batch: int
) -> None:
    assert RECORD["settings"] == SETTINGS
    make_model(tmp_path)
    config = TrainConfig(
        batch_size=16,
        steps=5,
        learning_rate=3e-4,
        schedule="constant",
        max_grad_norm=None,
        share_prefix=share_prefix,
        tokens_per_micro_batch=tokens_per_micro_batch,
    )
    pairs = tokenize_pairs(read_pairs(PAIRS), load_tokenizer(tmp_path)).pairs
    trainer = Trainer(load_model(tmp_path), pairs, config)
    losses = [step.metrics["loss"] for step in trainer if step.metrics is not None]
    assert losses == pytest.approx(RECORD["losses"], abs=1e-4)
    assert losses[-1] < 0.5
