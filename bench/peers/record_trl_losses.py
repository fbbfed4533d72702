"""Write tests/fixtures/trl_losses.json: what TRL's losses are where ours are compared with them.

    python bench/peers/record_trl_losses.py --peers PEERS/bin/python

Makes the tiny model of ``tests/test_against_trl.py`` and has ``trl_steps.py`` train it in the
peers' environment on ``tests/fixtures/hh_pairs.jsonl``: float32, all pairs in each step, plain
AdamW, a constant rate, no clipping.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpo.models import init_model, parse_config, save_model
from dpo.tokenizer import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ROOT / "tests/fixtures/hh_pairs.jsonl"
SETTINGS = {"steps": 5, "batch-size": 16, "learning-rate": 3e-4, "beta": 0.1, "dtype": "float32"}


TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 258,  # of the bytes' tokenizer
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def make_model(folder: Path, shape: Mapping[str, Any] = TINY) -> None:
    """Write a model of random weights and a tokenizer of bytes to ``folder``."""
    folder.mkdir(exist_ok=True)
    model = init_model(parse_config(dict(shape)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the record holds for these numbers, however models are begun
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
    save_model(model, folder)
    byte_tokenizer(chat_template=None).save(folder)


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True, help="python of the peers' environment")
    peers = parser.parse_args().peers
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        options = [word for k, v in SETTINGS.items() for word in (f"--{k}", str(v))]
        command = [peers, str(ROOT / "bench/peers/trl_steps.py"), "--model", folder]
        command += ["--data", str(PAIRS), *options]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(printed.splitlines()[-1])
    record = {"trl": result["trl"], "settings": SETTINGS, "losses": result["losses"]}
    path = ROOT / "tests/fixtures/trl_losses.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
