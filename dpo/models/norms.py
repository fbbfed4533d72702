"""Norms of a token's numbers.

Shapes: N tokens, D hidden size, H heads, E size of a head.

To add one, put it into ``NORMS``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.models.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """Divides by the root of the mean square (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last dimension."""
        return rms_norm(x, self.weight, self.eps)


class ShiftedRMSNorm(nn.RMSNorm):
    """An RMSNorm whose weight is its gain less one, so that weight decay pulls gains to one."""

    def reset_parameters(self) -> None:
        """Make all gains one."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last dimension."""
        return rms_norm(x, 1.0 + self.weight, self.eps)


class JointRMSNorm(RMSNorm):
    """An RMSNorm over all heads of a token together."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm (N, H, E) over its last two dimensions; the weight is (H E,)."""
        return super().forward(x.flatten(1)).view_as(x)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float | None) -> Tensor:
    """Norm the last dimension of ``x``; equals ``torch.nn.functional.rms_norm``.

    Off CUDA, which has a kernel for it, torch makes it of parts that each keep what they need for
    the backward pass: here it is ``x`` and one number for each norm. A compiler joins the parts.
    """
    if x.is_cuda or torch.compiler.is_compiling():
        return F.rms_norm(x, gain.shape, gain, epsilon)
    normed: Tensor = _RMSNorm.apply(x, gain, epsilon)  # type: ignore[no-untyped-call]
    return normed


class _RMSNorm(torch.autograd.Function):
    """``y = g x r`` with ``r = (mean(x^2) + epsilon)^(-1/2)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if epsilon is None:
            epsilon = torch.finfo(x.dtype).eps
        scale = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (wide * scale).mul_(gain).to(torch.promote_types(x.dtype, gain.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale = ctx.saved_tensors
        unit = x * scale  # x r
        grad = grads[0].to(unit.dtype)
        by_x = by_gain = None
        if ctx.needs_input_grad[1]:
            by_gain = (grad * unit).flatten(0, -2).sum(dim=0).to(gain.dtype)
        if ctx.needs_input_grad[0]:
            # dx = r (g dy - x r mean(x r g dy))
            slope = grad * gain
            shared = torch.linalg.vecdot(slope, unit)[..., None] / x.shape[-1]
            by_x = slope.addcmul_(unit, shared, value=-1).mul_(scale).to(x.dtype)
        return by_x, by_gain, None


Norm = nn.RMSNorm | nn.LayerNorm
NORMS: Final[dict[str, Callable[[int, float], Norm]]] = {
    "rms": RMSNorm,
    "rms, gain less one": ShiftedRMSNorm,
    "layer": nn.LayerNorm,
    "layer, no bias": partial(nn.LayerNorm, bias=False),
}


def make_norm(config: ModelConfig) -> Norm:
    """Make a norm of a token's numbers."""
    return NORMS[config.norm](config.hidden_size, config.norm_epsilon)


def make_query_key_norm(config: ModelConfig, heads: int) -> nn.Module:
    """Make a norm of (N, H, E) queries or keys, or what stands in its place."""
    if config.query_key_norm is None:
        return nn.Identity()
    if config.query_key_norm == "all heads":
        return JointRMSNorm(heads * config.head_size, config.norm_epsilon)
    return NORMS[config.norm](config.head_size, config.norm_epsilon)
