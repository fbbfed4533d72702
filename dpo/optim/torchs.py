"""Torch's own optimizers."""

from collections.abc import Sequence
from typing import Final

import torch

from dpo.optim.groups import ParameterGroup

FUSED_DEVICES: Final = frozenset({"cpu", "cuda", "mps", "xpu"})


def adamw(
    groups: Sequence[ParameterGroup],
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> torch.optim.AdamW:
    """Make an AdamW over ``groups``, in one fused kernel on the devices that have one."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=(beta1, beta2),
        eps=epsilon,
        fused=devices <= FUSED_DEVICES,
    )


def adafactor(groups: Sequence[ParameterGroup], *, learning_rate: float) -> torch.optim.Optimizer:
    """Make torch's Adafactor: factored squares, no mean (Shazeer and Stern 2018, arXiv 1804.04235).

    A step is the learning rate, at most 1 / sqrt(step), times the size of the parameter.
    """
    return torch.optim.Adafactor(groups, lr=learning_rate)
