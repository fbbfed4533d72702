"""Fixtures that several test modules build on: tiny real models and pairs, and TRL."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.models import Decoder, init_model, parse_config, save_model
from dpo.tokenization import TokenizedPair, TokenizedPairs, columns_of
from dpo.tokenizer import byte_tokenizer

# a worker for each core, and one thread for each of the processes that its tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

VOCAB = 31
PEERS = Path(__file__).parents[1] / "bench/peers/requirements.txt"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let nothing be skipped where CI is set: what a test needs is there, or the check is red."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
    return report


@pytest.fixture
def bytes_kept() -> Callable[..., int]:
    """Count the bytes that the backward pass of some work keeps, each memory once.

    That of its output, and of the tensors ``beside`` it, is not counted.
    """

    def count(work: Callable[[], torch.Tensor], *, beside: Iterable[torch.Tensor] = ()) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = work()
        for tensor in (*beside, output):
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(sizes.values())

    return count


@pytest.fixture
def make_model() -> Callable[..., Decoder]:
    """Make a tiny Llama; keywords change its config.json; the others its numbers."""

    def make(
        seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 5.0, **changes: object
    ) -> Decoder:
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        }
        model = init_model(parse_config(config | changes), seed=seed, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02, generator=generator)
                parameter.mul_(scale)  # logits that differ, so that a wrong one shows
        return model

    return make


@pytest.fixture
def make_pairs() -> Callable[..., TokenizedPairs]:
    """Make random tokenized pairs of the tiny model's vocabulary."""

    def make(count: int = 8, seed: int = 0, longest: int = 9) -> TokenizedPairs:
        generator = np.random.default_rng(seed)

        def text() -> np.ndarray[tuple[int], np.dtype[np.int32]]:
            size = int(generator.integers(1, longest + 1))
            return generator.integers(0, VOCAB, size).astype(np.int32)

        return columns_of(
            [
                TokenizedPair(text(), text(), text(), weight=1.0 + row % 3, id=f"row-{row + 1}")
                for row in range(count)
            ]
        )

    return make


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Let no file grow beyond some bytes; within, pytest must not write its own output."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture(scope="session")
def make_model_folder() -> Callable[..., Path]:
    """Write a tiny Llama with a tokenizer of bytes, as the Hub lays models out."""

    def make(folder: Path, *, seed: int = 0, **changes: object) -> Path:
        tokenizer = byte_tokenizer()
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.eos_id,
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_model(init_model(parse_config(config | changes), seed=seed), folder)
        tokenizer.save(folder)
        (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
        return folder

    return make


@pytest.fixture(scope="session")
def model_folder(
    make_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny model that no test changes."""
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def peers_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that has TRL as well as the packages of this one; needs PyPI."""
    folder = tmp_path_factory.mktemp("peers")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib"))  # torch is not fetched again
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python")]
    subprocess.run([*pip, "install", "--quiet", "-r", str(PEERS)], check=True)
    return folder / "bin/python"
