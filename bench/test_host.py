"""Benchmarks of what the host does to pairs before a model sees them, beside the step itself.

The rates of one model, in pairs/s, say how far the host is ahead of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dpo.batching import collate
from dpo.bench.conftest import Measure
from dpo.bench.scenarios import SHAPES
from dpo.bench.smollm2 import smollm2
from dpo.bench.step import make_trainer
from dpo.bench.test_step import BATCH, HH
from dpo.models import Decoder, init_model, load_model, parse_config
from dpo.pair import PreferencePair
from dpo.preferences import read_pairs
from dpo.tokenization import TokenizedPairs, tokenize_pairs
from dpo.tokenizer import Tokenizer, load_tokenizer, train_bpe
from dpo.train_config import TrainConfig

COPIES = 64  # of the fixture's 16 pairs, so that threads have something to do


@dataclass(frozen=True)
class Work:
    """Pairs before and after tokenization, and a model to train on them."""

    pairs: list[PreferencePair]
    tokenized: TokenizedPairs
    tokenizer: Tokenizer
    policy: Decoder


def small() -> tuple[Tokenizer, Decoder]:
    """A BPE tokenizer of the pairs' own texts and a random Llama of 5 million weights."""
    texts = [f"{pair.prompt}{pair.chosen}{pair.rejected}" for pair in read_pairs(HH)]
    return train_bpe(texts, 2048), init_model(parse_config(SHAPES["5m"]))


def real() -> tuple[Tokenizer, Decoder]:
    """SmolLM2-135M."""
    folder = smollm2()
    return load_tokenizer(folder), load_model(folder)


MODELS = [pytest.param(small, id="5m"), pytest.param(real, id="smollm2", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=MODELS)
def work(request: pytest.FixtureRequest) -> Work:
    """HH pairs, many times over, and a model."""
    make: Callable[[], tuple[Tokenizer, Decoder]] = request.param
    tokenizer, policy = make()
    pairs = [replace(pair, id=None) for pair in read_pairs(HH)] * COPIES
    return Work(pairs, tokenize_pairs(pairs, tokenizer).pairs, tokenizer, policy)


def test_tokenize(measure: Measure, work: Work) -> None:
    """Texts to tokens."""
    tokens = int(work.tokenized.lengths().sum())
    measure(
        lambda: tokenize_pairs(work.pairs, work.tokenizer), pairs=len(work.pairs), tokens=tokens
    )


def test_read_tokens_from_cache(measure: Measure, work: Work, tmp_path: Path) -> None:
    """The same from disk, as a second run does."""
    tokens = int(work.tokenized.lengths().sum())
    measure(
        lambda: tokenize_pairs(work.pairs, work.tokenizer, cache_dir=tmp_path),
        pairs=len(work.pairs),
        tokens=tokens,
    )


def test_collate(measure: Measure, work: Work) -> None:
    """Tokens of a batch to a stream with its segments."""
    pairs = [work.tokenized[row] for row in range(BATCH)]
    measure(lambda: collate(pairs), rounds=20, pairs=BATCH)


def test_step_beside_it(measure: Measure, work: Work) -> None:
    """An optimizer step on such a batch, which collates it too."""
    pairs = work.tokenized.take(range(BATCH))
    trainer = make_trainer(work.policy, pairs, TrainConfig(batch_size=BATCH, steps=1000))
    measure(trainer.train_step, pairs=BATCH, tokens=int(pairs.lengths().sum()))
