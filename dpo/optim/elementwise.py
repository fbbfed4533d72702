"""AdamW as an update of each value by itself, which can be done a chunk at a time."""

import math

import torch
from torch import Tensor

from dpo.optim.eager import State, zeros_like
from dpo.optim.groups import ParameterGroup
from dpo.optim.parameterwise import ParameterwiseAdamW


class ElementwiseAdamW(ParameterwiseAdamW):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), as torch's."""

    def first_states(self, parameter: Tensor) -> State:
        """Return the states of ``parameter`` before its first update."""
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "mean": zeros_like(parameter),
            "square": zeros_like(parameter),
        }

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: State, group: ParameterGroup
    ) -> None:
        (beta1, beta2), number = group["betas"], state["step"].item()
        mean = state["mean"].lerp_(gradient, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square.sqrt() / math.sqrt(1 - beta2**number)).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**number))
