"""The optimizers, gradient clipping and the learning-rate schedules.

To add an optimizer: a class or function as those of ``OPTIMIZERS``, a line there, and its name and
options in ``dpo.train_config``. A state of it is a tensor in ``state[parameter]``.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch

from dpo.optim.adamw8bit import AdamW8bit
from dpo.optim.clipping import clip_gradients
from dpo.optim.groups import (
    ParameterGroup,
    parameter_groups,
    rate_scales,
    set_learning_rate,
    trained_names,
)
from dpo.optim.lion import Lion
from dpo.optim.schedule_free import ScheduleFreeAdamW
from dpo.optim.schedules import SCHEDULES, make_schedule
from dpo.optim.torchs import MuonAndAdamW, adafactor, adamw

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "clip_gradients",
    "make_optimizer",
    "make_schedule",
    "parameter_groups",
    "rate_scales",
    "set_learning_rate",
    "trained_names",
]

OPTIMIZERS: Final[dict[str, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "adamw8bit": AdamW8bit,
    "adafactor": adafactor,
    "lion": Lion,
    "muon": MuonAndAdamW,
    "schedule-free": ScheduleFreeAdamW,
}


def make_optimizer(
    name: str, groups: Sequence[ParameterGroup], *, learning_rate: float, **options: float | None
) -> torch.optim.Optimizer:
    """Make an optimizer of a name in ``OPTIMIZERS``; options that are None are left out."""
    given = {key: value for key, value in options.items() if value is not None}
    return OPTIMIZERS[name](groups, learning_rate=learning_rate, **given)
