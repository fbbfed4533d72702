"""Benchmarks of what surrounds the steps of a run: reference pass, checkpoints, start-up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from dpo.bench.conftest import Measure
from dpo.bench.peers.record_trl_losses import PAIRS, make_model
from dpo.bench.scenarios import SCENARIOS, SHAPES, Scenario
from dpo.bench.smollm2 import smollm2
from dpo.bench.step import score_with
from dpo.bench.training import random_pairs
from dpo.checkpoint import load_checkpoint, save_checkpoint
from dpo.models import Decoder, init_model, load_model, parse_config, save_model
from dpo.reference import ReferenceCache, compute_reference
from dpo.scoring import MicroBatches
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

PAIRS_OF_PASS = 32
CONFIG = TrainConfig(batch_size=8, steps=1000)
SIZES = ["5m-chat", pytest.param("135m-chat-float32", marks=pytest.mark.slow)]


@pytest.fixture(params=SIZES)
def scenario(request: pytest.FixtureRequest) -> Scenario:
    """A model's shape and the lengths of pairs, float32."""
    return SCENARIOS[request.param]


@pytest.fixture
def policy(scenario: Scenario) -> Decoder:
    """The model, with random weights."""
    return init_model(parse_config(SHAPES[scenario.shape]))


@pytest.fixture
def pairs(scenario: Scenario) -> TokenizedPairs:
    """Random tokens."""
    return random_pairs(scenario, PAIRS_OF_PASS)


def passes_over(policy: Decoder, pairs: TokenizedPairs) -> Callable[[Path], object]:
    """Return what completes the cache in a folder for ``pairs`` and looks them up."""
    batches = MicroBatches.of_run(CONFIG, pairs)

    def complete(folder: Path) -> object:
        cache = ReferenceCache(folder, model="random", fingerprint="random", numerics={})
        score = score_with(policy, batches, CONFIG)
        return compute_reference(score, pairs, cache, batches=batches.split_sorted)

    return complete


def test_reference_pass(
    measure: Measure, policy: Decoder, pairs: TokenizedPairs, tmp_path: Path
) -> None:
    """All log-probs computed and written to a new cache."""
    complete, numbers = passes_over(policy, pairs), count()
    tokens = int(pairs.lengths().sum())
    measure(lambda: complete(tmp_path / str(next(numbers))), pairs=len(pairs), tokens=tokens)


def test_reference_from_cache(
    measure: Measure, policy: Decoder, pairs: TokenizedPairs, tmp_path: Path
) -> None:
    """All log-probs found on disk, hashes checked, as a second run does."""
    complete = passes_over(policy, pairs)
    complete(tmp_path)
    tokens = int(pairs.lengths().sum())
    measure(lambda: complete(tmp_path), pairs=len(pairs), tokens=tokens)


@pytest.fixture
def trainer(policy: Decoder, pairs: TokenizedPairs) -> Trainer:
    """A trainer after one step: its optimizer has states."""
    trainer = Trainer(policy, pairs, CONFIG)
    trainer.train_step()
    return trainer


def mebibytes(trainer: Trainer) -> float:
    """Return what a checkpoint of it holds."""
    tensors = (tensor for named in trainer.tensors().values() for tensor in named.values())
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def test_save_checkpoint(measure: Measure, trainer: Trainer, tmp_path: Path) -> None:
    """Weights and optimizer state to disk, with their hashes."""
    measure(
        lambda: save_checkpoint(tmp_path, 1, trainer.tensors(), trainer.state()),
        MiB=mebibytes(trainer),
    )


def test_load_checkpoint(measure: Measure, trainer: Trainer, tmp_path: Path) -> None:
    """The same back, hashes compared, into the trainer."""
    path = save_checkpoint(tmp_path, 1, trainer.tensors(), trainer.state())

    def load() -> None:
        checkpoint = load_checkpoint(path)
        trainer.restore(checkpoint.tensors, checkpoint.state)

    measure(load, MiB=mebibytes(trainer))


def test_load_model(measure: Measure, policy: Decoder, tmp_path: Path) -> None:
    """Weights from disk into a model."""
    save_model(policy, tmp_path)
    size = sum(parameter.nbytes for parameter in policy.parameters()) / 2**20
    measure(lambda: load_model(tmp_path), MiB=size)


@pytest.mark.parametrize(
    "words", [["-c", "import torch"], ["-m", "dpo", "--help"]], ids=["import-torch", "dpo-help"]
)
def test_start_of_a_process(measure: Measure, words: list[str]) -> None:
    """What a command cannot begin without."""
    command = [sys.executable, *words]
    measure(lambda: subprocess.run(command, check=True, capture_output=True), is_elsewhere=True)


def small(folder: Path) -> Path:
    """A model of 5 million random weights."""
    make_model(folder, SHAPES["5m"])
    return folder


def real(_folder: Path) -> Path:
    """SmolLM2-135M."""
    return smollm2()


@pytest.mark.parametrize("is_cached", [False, True], ids=["nothing-cached", "all-cached"])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(small, "float32", id="5m"),
        pytest.param(real, "bf16-mixed", id="smollm2", marks=pytest.mark.slow),
    ],
)
def test_start_to_first_step(
    measure: Measure, make: Callable[[Path], Path], dtype: str, is_cached: bool, tmp_path: Path
) -> None:
    """``dpo train`` from the command to the first line of metrics, its step of 4 pairs included."""
    model = make(tmp_path / "model")
    command = [sys.executable, "-m", "dpo", "train", "--model", str(model), "--dtype", dtype]
    command += ["--data", str(PAIRS), "--batch-size", "4", "--steps", "1000", "--log-every", "1"]
    numbers = count()

    def start() -> None:
        number = next(numbers)
        out = tmp_path / f"run-{number}"
        cache = tmp_path / "cache" if is_cached else tmp_path / f"cache-{number}"
        until_first_line([*command, "--out", str(out)], out / "metrics.jsonl", cache)

    measure(start, is_elsewhere=True)


def until_first_line(command: list[str], file: Path, cache: Path) -> None:
    """Run a command until it has written to ``file``, then kill it."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while not (file.exists() and file.stat().st_size):
            assert process.poll() is None, f"{command} ended before its first step"
            time.sleep(0.002)
        process.kill()
