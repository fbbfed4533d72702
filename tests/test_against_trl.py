"""Step-for-step equality with TRL: live, and as ``record_trl_losses.py`` wrote it down."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dpo.bench.peers.record_trl_losses import PAIRS, ROOT, SETTINGS, make_model
from dpo.models import load_model
from dpo.preferences import read_pairs
from dpo.tokenization import tokenize_pairs
from dpo.tokenizer import load_tokenizer
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

RECORD = json.loads((ROOT / "tests/fixtures/trl_losses.json").read_text())


def our_losses(model: Path, *, share_prefix: bool, tokens_per_micro_batch: int) -> list[float]:
    """The settings of the record: all pairs in each step, plain AdamW, a constant rate."""
    config = TrainConfig(
        batch_size=16,
        steps=5,
        learning_rate=3e-4,
        schedule="constant",
        max_grad_norm=None,
        share_prefix=share_prefix,
        tokens_per_micro_batch=tokens_per_micro_batch,
    )
    pairs = tokenize_pairs(read_pairs(PAIRS), load_tokenizer(model)).pairs
    trainer = Trainer(load_model(model), pairs, config)
    return [step.metrics["loss"] for step in trainer if step.metrics is not None]


@pytest.mark.parametrize(
    ("share_prefix", "tokens_per_micro_batch"), [(True, 1500), (False, 100_000)]
)
def test_losses_of_five_steps_equal_those_that_trl_had(
    tmp_path: Path, share_prefix: bool, tokens_per_micro_batch: int
) -> None:
    assert RECORD["settings"] == SETTINGS
    make_model(tmp_path)
    losses = our_losses(
        tmp_path, share_prefix=share_prefix, tokens_per_micro_batch=tokens_per_micro_batch
    )
    assert losses == pytest.approx(RECORD["losses"], abs=1e-4)
    assert losses[-1] < 0.5


@pytest.mark.slow
def test_losses_of_five_steps_equal_those_of_trl(peers_python: Path, tmp_path: Path) -> None:
    make_model(tmp_path)
    command = [str(peers_python), "bench/peers/trl_steps.py", "--data", str(PAIRS)]
    command += ["--model", str(tmp_path)]
    command += [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT, env=offline)
    theirs = json.loads(printed.stdout.splitlines()[-1])
    assert theirs["trl"] == RECORD["trl"]
    losses = our_losses(tmp_path, share_prefix=True, tokens_per_micro_batch=8192)
    assert losses == pytest.approx(theirs["losses"], abs=1e-4)
