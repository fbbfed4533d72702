"""Averages of the weights over the steps, which are evaluated and saved in their place.

There are two kinds, and both live in the states of the optimizer, so that checkpoints have them: an
optimizer may average by itself and has the method of ``Averages``, or ``keep_moving_average`` is
called on one that does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from dpo.swap import swapped_in

_MOVING_AVERAGE: Final = "moving_average"  # name of the state


@runtime_checkable
class Averages(Protocol):
    """An optimizer whose averages, not its weights, are what has been learnt."""

    def averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter that was updated and its average."""
        ...


def keep_moving_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Let ``optimizer`` keep an exponential moving average of the weights, in float32.

    After each step ``average = decay * average + (1 - decay) * weight``; it begins with the weights
    after the first step.

    Args:
        optimizer: a hook is added to it, and a state to each parameter that it updates.
        decay: in (0, 1).
    """

    def update(optimizer: torch.optim.Optimizer, *_arguments: Any) -> None:
        for parameter, state in optimizer.state.items():
            weight = parameter.detach().float()
            if _MOVING_AVERAGE in state:
                state[_MOVING_AVERAGE].lerp_(weight, 1 - decay)
            else:
                state[_MOVING_AVERAGE] = weight.clone()

    optimizer.register_step_post_hook(update)


def moving_average_bytes(weights: Iterable[Tensor]) -> int:
    """Count what a moving average of ``weights`` takes."""
    return sum(weight.numel() * torch.float32.itemsize for weight in weights)


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the averages of ``optimizer``, if it has any, in place of the weights.

    When the block ends, the weights are back bit for bit.
    """
    averages = _averages(optimizer)
    with swapped_in((parameter, average.to(parameter.dtype)) for parameter, average in averages):
        yield


def _averages(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(optimizer, Averages):
        yield from optimizer.averages()
        return
    for parameter, state in optimizer.state.items():
        if _MOVING_AVERAGE in state:
            yield parameter, state[_MOVING_AVERAGE]
