"""What a run that goes on from a checkpoint must have in common with it.

To add an option that decides the mathematics of a run, add a line to ``training_identity``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo.errors import InputError
from dpo.losses import Loss
from dpo.optim import make_schedule
from dpo.sampling import make_sampler
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import TrainConfig

Identity = Mapping[str, int | float | str | None]


def training_identity(
    config: TrainConfig,
    loss: Loss,
    pairs: TokenizedPairs,
    eval_pairs: TokenizedPairs | None,
) -> Identity:
    """Return the data and the options without which resumed training would not be the same.

    The held-out pairs matter where they decide when the run ends or what is kept.
    """
    total_steps = config.total_steps(make_sampler(loss, pairs, config).steps_per_epoch)
    moves = loss.at_progress(0.0) != loss.at_progress(1.0)
    compares_evaluations = config.keep_best or config.early_stopping is not None
    return {
        "data": pairs.fingerprint,
        "eval_data": eval_pairs.fingerprint if eval_pairs and compares_evaluations else None,
        "loss": repr(loss),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "group_prompts": config.group_prompts,
        "router_loss": config.router_loss,
        "reference_sync_every": config.reference_sync_every,
        "reference_sync_share": config.reference_sync_share,
        "dtype": config.dtype,
        "tf32": config.tf32,
        "stochastic_rounding": config.stochastic_rounding or None,
        "optimizer": config.optimizer,
        "learning_rate": config.learning_rate,
        "schedule": config.schedule,
        "total_steps": total_steps,
        "loss_moves": moves or None,
        "decay_share": config.decay_share,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "epsilon": config.epsilon,
        "momentum": config.momentum,
        "rates": _shown(config.rates),
        "ema_decay": config.ema_decay,
    }


def _shown(rates: Mapping[str, float]) -> str | None:
    """Return the factors as one text, in their order, which counts."""
    return ", ".join(f"{pattern} = {float(rate)}" for pattern, rate in rates.items()) or None


def refuse_another_run(state: Mapping[str, Any], identity: Identity, *, source: str) -> None:
    """Compare the state of a checkpoint with what the run is.

    Args:
        state: holds the identity of the run that wrote it.
        identity: of the run that is to go on.
        source: where the state comes from, for the message.

    Raises:
        InputError: they differ; names each key with both values. The length of the run may be
            another one where neither a learning rate nor the loss of the steps done depends on it.
    """
    changed = {name: value for name, value in identity.items() if state.get(name) != value}
    is_longer = changed.keys() == {"total_steps"}
    if is_longer and _steps_done(state) == _steps_done({**state, **changed}):
        return
    if changed:
        shown = [f"{key} was {state.get(key)!r} and is {value!r}" for key, value in changed.items()]
        if is_longer:
            shown.append("on it depend learning rates, or the loss, of the steps done")
        raise InputError(f"cannot resume from {source}, the run has changed: {'; '.join(shown)}")


def _steps_done(state: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return what a checkpoint's steps had of the run's length: the rate's factor, the progress."""
    schedule = make_schedule(state["schedule"], decay_share=state["decay_share"])
    warmup, total = state["warmup_steps"], state["total_steps"]
    return [
        (schedule(step, warmup, total), step / total if state.get("loss_moves") else 0.0)
        for step in range(state["step"])
    ]
