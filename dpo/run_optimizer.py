"""The optimizer that the options of a run ask for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dpo.averaging import keep_moving_average
from dpo.optim import (
    EagerOptimizer,
    StochasticRounding,
    make_optimizer,
    parameter_groups,
    rate_scales,
    trained_names,
)
from dpo.train_config import TrainConfig


def make_run_optimizer(
    policy: nn.Module, config: TrainConfig, rate_factors: Mapping[str, float] = {}
) -> EagerOptimizer:
    """Make the optimizer of a run.

    Args:
        policy: whose parameters are trained.
        config: options of the run.
        rate_factors: on the learning rate by parameter name, besides those of ``config.rates``.
    """
    scales = rate_scales(trained_names(policy), config.rates)
    for name, factor in rate_factors.items():
        scales[name] = scales.get(name, 1.0) * factor
    optimizer = make_optimizer(
        config.optimizer,
        parameter_groups(policy, config.weight_decay, scales),
        learning_rate=config.learning_rate,
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        momentum=config.momentum,
        rounding=StochasticRounding(config.seed) if config.stochastic_rounding else None,
    )
    if config.ema_decay is not None:
        keep_moving_average(optimizer, config.ema_decay)
    return optimizer
