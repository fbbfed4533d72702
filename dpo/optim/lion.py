"""Lion."""

from collections.abc import Sequence

import torch

from dpo.optim.groups import ParameterGroup


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum: Chen et al. 2023 (arXiv 2302.06675), program 1.

    One state in place of AdamW's two; wants a learning rate some 3 to 10 times smaller.
    """

    def __init__(
        self,
        params: Sequence[ParameterGroup],
        *,
        learning_rate: float,
        beta1: float,
        beta2: float,
    ) -> None:
        defaults = {"lr": learning_rate, "betas": (beta1, beta2), "weight_decay": 0.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, gradient = state["momentum"], parameter.grad
                direction = torch.lerp(gradient, momentum, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - beta2)
