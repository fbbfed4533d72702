"""Gradient clipping."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dpo.ranks import Ranks


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, ranks: Ranks | None = None
) -> Tensor:
    """Scale the gradients in place so that their joint L2 norm is at most ``max_norm``.

    Never waits for the device. A norm that is not finite spoils the gradients: the caller looks at
    it before the update.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: None leaves the gradients as they are.
        ranks: those that may hold a part of each gradient; None for one that holds all.

    Returns:
        The norm before clipping: a scalar, float32 at least.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    ranks = ranks or Ranks()
    gradients = [ranks.part_of(p.grad) for p in with_gradient if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    # The public get_total_norm would round the norm of bfloat16 gradients to three digits.
    norms = torch._foreach_norm(gradients, 2, dtype)  # pyright: ignore[reportPrivateImportUsage]
    norm = ranks.joint_norm(torch.stack(norms), with_gradient)
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils does
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
    return norm
