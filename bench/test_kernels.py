"""Benchmarks of attention and of the log-prob head, forward and backward, against the plain way.

Shapes: K answer tokens, D hidden size, V vocabulary, N tokens, H heads, G key heads, E head size.
"""

from __future__ import annotations

import pytest
import torch

from dpo.attention import BACKENDS, PLAIN
from dpo.bench.conftest import Measure
from dpo.bench.heads import HEADS, head_problem
from dpo.segments import Segments, plan_attention

K, D, V = 1024, 576, 49152  # SmolLM2's head
H, G, E = 9, 3, 64  # SmolLM2's attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [K, pytest.param(4 * K, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HEADS)
def test_log_prob_head(measure: Measure, name: str, tokens: int, dtype: torch.dtype) -> None:
    """Answer tokens through SmolLM2's vocabulary."""
    hidden, weight, targets = head_problem(tokens, D, V, dtype)

    def work() -> None:
        hidden.grad = weight.grad = None
        HEADS[name](hidden, weight, targets).sum().backward()

    measure(work, tokens=tokens)


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
