"""The balance of a model's experts over an optimizer step.

Shapes: N tokens in the stream, X experts, C experts that a token takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterUse:
    """How much each expert was asked for, summed over tokens and layers.

    A token counts once for each answer that it is read for, as if no text were shared: so sums do
    not depend on how texts are put together.

    Attributes:
        shares: (X,) sums of the router's softmax, differentiable.
        chosen: (X,) sums of how often the expert was taken.
        tokens: (), tokens times layers.
    """

    shares: Tensor
    chosen: Tensor
    tokens: Tensor


@runtime_checkable
class Routed(Protocol):
    """A policy with experts."""

    def record_routers(self) -> bool:
        """Let every forward pass keep what ``router_use`` needs; False if there are no experts."""
        ...

    def router_use(self, weights: Tensor) -> RouterUse:
        """Return the use of the last forward pass, its tokens weighed by (N,) ``weights``."""
        ...


def use_of(shares: Tensor, chosen: Tensor, weights: Tensor) -> RouterUse:
    """Sum up one layer.

    Args:
        shares: (N, X) softmax of the router.
        chosen: (N, C) int64, the experts that each token takes.
        weights: (N,) of the tokens.
    """
    taken = torch.zeros_like(shares).scatter_add_(
        1, chosen, torch.ones_like(chosen, dtype=shares.dtype)
    )
    weights = weights.to(shares.dtype)
    return RouterUse(weights @ shares, (weights @ taken).detach(), weights.sum())


def total_use(uses: Sequence[RouterUse]) -> RouterUse:
    """Sum the use of layers or of micro-batches."""
    return RouterUse(
        torch.stack([use.shares for use in uses]).sum(dim=0),
        torch.stack([use.chosen for use in uses]).sum(dim=0),
        torch.stack([use.tokens for use in uses]).sum(),
    )


def balance_loss(use: RouterUse) -> Tensor:
    """Return ``X sum_i f_i P_i``, with the mean choices f and the mean shares P of all tokens, ().

    Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6, over all layers together. Even shares
    give C; it grows as experts are preferred that are also taken more often.
    """
    return len(use.shares) * (use.chosen @ use.shares) / use.tokens.square()
