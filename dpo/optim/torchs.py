"""Torch's own optimizers, and what is made of them."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from dpo.optim.eager import Adafactor, AdamW, EagerOptimizer, Muon, State
from dpo.optim.groups import ParameterGroup

FUSED_DEVICES: Final = frozenset({"cpu", "cuda", "mps", "xpu"})


def adamw(
    groups: Sequence[ParameterGroup],
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> AdamW:
    """Make an AdamW over ``groups``, in one fused kernel on the devices that have one."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return AdamW(
        groups,
        lr=learning_rate,
        betas=(beta1, beta2),
        eps=epsilon,
        fused=devices <= FUSED_DEVICES,
    )


def adafactor(groups: Sequence[ParameterGroup], *, learning_rate: float) -> Adafactor:
    """Make torch's Adafactor: factored squares, no mean (Shazeer and Stern 2018, arXiv 1804.04235).

    A step is the learning rate, at most 1 / sqrt(step), times the size of the parameter.
    """
    return Adafactor(groups, lr=learning_rate)


class MuonAndAdamW(EagerOptimizer):
    """Muon for the hidden matrices, AdamW for all else, as one optimizer.

    Muon steps along the momentum with its singular values made equal (Jordan 2024,
    kellerjordan.github.io/posts/muon), which is meant for maps between hidden vectors; embeddings,
    output head, norms and biases are AdamW's by convention. The steps of Muon are scaled to the
    size of AdamW's (Liu et al. 2025, arXiv 2502.16982, equation 4), so one learning rate is for
    both. The two share the groups and the states of this optimizer.
    """

    def __init__(
        self,
        params: Sequence[ParameterGroup],
        *,
        learning_rate: float,
        momentum: float,
        beta1: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        super().__init__(params, {"lr": learning_rate})
        hidden = [group for group in self.param_groups if group["is_hidden"]]
        others = [group for group in self.param_groups if not group["is_hidden"]]
        self.parts: list[EagerOptimizer] = []
        if hidden:
            scaling = "match_rms_adamw"
            muon = Muon(hidden, learning_rate, momentum=momentum, adjust_lr_fn=scaling)
            self.parts.append(muon)
        if others:
            options = {"beta1": beta1, "beta2": beta2, "epsilon": epsilon}
            self.parts.append(adamw(others, learning_rate=learning_rate, **options))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    def first_states(self, parameter: Tensor) -> State:
        """Return those of the part that updates ``parameter``."""
        (part,) = (
            part
            for part in self.parts
            if any(parameter is each for group in part.param_groups for each in group["params"])
        )
        return part.first_states(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.step()
