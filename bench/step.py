"""Train with this engine and report the loss and the time of each step.

    python -m dpo.bench.step --model M --data pairs.jsonl --steps 5 --batch-size 8

Prints one JSON object of the form that ``peers/trl_steps.py`` prints: losses, step_seconds,
peak_mib, reference_seconds and the settings. Pairs in the order of the file, plain AdamW, constant
rate, no clipping.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch

from dpo.bench.machine import commit
from dpo.device import choose_device
from dpo.losses import make_loss
from dpo.models import Decoder, load_model
from dpo.models.transforms import compile_blocks, recompute
from dpo.policy import Policy
from dpo.precision import PRECISIONS
from dpo.preferences import read_pairs
from dpo.reference import AnswerLogProbs, ReferenceLogProbs, Score, reference_in_memory
from dpo.sampling import StepSampler
from dpo.scoring import (
    MicroBatches,
    ScoredPairs,
    answer_log_probs,
    score_batch,
    score_rows,
)
from dpo.step_scoring import StepScorer
from dpo.throughput import peak_memory_mib
from dpo.tokenization import TokenizedPairs, tokenize_pairs
from dpo.tokenizer import load_tokenizer
from dpo.train_config import Device, Dtype, Recompute, TrainConfig
from dpo.trainer import Trainer


@dataclass(frozen=True)
class FileOrder(StepSampler):
    """Takes the rows in the order of the file, from the start again after the last."""

    def rows(self, step: int) -> list[int]:
        """Rows of optimizer step ``step``."""
        first = step % self.steps_per_epoch * self.batch_size
        return list(range(first, min(first + self.batch_size, self.pairs)))


@dataclass
class LiveReferenceScorer(StepScorer):
    """Runs the reference model beside the policy in each step: what the cache saves.

    Attributes:
        reference_model: of the same tokens.
    """

    reference_model: Policy = field(kw_only=True)

    def __call__(self, rows: Sequence[int], batches: MicroBatches, step: int = 0) -> ScoredPairs:
        """Score ``rows`` by both models."""
        batch = batches.collate(rows, step=step).to(self.device)
        with self.precision.context(self.device):
            with torch.no_grad():
                reference = score_batch(self.reference_model, batch).tokens.log_probs
            return score_batch(self.policy, replace(batch, reference=reference))


def make_trainer(
    policy: Decoder,
    pairs: TokenizedPairs,
    config: TrainConfig,
    *,
    reference: ReferenceLogProbs | None = None,
    live_reference: bool = False,
    beta: float = 0.1,
) -> Trainer:
    """Make a trainer that takes ``pairs`` in their order.

    Args:
        policy: to train.
        pairs: to train on.
        config: the options.
        reference: log-probs of ``pairs``; the policy's own if None.
        live_reference: keep a copy of the policy and run it in each step.
        beta: of the sigmoid loss.
    """
    loss = make_loss("sigmoid", beta=beta)
    trainer = Trainer(policy, pairs, config, loss=loss, reference=reference)
    if live_reference:
        score, model = trainer.score, copy.deepcopy(policy).requires_grad_(False)
        trainer.score = LiveReferenceScorer(
            policy, loss, score.precision, score.device, score.throughput, reference_model=model
        )
    trainer.sampler = FileOrder(len(pairs), config.batch_size, config.seed)
    return trainer


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=8192)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32")
    parser.add_argument("--no-prefix-sharing", action="store_true")
    parser.add_argument("--live-reference", action="store_true", help="no cache: run it each step")
    parser.add_argument("--recompute", choices=get_args(Recompute))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    return parser.parse_args(words)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train and return what is to be printed."""
    config = TrainConfig(
        batch_size=options.batch_size,
        steps=options.steps,
        tokens_per_micro_batch=options.tokens_per_micro_batch,
        learning_rate=options.learning_rate,
        schedule="constant",
        max_grad_norm=None,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        share_prefix=not options.no_prefix_sharing,
    )
    device = choose_device(config)
    policy = load_model(options.model, dtype=PRECISIONS[options.dtype].parameters, device=device)
    if options.compile:
        compile_blocks(policy)
    if options.recompute is not None:
        recompute(policy, options.recompute)
    pairs = tokenize_pairs(read_pairs(options.data), load_tokenizer(options.model)).pairs
    started = time.perf_counter()
    reference = own_reference(policy, pairs, config)
    reference_seconds = time.perf_counter() - started
    trainer = make_trainer(
        policy,
        pairs,
        config,
        reference=reference,
        live_reference=options.live_reference,
        beta=options.beta,
    )
    lines = [step.metrics for step in trainer if step.metrics is not None]
    lengths = pairs.lengths().sum(axis=1)
    return {
        "losses": [line["loss"] for line in lines],
        "step_seconds": [line["perf/step_s"] for line in lines],
        "useful_tokens": [int(lengths[trainer.sampler.rows(s)].sum()) for s in range(len(lines))],
        "pairs": [len(trainer.sampler.rows(step)) for step in range(len(lines))],
        "reference_seconds": None if options.live_reference else reference_seconds,
        "peak_mib": peak_memory_mib(trainer.device),
        "settings": vars(options),
        "commit": commit(),
        "torch": torch.__version__,
    }


def own_reference(policy: Decoder, pairs: TokenizedPairs, config: TrainConfig) -> ReferenceLogProbs:
    """Score ``pairs`` with the policy as it is, as a run does before it trains."""
    batches = MicroBatches.of_run(config, pairs)
    score = score_with(policy, batches, config)
    return reference_in_memory(score, pairs, batches=batches.split_sorted)


def score_with(policy: Decoder, batches: MicroBatches, config: TrainConfig) -> Score:
    """Return what gives the log-probs of rows under ``policy``."""
    precision, device = PRECISIONS[config.dtype], next(policy.parameters()).device

    def score(rows: Sequence[int]) -> Sequence[AnswerLogProbs]:
        return answer_log_probs(
            score_rows(policy, batches, rows, precision=precision, device=device)
        )

    return score


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(parse())) + "\n")
