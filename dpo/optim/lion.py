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
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

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


def lion(
    groups: Sequence[ParameterGroup], *, learning_rate: float, beta1: float, beta2: float
) -> torch.optim.Optimizer:
    """Make a `Lion`."""
    return Lion(groups, learning_rate, (beta1, beta2))
