"""What the optimizers that update one parameter at a time have in common."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo.optim.eager import EagerOptimizer, State
from dpo.optim.groups import ParameterGroup
from dpo.optim.rounding import StochasticRounding


class Parameterwise(EagerOptimizer):
    """An optimizer whose step goes through the parameters and updates each by itself.

    Attributes:
        rounding: of what is bfloat16, if not to the nearest; the update must be elementwise then.
    """

    rounding: StochasticRounding | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        all_of_them = ((group, each) for group in self.param_groups for each in group["params"])
        for place, (group, parameter) in enumerate(all_of_them):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state |= self.first_states(parameter)
            if "step" in state:
                state["step"] += 1
            if self.rounding is None:
                self._update(parameter, parameter.grad, state, group)
            else:
                gradient = parameter.grad
                self.rounding.apply(self._update, parameter, gradient, state, group, place=place)

    @abstractmethod
    def _update(
        self, parameter: Tensor, gradient: Tensor, state: State, group: ParameterGroup
    ) -> None:
        """Change ``parameter`` and its ``state`` in place, by the settings of its ``group``."""


class ParameterwiseAdamW(Parameterwise):
    """One with the settings of AdamW, under torch's names in the groups."""

    def __init__(
        self,
        params: Sequence[ParameterGroup],
        *,
        learning_rate: float,
        beta1: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        defaults = {"lr": learning_rate, "betas": (beta1, beta2), "eps": epsilon}
        super().__init__(params, {**defaults, "weight_decay": 0.0})
