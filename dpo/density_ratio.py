"""Weights by which bad answers count as if to the prompts of the good ones: ``dpo weigh``.

Where good and bad answers were given to different prompts, a classifier of answers learns to tell
prompts apart. The underlying distribution matching of BCO (Jung et al., arXiv:2404.04656) weighs a
bad answer by ``p(prompt | good) / p(prompt | bad)``, estimated by logistic regression on features
of the prompts.

Shapes: R rows, G different prompts, D features.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dpo.config import RunConfig
from dpo.device import choose_device, explained_lack_of_memory
from dpo.errors import InputError
from dpo.inputs import find_models, tell_left_out
from dpo.models import Decoder
from dpo.precision import Precision, precision_of
from dpo.preferences import load_pairs, write_pairs
from dpo.progress import Console
from dpo.scoring import MicroBatches
from dpo.segments import Segments, TokenStream, plan_attention
from dpo.tokenization import TokenizedPairs, tokenize_pairs

_DIGITS: Final = 6  # of a ratio in the file


def weigh_file(config: RunConfig, *, min_ratio: float, max_ratio: float, console: Console) -> Path:
    """Write the rows of ``config.data`` to ``config.out``, with the weights of bad answers changed.

    Args:
        config: the model whose hidden states are the features, the data and how to read it.
        min_ratio: least factor on a weight, at least 0.
        max_ratio: largest factor on a weight, at least ``min_ratio``.
        console: is told what became of the weights.

    Raises:
        InputError: an option is out of range, rows have two answers, all answers are good or all
            bad, or model or data cannot be used.
        RunError: the device's memory is full.
    """
    out = Path(config.out)
    _check(config, out, min_ratio, max_ratio)
    device, models = choose_device(config.train), find_models(config)
    (source,) = config.sources
    loaded = load_pairs(
        source,
        columns=config.columns,
        revision=config.data_revision,
        split=config.data_split,
        on_bad_row=config.on_bad_row,
        answer_turns=config.answer_turns,
    )
    tell_left_out(console, source, loaded)
    rows = loaded.pairs
    tokens = tokenize_pairs(
        rows, models.tokenizer, config.tokenize, source=source, on_bad_row=config.on_bad_row
    )
    for line in tokens.report.describe():
        console.say(line)
    pairs, precision = tokens.pairs, precision_of(config.train)
    _refuse_labels(pairs)
    with explained_lack_of_memory():
        model = models.policy.load(dtype=precision.parameters, device=device)
        budget = config.train.token_budget or 8192
        features = prompt_features(model, pairs, precision=precision, tokens_per_batch=budget)
    ratios = density_ratios(features, pairs)
    factors = np.where(pairs.has_rejected, ratios.clip(min_ratio, max_ratio).round(_DIGITS), 1.0)
    factor_by_id = dict(zip(pairs.ids, factors.tolist(), strict=True))
    kept = (row for row in rows if row.id in factor_by_id)
    write_pairs((replace(row, weight=row.weight * factor_by_id[str(row.id)]) for row in kept), out)
    of_bad = ratios[pairs.has_rejected]
    clipped = int(((of_bad < min_ratio) | (of_bad > max_ratio)).sum())
    console.say(
        f"{len(of_bad):,} bad answers: ratios {of_bad.min():.3g} to {of_bad.max():.3g}, median "
        f"{np.median(of_bad):.3g}; {clipped:,} clipped into [{min_ratio:g}, {max_ratio:g}]"
    )
    return out


@torch.no_grad()
def prompt_features(
    model: Decoder, pairs: TokenizedPairs, *, precision: Precision, tokens_per_batch: int = 8192
) -> Tensor:
    """Return the mean of the last hidden states over the tokens of each different prompt.

    Args:
        model: reads the prompts.
        pairs: whose prompts, numbered as by ``prompt_groups``.
        precision: of the forward pass.
        tokens_per_batch: tokens of the rows in a forward pass, answers counted; a longer one stands
            alone.

    Returns:
        (G, D) float32, on the CPU.
    """
    device = model.lm_head.weight.device
    groups = pairs.prompt_groups
    firsts = np.unique(groups, return_index=True)[1].tolist()  # (G,)
    features = torch.empty(len(firsts), model.config.hidden_size)
    batches = MicroBatches(pairs, tokens_per_micro_batch=tokens_per_batch)
    for rows in batches.split_sorted(firsts):
        prompts = [pairs[row].prompt_ids for row in rows]
        lengths = [len(prompt) for prompt in prompts]
        segments = Segments(tuple(lengths), (None,) * len(lengths))
        ids, positions = np.concatenate(prompts).astype(np.int64), segments.positions()
        stream = TokenStream(
            torch.from_numpy(ids), torch.from_numpy(positions), plan_attention(segments)
        )
        with precision.context(device):
            hidden = model(stream.to(device)).float().cpu()  # (N, D)
        means = torch.stack([part.mean(dim=0) for part in hidden.split(lengths)])
        features[torch.from_numpy(groups[rows])] = means
    return features


def density_ratios(features: Tensor, pairs: TokenizedPairs) -> NDArray[np.float64]:
    """Estimate ``p(prompt | good) / p(prompt | bad)`` for each row, (R,).

    The odds of a logistic regression whose two classes count as much as each other, with the
    penalty ``|w|^2 / 2`` that scikit-learn has, as in TRL. Features are standardized and divided by
    ``sqrt(D)``, so that a prompt's are about as long as an embedding of norm 1.

    Args:
        features: (G, D), of the prompts as ``prompt_groups`` numbers them.
        pairs: R unpaired answers, good and bad.
    """
    groups, count = torch.from_numpy(pairs.prompt_groups), len(features)
    good, bad = (
        torch.bincount(groups[torch.from_numpy(mask)], minlength=count).double() / mask.sum()
        for mask in (pairs.has_chosen, pairs.has_rejected)
    )  # (G,): the share of each prompt in the answers of a label
    spread = features.double().std(dim=0, correction=0)
    x = (features.double() - features.double().mean(dim=0)) / torch.where(spread > 0, spread, 1)
    x /= x.shape[1] ** 0.5
    slopes = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [slopes, offset],
        max_iter=1000,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        log_odds = x @ slopes + offset
        losses = good @ F.softplus(-log_odds) + bad @ F.softplus(log_odds)
        value: Tensor = losses / 2 + slopes.square().sum() / (2 * len(pairs))
        value.backward()
        return value

    optimizer.step(objective)
    ratios: NDArray[np.float64] = (x @ slopes + offset).detach().exp().numpy()
    return ratios[pairs.prompt_groups]


def _check(config: RunConfig, out: Path, min_ratio: float, max_ratio: float) -> None:
    if not 0 <= min_ratio <= max_ratio < float("inf"):
        raise InputError(
            "min-ratio must be at least 0 and max-ratio finite and no less, got "
            f"{min_ratio:g} and {max_ratio:g}"
        )
    if out.is_dir() or not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{out}: --out of dpo weigh is a file .jsonl or .jsonl.gz")
    if len(config.sources) > 1:
        raise InputError(f"dpo weigh takes one data set, but data names {len(config.sources)}")


def _refuse_labels(pairs: TokenizedPairs) -> None:
    """Refuse data without both kinds of single answers."""
    both = pairs.has_chosen & pairs.has_rejected
    if both.any():
        raise InputError(
            f"{both.sum()} rows have two answers (the first is {pairs.ids[int(both.argmax())]}), "
            "to the same prompt: density ratios are for unpaired answers, good and bad"
        )
    for label, mask in (("good", pairs.has_chosen), ("bad", pairs.has_rejected)):
        if not mask.any():
            raise InputError(f"no answer is {label}: there is no ratio of good to bad prompts")
