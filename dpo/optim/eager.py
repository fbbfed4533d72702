"""Torch's optimizers without its compiler, whose import takes as long as that of torch itself.

``torch.optim`` keeps the compiler out of some methods by a wrapper that imports all of it on the
first call. Nothing compiles an optimizer here, so the methods inside are called by themselves.
"""

from abc import abstractmethod
from inspect import unwrap
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]


def zeros_like(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make zeros in the shape of ``parameter``.

    Torch's own, unless told how they lie in memory, imports sympy on the meta device to find out.
    """
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that can be made and emptied of gradients without the compiler."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)

    @abstractmethod
    def first_states(self, parameter: Tensor) -> State:
        """Return the states of ``parameter`` before its first update, a ``step`` of 0 among them.

        They take the memory that they will have, which is none on the meta device.
        """

    def state_bytes(self) -> int:
        """Count the bytes of the states that there are from the first step on."""
        return sum(
            state.nbytes
            for group in self.param_groups
            for parameter in group["params"]
            for state in self.first_states(parameter).values()
        )


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """Torch's AdamW."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))

    def first_states(self, parameter: Tensor) -> State:
        """Return two moments; torch makes its own like them."""
        moments = {name: zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros(()), **moments}


class Adafactor(EagerOptimizer, torch.optim.Adafactor):
    """Torch's Adafactor."""

    step = torch.no_grad()(unwrap(torch.optim.Adafactor.step))

    def first_states(self, parameter: Tensor) -> State:
        """Return the factors of a moment; torch makes its own like them."""
        step = {"step": torch.zeros(())}
        if parameter.dim() < 2:
            return {**step, "variance": zeros_like(parameter)}
        rows, columns = parameter[..., :1], parameter[..., :1, :]
        return {**step, "row_var": zeros_like(rows), "col_var": zeros_like(columns)}


class Muon(EagerOptimizer, torch.optim.Muon):
    """Torch's Muon."""

    step = torch.no_grad()(unwrap(torch.optim.Muon.step))

    def first_states(self, parameter: Tensor) -> State:
        """Return a momentum; torch makes its own like it."""
        return {"momentum_buffer": zeros_like(parameter)}
