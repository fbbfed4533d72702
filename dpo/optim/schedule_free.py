"""AdamW without a schedule: Defazio et al. 2024, "The Road Less Scheduled" (arXiv 2405.15682)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dpo.optim.eager import State, zeros_like
from dpo.optim.groups import ParameterGroup
from dpo.optim.parameterwise import ParameterwiseAdamW


class ScheduleFreeAdamW(ParameterwiseAdamW):
    """AdamW-Schedule-Free, algorithm 1 of the paper.

    The parameters hold ``y``, at which gradients are taken; the states are ``base``, the paper's
    ``z``, and ``square``, its ``v``. The average ``x`` of the bases, which is what has been learnt,
    follows from ``y = (1 - beta1) z + beta1 x``, so there are two states, as in AdamW. A base has
    the square of its learning rate as its weight in the average.
    """

    def averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter that was updated and its average ``x``, of the same dtype."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    base = self.state[parameter]["base"]
                    yield parameter, base.lerp(parameter.detach(), 1 / group["betas"][0])

    def first_states(self, parameter: Tensor) -> State:
        """Return the states of ``parameter`` before its first update."""
        return {
            "step": torch.zeros((), dtype=torch.float64),
            "weight_sum": torch.zeros((), dtype=torch.float64),
            "base": parameter.detach().clone(),
            "square": zeros_like(parameter),
        }

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: State, group: ParameterGroup
    ) -> None:
        """Do one update in place, without making ``x``.

        With ``c`` the share of the new base in the average and ``d = z' - z`` its step, inserting
        ``x' = (1 - c) x + c z'`` gives ``y' = (1 - c) y + c z + (1 - beta1 (1 - c)) d``.
        """
        (beta1, beta2), base, square = group["betas"], state["base"], state["square"]
        rate = group["lr"] * math.sqrt(1 - beta2 ** state["step"].item())
        state["weight_sum"] += rate**2
        share = rate**2 / (state["weight_sum"].item() or 1.0)  # a warm-up begins with rate 0
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        change = (gradient / square.sqrt().add_(group["eps"])).add_(
            parameter, alpha=group["weight_decay"]
        )
        parameter.lerp_(base, share).add_(change, alpha=-rate * (1 - beta1 * (1 - share)))
        base.add_(change, alpha=-rate)
