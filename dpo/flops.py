"""The arithmetic that training on some pairs cannot do without.

Shapes: P pairs.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpo.models import Decoder

Lengths: TypeAlias = NDArray[np.int64]


def training_flops(model: Decoder, lengths: Lengths, *, recomputes: bool = False) -> float:
    """Count what a step on pairs takes: 6 x active weights x useful tokens, and attention.

    A multiplication and its addition are two. Of the three passes through a product (forward, the
    gradient of its input, that of its weight) a frozen weight has two. The head counts for answers
    alone; padding, or a prompt a second time, never.

    Args:
        model: its parameters' shapes are read, and which are trained.
        lengths: (P, 3) tokens of prompt, chosen and rejected answer.
        recomputes: count the forward pass through the layers twice (activation checkpointing).
    """
    config, tokens, again = model.config, float(lengths.sum()), int(recomputes)
    total = 0.0
    for block, window, experts in zip(
        model.model.layers, config.windows, config.experts, strict=True
    ):
        for weight in block.parameters():
            share = experts.chosen / experts.count if experts and weight.dim() == 3 else 1.0
            total += share * (again + _passes(weight)) * _flops(weight) * tokens
        heads = config.heads * config.head_size
        total += (again + 3) * 4.0 * heads * visible_tokens(lengths, window)
    head = model.output_head().weight
    return total + _passes(head) * _flops(head) * float(lengths[:, 1:].sum())


def visible_tokens(lengths: Lengths, window: int | None = None) -> float:
    """Count over all tokens of (P, 3) pairs the tokens that each sees: itself and what is above."""
    prompt, answers = lengths[:, 0], lengths[:, 1:]
    ends = prompt[:, None] + answers  # (P, 2)
    above = _triangle(ends, window) - _triangle(prompt[:, None], window)
    return float(_triangle(prompt, window).sum() + above.sum())


def _triangle(length: Lengths, window: int | None) -> Lengths:
    """Sum min(place, window) over the places 1, 2, ... of texts."""
    near = length if window is None else np.minimum(length, window)
    return near * (near + 1) // 2 + (length - near) * (window or 0)


def _passes(weight: Tensor) -> int:
    return 3 if weight.requires_grad else 2


def _flops(weight: Tensor) -> float:
    """Per token and pass: none of a vector, which only scales."""
    return 2.0 * weight.numel() if weight.dim() > 1 else 0.0
