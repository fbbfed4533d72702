"""The optimizers, gradient clipping and the learning-rate schedules.

To add an optimizer: a class or function as those of ``OPTIMIZERS``, a line there, and its name and
options in ``dpo.train_config``. A state of it is a tensor in ``state[parameter]``.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch

from dpo.errors import InputError
from dpo.optim.adamw8bit import AdamW8bit
from dpo.optim.clipping import clip_gradients
from dpo.optim.eager import EagerOptimizer
from dpo.optim.elementwise import ElementwiseAdamW
from dpo.optim.groups import (
    ParameterGroup,
    parameter_groups,
    rate_scales,
    set_learning_rate,
    trained_names,
)
from dpo.optim.lion import Lion
from dpo.optim.parameterwise import Parameterwise
from dpo.optim.rounding import StochasticRounding
from dpo.optim.schedule_free import ScheduleFreeAdamW
from dpo.optim.schedules import SCHEDULES, make_schedule
from dpo.optim.torchs import MuonAndAdamW, adafactor, adamw

__all__ = [
    "ELEMENTWISE",
    "OPTIMIZERS",
    "SCHEDULES",
    "EagerOptimizer",
    "StochasticRounding",
    "clip_gradients",
    "make_optimizer",
    "make_schedule",
    "parameter_groups",
    "rate_scales",
    "set_learning_rate",
    "trained_names",
]

OPTIMIZERS: Final[dict[str, Callable[..., EagerOptimizer]]] = {
    "adamw": adamw,
    "adamw8bit": AdamW8bit,
    "adafactor": adafactor,
    "lion": Lion,
    "muon": MuonAndAdamW,
    "schedule-free": ScheduleFreeAdamW,
}


ELEMENTWISE: Final[dict[str, Callable[..., Parameterwise]]] = {
    "adamw": ElementwiseAdamW,
    "lion": Lion,
}
"""Those that can round stochastically."""


def make_optimizer(
    name: str,
    groups: Sequence[ParameterGroup],
    *,
    learning_rate: float,
    rounding: StochasticRounding | None = None,
    **options: float | None,
) -> EagerOptimizer:
    """Make an optimizer of a name in ``OPTIMIZERS``; options that are None are left out.

    Raises:
        InputError: there is nothing to round.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if rounding is None:
        return OPTIMIZERS[name](groups, learning_rate=learning_rate, **given)
    if all(weight.dtype != torch.bfloat16 for group in groups for weight in group["params"]):
        raise InputError("train.stochastic_rounding: no weight that is trained is bfloat16")
    optimizer = ELEMENTWISE[name](groups, learning_rate=learning_rate, **given)
    optimizer.rounding = rounding
    return optimizer
