"""Ways to the log-probs of answer tokens, and the memory that each takes: the engine's and others.

Shapes: K answer tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import LinearCrossEntropyOptions

from dpo.log_probs import token_log_probs
from dpo.memory_tracker import MemoryTracker
from dpo.policy import OutputHead

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden (K, D), weight (V, D), targets (K,)


def tiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(K,) log-probs as the engine computes them."""
    return token_log_probs(hidden, targets, OutputHead(weight)).log_probs


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(K,) log-probs by way of the (K, V) logits, in float32 after the product."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(K,) log-probs by torch's function as it is called without options."""
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none")


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(K,) log-probs by torch's function in chunks of its choice."""
    options = LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def bare_products(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(K,) numbers that need the same products and no softmax: the floor."""
    return (hidden @ weight.T).sum(dim=1)


HEADS: Final[dict[str, Head]] = {
    "tiled": tiled,
    "naive": naive,
    "linear-cross-entropy": linear_cross_entropy,
    "chunked-cross-entropy": chunked_cross_entropy,
    "bare-products": bare_products,
}


def head_problem(
    tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random hidden (K, D), weight (V, D), both to be differentiated, and targets (K,)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, generator=generator) * 0.02
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight.to(dtype).requires_grad_(), targets


def head_memory(head: Head, tokens: int, hidden_size: int, vocabulary: int) -> int:
    """Return the bytes that forward and backward hold at most, inputs and gradients apart.

    Counted on tensors without memory, so any size can be asked for. Sees what runs as operations
    of torch: not inside of ``chunked_cross_entropy``.
    """
    tracker = MemoryTracker()
    with FakeTensorMode(), tracker:
        hidden = torch.empty(tokens, hidden_size, requires_grad=True)
        weight = torch.empty(vocabulary, hidden_size, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64)
        head(hidden, weight, targets).sum().backward()
    held = max(sum(kinds.values()) for kinds in tracker.peaks.values())
    return int(held) - 2 * (hidden.nbytes + weight.nbytes) - targets.nbytes
