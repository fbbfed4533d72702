"""What the optimizers that update one parameter at a time have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dpo.optim.groups import ParameterGroup

State: TypeAlias = dict[str, Tensor]


class Parameterwise(torch.optim.Optimizer):
    """An optimizer whose step goes through the parameters and updates each by itself."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= self._start(parameter)
                self._update(parameter, parameter.grad, state, group)

    @abstractmethod
    def _start(self, parameter: Tensor) -> State:
        """Return the states of ``parameter`` before its first update."""

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
