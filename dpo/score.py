"""Implicit rewards of any preference pairs: ``dpo score``.

Shapes: P pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dpo.config import RunConfig
from dpo.device import choose_device
from dpo.errors import InputError
from dpo.files import atomic_write
from dpo.hub import fetch_model
from dpo.inputs import load_inputs
from dpo.losses import Loss, make_loss
from dpo.models import load_model
from dpo.policy import Policy
from dpo.precision import PRECISIONS, Precision
from dpo.progress import Console
from dpo.reference import ReferenceLogProbs
from dpo.reference_pass import obtain_references
from dpo.scoring import MicroBatches, score_rows
from dpo.tokenization import TokenizedPairs
from dpo.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class PairScore:
    """One pair under a policy; log-probs are sums over the answer, in nats."""

    id: str
    chosen_log_prob: float
    rejected_log_prob: float
    reference_chosen_log_prob: float
    reference_rejected_log_prob: float
    chosen_reward: float
    rejected_reward: float
    margin: float
    chosen_tokens: int
    rejected_tokens: int


def score_pairs(
    policy: nn.Module,
    pairs: TokenizedPairs,
    reference: ReferenceLogProbs,
    *,
    loss: str | Loss = "sigmoid",
    precision: str = "float32",
    tokens_per_micro_batch: int = 8192,
) -> list[PairScore]:
    """Score ``pairs``; the rewards are those that training with ``loss`` logs for the same rows.

    Args:
        policy: follows the ``Policy`` protocol.
        pairs: what to score.
        reference: reference log-probs of ``pairs``.
        loss: gives the rewards their meaning and scale.
        precision: a name in ``PRECISIONS``.
        tokens_per_micro_batch: tokens in a forward pass.

    Returns:
        The scores in the order of ``pairs``.
    """
    if not isinstance(policy, Policy):
        raise InputError(f"{type(policy).__name__} is no policy: it has no output_head()")
    batches = MicroBatches(pairs, reference, tokens_per_micro_batch=tokens_per_micro_batch)
    device = next(policy.parameters()).device
    return _score(policy, batches, make_loss(loss), PRECISIONS[precision], device)


def _score(
    policy: Policy, batches: MicroBatches, loss: Loss, precision: Precision, device: torch.device
) -> list[PairScore]:
    scores: dict[int, PairScore] = {}
    for rows in batches.split_sorted(range(len(batches.pairs))):
        pairs = score_rows(policy, batches, rows, precision=precision, device=device).pairs
        chosen_reward, rejected_reward = loss.rewards(pairs)
        columns = [
            pairs.chosen,
            pairs.rejected,
            pairs.reference_chosen,
            pairs.reference_rejected,
            chosen_reward,
            rejected_reward,
            chosen_reward - rejected_reward,
        ]
        values = torch.stack(columns, dim=1).tolist()  # (P, 7)
        tokens = torch.stack([pairs.chosen_tokens, pairs.rejected_tokens], dim=1).long().tolist()
        for row, of_pair, counts in zip(rows, values, tokens, strict=True):
            scores[row] = PairScore(batches.pairs.ids[row], *of_pair, *counts)
    return [scores[row] for row in range(len(batches.pairs))]


def score_file(config: RunConfig, *, console: Console) -> Path:
    """Write a line for every pair of ``config.data`` to ``config.out``.

    Raises:
        InputError: no reference is named, or the model or the data cannot be used.
    """
    if config.reference is None:
        raise InputError("dpo score needs --reference: the model that rewards are measured against")
    device = choose_device(config.train)
    source = fetch_model(config.model, config.revision)
    inputs = load_inputs(config, load_tokenizer(source), console)
    references = obtain_references(config, source, None, inputs, console)
    precision = PRECISIONS[config.train.dtype]
    policy = load_model(source, dtype=precision.parameters, device=device)
    batches = MicroBatches(
        inputs.pairs,
        references.pairs,
        micro_batch_size=config.train.micro_batch_size,
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        share_prefix=config.train.share_prefix,
    )
    scores = _score(policy, batches, config.loss.build(), precision, device)
    atomic_write(Path(config.out), "".join(_lines(scores)))
    return Path(config.out)


def _lines(scores: list[PairScore]) -> Iterator[str]:
    for score in scores:
        yield json.dumps(asdict(score), ensure_ascii=False) + "\n"
