"""Benchmarks of attention and of the log-prob head, forward and backward, against the plain way.

Shapes: K answer tokens, D hidden size, V vocabulary, N tokens, H heads, G key heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import torch
from torch import Tensor

from dpo.attention import BACKENDS, PLAIN
from dpo.bench.conftest import Measure
from dpo.log_probs import token_log_probs
from dpo.policy import OutputHead
from dpo.segments import Segments, plan_attention

K, D, V = 1024, 576, 49152  # SmolLM2's head
H, G, E = 9, 3, 64  # SmolLM2's attention


def naive_log_probs(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """(K,) log-probs by way of the (K, V) logits."""
    logits = hidden @ head.weight.T
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def tiled_log_probs(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """(K,) log-probs as the engine computes them."""
    return token_log_probs(hidden, targets, head).log_probs


def bare_products(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """(K,) numbers that need the same products and no softmax: the floor."""
    return (hidden @ head.weight.T).sum(dim=1)


HEADS: Final[dict[str, Callable[[Tensor, Tensor, OutputHead], Tensor]]] = {
    "tiled": tiled_log_probs,
    "naive": naive_log_probs,
    "bare-products": bare_products,
}


@pytest.mark.parametrize("name", HEADS)
def test_log_prob_head(measure: Measure, name: str) -> None:
    """1024 answer tokens through SmolLM2's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(K, D, generator=generator).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 0.02).requires_grad_()
    targets = torch.randint(V, (K,), generator=generator)

    def work() -> None:
        hidden.grad = weight.grad = None
        HEADS[name](hidden, targets, OutputHead(weight)).sum().backward()

    measure(work, tokens=K)


def test_heads_agree() -> None:
    """What is timed above is the same function."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(50, 16)
    targets = torch.arange(9)
    found, expected = (
        HEADS[name](hidden, targets, OutputHead(weight)) for name in ("tiled", "naive")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_attention(measure: Measure, backend: str) -> None:
    """8 pairs of 100 + 60 + 60 tokens through SmolLM2's heads."""
    lengths, parents = [100, 60] * 8 + [60] * 8, []
    for pair in range(8):
        parents += [None, 2 * pair]
    segments = Segments(tuple(lengths), (*parents, *range(0, 16, 2)))
    plan = plan_attention(segments)
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    query, key, value = (
        torch.randn(n, heads, E, generator=generator).requires_grad_() for heads in (H, G, G)
    )

    def work() -> None:
        query.grad = key.grad = value.grad = None
        BACKENDS[backend](query, key, value, plan, PLAIN).sum().backward()

    measure(work, tokens=n)
