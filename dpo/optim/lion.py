"""Lion."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo.optim.eager import State, zeros_like
from dpo.optim.groups import ParameterGroup
from dpo.optim.parameterwise import Parameterwise


class Lion(Parameterwise):
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

    def first_states(self, parameter: Tensor) -> State:
        """Return the states of ``parameter`` before its first update."""
        momentum = {"momentum": zeros_like(parameter)}
        return momentum if self.rounding is None else momentum | {"step": torch.zeros(())}

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: State, group: ParameterGroup
    ) -> None:
        (beta1, beta2), momentum = group["betas"], state["momentum"]
        direction = torch.lerp(gradient, momentum, beta1).sign_()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"])
        momentum.lerp_(gradient, 1 - beta2)
