"""The real SmolLM2-135M, built from PyPI and kept in the user's cache."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dpo.batching import collate
from dpo.bench.smollm2 import smollm2
from dpo.log_probs import completion_log_probs
from dpo.models import load_model
from dpo.preferences import read_pairs, write_pairs
from dpo.tokenization import tokenize_pairs
from dpo.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
PAIRS = Path(__file__).parent / "fixtures/hh_pairs.jsonl"


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return smollm2()


def test_log_probs_equal_those_of_transformers(model_folder: Path) -> None:
    pair = tokenize_pairs(read_pairs(PAIRS)[1:2], load_tokenizer(model_folder)).pairs[0]
    ours = load_model(model_folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    found, expected = completion_log_probs(ours, collate([pair]).texts).log_probs, []
    for answer in (pair.chosen_ids, pair.rejected_ids):
        ids = torch.tensor([[*pair.prompt_ids, *answer]])
        with torch.no_grad():
            log_probs = theirs(ids).logits[0].log_softmax(dim=-1)
        expected.append(
            log_probs[len(pair.prompt_ids) - 1 : -1].gather(1, ids[0, -len(answer) :, None])
        )
    torch.testing.assert_close(found, torch.cat(expected)[:, 0], rtol=0, atol=1e-4)


def test_tokens_equal_those_of_transformers(model_folder: Path) -> None:
    ours = load_tokenizer(model_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(model_folder)
    for pair in read_pairs(PAIRS):
        assert isinstance(pair.chosen, str)
        assert ours.encode(pair.chosen) == theirs(pair.chosen)["input_ids"]


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-5), ("bf16-mixed", 0.02)])
def test_training_on_human_preferences_lowers_the_loss(
    model_folder: Path, tmp_path: Path, dtype: str, noise: float
) -> None:
    short = sorted(read_pairs(PAIRS), key=lambda pair: len(f"{pair.prompt}{pair.chosen}"))[:2]
    write_pairs(short, tmp_path / "pairs.jsonl")
    command = [sys.executable, "-m", "dpo", "train", "--model", str(model_folder), "--quiet"]
    command += ["--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "run")]
    command += ["--eval-data", str(tmp_path / "pairs.jsonl"), "--dtype", dtype, "--steps", "2"]
    command += ["--batch-size", "2", "--learning-rate", "2e-5", "--schedule", "constant"]
    subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=noise)
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] - 0.01
    assert evaluations[-1]["eval/rewards/accuracy"] > evaluations[0]["eval/rewards/accuracy"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
