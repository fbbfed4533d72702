"""What the contenders work on: a model folder and a file of pairs that both can read."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np

from dpo.bench.peers.record_trl_losses import make_model
from dpo.bench.scenarios import PROFILES, SHAPES
from dpo.bench.smollm2 import smollm2
from dpo.errors import InputError
from dpo.files import atomic_write


def model_folder(name: str | None, folder: Path) -> Path:
    """Return a model: SmolLM2-135M if None, one of random weights in ``folder``, or that of a path.

    Args:
        name: of a shape in ``SHAPES``, or a path.
        folder: to write to.
    """
    if name is None:
        return smollm2()
    if name not in SHAPES:
        return Path(name).resolve()
    make_model(folder / "model", SHAPES[name])
    return folder / "model"


def write_pairs(profile: str, count: int, folder: Path) -> Path:
    """Write pairs of random letters, each a token of a tokenizer of bytes, and return the file.

    Lengths are those of the profile; the token that ends an answer is one of it.
    """
    generator = np.random.default_rng(0)
    prompt, answer = PROFILES[profile].prompt, PROFILES[profile].answer

    def text(bounds: tuple[int, int], *, end: int = 0) -> str:
        size = int(generator.integers(bounds[0], bounds[1] + 1)) - end
        return "".join(generator.choice(list(string.ascii_letters), size))

    rows = [
        {"prompt": text(prompt), "chosen": text(answer, end=1), "rejected": text(answer, end=1)}
        for _ in range(count)
    ]
    path = folder / "pairs.jsonl"
    atomic_write(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def check_profile(profile: str | None, model: str | None) -> None:
    """Refuse a profile where a letter is no token.

    Raises:
        InputError: the model has a tokenizer of its own.
    """
    if profile is not None and model not in SHAPES:
        raise InputError(
            f"--profile {profile} needs a model of random weights, whose tokens are letters: "
            f"give --model {', '.join(SHAPES)}"
        )
