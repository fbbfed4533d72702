"""The learning-rate schedules.

A schedule maps an update's number ``step`` (from 0), the updates in the ``warmup`` and those in the
``total`` of the run to a factor on the learning rate. All rise linearly from 0 over the warm-up.

To add a schedule: a function of those three and a line in ``SCHEDULES``, by which tests go.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Final

Schedule = Callable[[int, int, int], float]


def linear(step: int, warmup: int, total: int) -> float:
    """Fall linearly to 0 at ``total``."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, warmup: int, total: int) -> float:
    """Fall along half a cosine to 0 at ``total``."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def constant(step: int, warmup: int, total: int) -> float:
    """Stay at 1."""
    return min(1.0, step / warmup) if warmup else 1.0


def warmup_stable_decay(step: int, warmup: int, total: int, *, decay_share: float = 0.2) -> float:
    """Stay at 1, then fall linearly to 0 over the last ``decay_share`` of the updates.

    Hu et al., arXiv:2404.06395; a fifth is the share that Hägele et al., arXiv:2405.18392, use.
    """
    if step < warmup:
        return step / warmup
    decay_start = max(warmup, total - round(decay_share * total))
    return min(1.0, max(0.0, (total - step) / max(1, total - decay_start)))


SCHEDULES: Final[dict[str, Schedule]] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
    "wsd": warmup_stable_decay,
}


def make_schedule(name: str, *, decay_share: float | None = None) -> Schedule:
    """Return the schedule of a name in ``SCHEDULES``, wsd with its ``decay_share`` if given."""
    if decay_share is None:
        return SCHEDULES[name]
    assert name == "wsd", f"{name} has no decay_share"
    return partial(warmup_stable_decay, decay_share=decay_share)
