"""The product inside a gated MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo.models.activations import Activation


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return ``activation(gate) * up``, keeping the two factors alone for the backward pass.

    Plain autograd would keep ``activation(gate)`` as well, which is cheap to make again; a compiler
    sees that by itself.
    """
    if torch.compiler.is_compiling():
        return activation(gate) * up
    product: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return product


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        by_gate = ctx.activation.backward(grads[0] * up, gate)
        return by_gate, ctx.activation(gate).mul_(grads[0]), None
