"""The product inside a gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


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
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            opened = ctx.activation(gate)
        (by_gate,) = torch.autograd.grad(opened, gate, grads[0] * up)
        return by_gate, opened.detach().mul_(grads[0]), None
