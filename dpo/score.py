"""Implicit rewards of any preference pairs and unpaired answers: ``dpo score``.

Shapes: P pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dpo.config import RunConfig
from dpo.device import choose_device, explained_lack_of_memory
from dpo.errors import InputError, RunError
from dpo.files import atomic_write
from dpo.inputs import find_models, load_all_pairs
from dpo.losses import Loss, TokenLoss, make_loss
from dpo.policy import Policy
from dpo.precision import PRECISIONS, Precision, precision_of
from dpo.progress import Console
from dpo.reference import (
    AnswerLogProbs,
    ReferenceCache,
    ReferenceLogProbs,
    compute_reference,
    reference_in_memory,
)
from dpo.reference_pass import References, obtain_references
from dpo.scoring import MicroBatches, answer_log_probs, score_rows
from dpo.tokenization import TokenizedPairs


@dataclass(frozen=True, slots=True)
class PairScore:
    """One pair under a policy; log-probs are sums over the answer, in nats.

    The reference's are None if the loss needs no reference. Of an answer that an unpaired row lacks
    all is None, as is the margin then, but for its 0 tokens. Pairs with the same prompt have the
    same ``prompt_hash``, so that they can be counted as one unit.
    """

    id: str
    prompt_hash: str
    chosen_log_prob: float | None
    rejected_log_prob: float | None
    reference_chosen_log_prob: float | None
    reference_rejected_log_prob: float | None
    chosen_reward: float | None
    rejected_reward: float | None
    margin: float | None
    chosen_tokens: int
    rejected_tokens: int


def score_pairs(
    policy: nn.Module,
    pairs: TokenizedPairs,
    reference: ReferenceLogProbs | None = None,
    *,
    loss: str | Loss = "sigmoid",
    precision: str = "float32",
    tokens_per_micro_batch: int = 8192,
) -> list[PairScore]:
    """Score ``pairs``; the rewards are those that training with ``loss`` logs for the same rows.

    Args:
        policy: follows the ``Policy`` protocol; its dropout is off meanwhile.
        pairs: what to score.
        reference: reference log-probs of ``pairs``, unless the loss needs none.
        loss: gives the rewards their meaning and scale.
        precision: a name in ``PRECISIONS``.
        tokens_per_micro_batch: tokens in a forward pass.

    Returns:
        The scores in the order of ``pairs``.

    Raises:
        InputError: the policy lacks the protocol, the loss its reference, or a row an answer that
            the loss compares with the other one, token by token.
        RunError: a log-prob is not finite.

    Example:
        >>> from dpo import load_model, load_tokenizer, read_pairs, reference_log_probs
        >>> from dpo import score_pairs, tokenize_pairs
        >>> pairs = tokenize_pairs(read_pairs("pairs.jsonl"), load_tokenizer("model")).pairs
        >>> policy = load_model("model")
        >>> scores = score_pairs(policy, pairs, reference_log_probs(policy, pairs))
        >>> scores[0].id, abs(scores[0].margin) < 1e-5  # at the reference there is no margin
        ('row-1', True)
    """
    loss = make_loss(loss)
    with _evaluating(policy) as scorer:
        _refuse_unpaired(pairs, loss)
        if loss.needs_reference and reference is None:
            raise InputError(f"the loss {loss} needs the reference log-probs of the pairs")
        batches = MicroBatches(
            pairs,
            reference,
            tokens_per_micro_batch=tokens_per_micro_batch,
            draw_seed=0 if loss.draws else None,
        )
        device = next(policy.parameters()).device
        return _score(scorer, batches, loss, PRECISIONS[precision], device)


def reference_log_probs(
    policy: nn.Module,
    pairs: TokenizedPairs,
    cache: ReferenceCache | None = None,
    *,
    precision: str = "float32",
    tokens_per_micro_batch: int = 8192,
) -> ReferenceLogProbs:
    """Compute what ``policy``, as it is now, says about ``pairs``: the reference of a training.

    Args:
        policy: follows the ``Policy`` protocol; its dropout is off meanwhile.
        pairs: what to score.
        cache: of this very policy; what it has is not computed again. None keeps no file.
        precision: a name in ``PRECISIONS``.
        tokens_per_micro_batch: tokens in a forward pass.

    Raises:
        InputError: the policy lacks the protocol.
        RunError: a log-prob is not finite.

    Example:
        >>> from dpo import load_model, load_tokenizer, read_pairs
        >>> from dpo import reference_log_probs, tokenize_pairs
        >>> pairs = tokenize_pairs(read_pairs("pairs.jsonl"), load_tokenizer("model")).pairs
        >>> reference = reference_log_probs(load_model("model"), pairs)
        >>> len(reference), [len(log_probs) for log_probs in reference[0]]
        (16, [3, 4])
    """
    batches = MicroBatches(pairs, tokens_per_micro_batch=tokens_per_micro_batch)
    device = next(policy.parameters()).device
    with _evaluating(policy) as scorer:

        def score(rows: Sequence[int]) -> list[AnswerLogProbs]:
            scored = score_rows(
                scorer, batches, rows, precision=PRECISIONS[precision], device=device
            )
            return answer_log_probs(scored)

        if cache is None:
            return reference_in_memory(score, pairs, batches=batches.split_sorted)
        return compute_reference(score, pairs, cache, batches=batches.split_sorted)


@contextmanager
def _evaluating(policy: nn.Module) -> Iterator[Policy]:
    """Switch dropout off for a while.

    Raises:
        InputError: the module is no policy.
    """
    if not isinstance(policy, Policy):
        raise InputError(f"{type(policy).__name__} is no policy: it has no output_head()")
    was_training = policy.training
    policy.eval()
    try:
        yield policy
    finally:
        policy.train(was_training)


def score_file(config: RunConfig, *, console: Console) -> Path:
    """Write a line for every pair of ``config.data`` to ``config.out``.

    Raises:
        InputError: no reference is named, or the model or the data cannot be used.
        RunError: the device's memory is full, or a log-prob is not finite.
    """
    out, loss = Path(config.out), config.loss.build()
    if out.is_dir():
        raise InputError(f"{out} is a folder: --out of dpo score is the file of scores")
    if loss.needs_reference and config.reference is None:
        raise InputError("dpo score needs --reference: the model that rewards are measured against")
    device = choose_device(config.train)
    models = find_models(config)
    inputs = load_all_pairs(config, models, console)
    _refuse_unpaired(inputs.pairs, loss)
    references = References()
    with explained_lack_of_memory():
        if loss.needs_reference:
            references = obtain_references(config, models, inputs, console, device=device)
        precision = precision_of(config.train)
        policy = models.policy.load(dtype=precision.parameters, device=device)
        batches = MicroBatches.of_run(config.train, inputs.pairs, references.pairs, loss=loss)
        with console.bar("score", len(inputs.pairs), unit="pairs") as bar:
            scores = _score(policy, batches, loss, precision, device, progress=bar.update)
    lines = (json.dumps(asdict(score), ensure_ascii=False) + "\n" for score in scores)
    atomic_write(out, "".join(lines))
    return out


def _refuse_unpaired(pairs: TokenizedPairs, loss: Loss) -> None:
    if isinstance(loss, TokenLoss) and pairs.is_unpaired.any():
        name = pairs.ids[int(pairs.is_unpaired.argmax())]
        raise InputError(f"row {name!r} has one answer alone, but rewards of {loss} need two")


def _score(
    policy: Policy,
    batches: MicroBatches,
    loss: Loss,
    precision: Precision,
    device: torch.device,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[PairScore]:
    scores: dict[int, PairScore] = {}
    for rows in batches.split_sorted(range(len(batches.pairs))):
        scored = score_rows(policy, batches, rows, precision=precision, device=device, loss=loss)
        pairs = scored.pairs
        chosen_reward, rejected_reward = loss.rewards(scored.loss_pairs)
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
            if not all(map(math.isfinite, of_pair)):
                raise RunError(
                    f"pair {batches.pairs.ids[row]!r}: its log-probs under the policy are not "
                    "finite: the weights are damaged or the dtype overflows (try float32)"
                )
            pair = batches.pairs[row]
            if batches.reference is None:
                of_pair[2:4] = None, None
            for side, answer in enumerate((pair.chosen_ids, pair.rejected_ids)):
                if not len(answer):
                    of_pair[side:6:2], of_pair[6] = [None] * 3, None
            prompt_hash = hashlib.sha256(pair.prompt_ids.tobytes()).hexdigest()[:16]
            scores[row] = PairScore(pair.id, prompt_hash, *of_pair, *counts)
        if progress is not None:
            progress(len(scores))
    return [scores[row] for row in range(len(batches.pairs))]
