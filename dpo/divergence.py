"""The KL divergence between two models' next-token distributions, without holding any logits.

Shapes: K places, D hidden size, V vocabulary, C vocabulary entries in a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo.log_probs import (
    HeadGradients,
    Predictions,
    TileMaker,
    default_tile_bytes,
    with_update,
)


def reference_kl(
    policy: Predictions, reference: Predictions, *, tile_bytes: int | None = None
) -> Tensor:
    """Return ``KL(reference || policy)`` at each place, (K,), in nats.

    Equals ``sum_v p_ref (log p_ref - log p)`` of the full (K, V) log-softmaxes. Differentiable in
    the policy; the reference has no gradient.

    Args:
        policy: hidden states (K, D) and the output projection.
        reference: the same of the reference, over the same V tokens; D may be another.
        tile_bytes: as for ``token_log_probs``.
    """
    size = tile_bytes or default_tile_bytes(policy.hidden.device)
    hidden, up = with_update(policy)
    frozen = (with_update(reference)[0].detach(), reference.head.detached())
    divergence: Tensor = _TiledKl.apply(  # type: ignore[no-untyped-call]
        hidden, policy.head.weight, up, policy.head.bias, policy.head, *frozen, size
    )
    return divergence


class _TiledKl(torch.autograd.Function):
    """Forward: running sums over vocabulary tiles of both models. Backward: the tiles once more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        up: Tensor | None,
        bias: Tensor | None,
        head: Any,
        reference_hidden: Tensor,
        reference_head: Any,
        tile_bytes: int,
    ) -> Tensor:
        policy = TileMaker(hidden, weight, up, bias, head.scale, head.softcap, tile_bytes)
        reference = TileMaker(
            reference_hidden,
            reference_head.weight,
            None if reference_head.update is None else reference_head.update.up,
            reference_head.bias,
            reference_head.scale,
            reference_head.softcap,
            tile_bytes,
            policy.narrow,
        )
        normalizer = hidden.new_full((len(hidden),), -torch.inf, dtype=policy.wide)
        top = torch.full_like(normalizer, -torch.inf)  # running max of the reference's z
        total = torch.zeros_like(normalizer)  # sum of e^(z_ref - top)
        total_gap = torch.zeros_like(normalizer)  # sum of e^(z_ref - top) (z_ref - z)
        for (_, tile), (_, of_reference) in zip(policy.tiles(), reference.tiles(), strict=True):
            normalizer = torch.logaddexp(normalizer, tile.logsumexp(dim=1))
            new_top = torch.maximum(top, of_reference.amax(dim=1))
            shrink = (top - new_top).exp()
            exps = (of_reference - new_top[:, None]).exp()  # (K, C)
            total = total * shrink + exps.sum(dim=1)
            total_gap = total_gap * shrink + torch.linalg.vecdot(exps, of_reference - tile)
            top = new_top
        reference_normalizer = top + total.log()
        ctx.save_for_backward(normalizer, reference_normalizer)
        ctx.tiles = (policy, reference)
        return (total_gap / total - reference_normalizer + normalizer).clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]  # (K,)
        normalizer, reference_normalizer = ctx.saved_tensors
        policy, reference = ctx.tiles
        gradients = HeadGradients(policy, grad, *ctx.needs_input_grad[:4])
        # d KL / d z = softmax(z) - softmax(z_ref)
        for (start, tile), (_, other) in zip(policy.tiles(), reference.tiles(), strict=True):
            slope = policy.slope(tile)
            tile.sub_(normalizer[:, None]).exp_()
            tile.sub_(other.sub_(reference_normalizer[:, None]).exp_())
            gradients.add_tile(start, tile if slope is None else tile.mul_(slope))
        return *gradients.result(), None, None, None, None
