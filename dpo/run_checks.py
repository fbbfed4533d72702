"""What is refused of a run before anything of it is computed."""

from __future__ import annotations

from dpo.adapter_files import adapter_parameters
from dpo.checkpoint import Checkpoint, checkpoint_path
from dpo.config import RunConfig
from dpo.errors import InputError
from dpo.identity import refuse_another_run, training_identity
from dpo.inputs import Inputs, Models
from dpo.optim import rate_scales, trained_names
from dpo.parallel import check_parts, is_in_parts
from dpo.rehearsal import outlined_policy
from dpo.trained_model import models_identity


def refuse_another(
    checkpoint: Checkpoint, config: RunConfig, models: Models, inputs: Inputs
) -> None:
    """Compare a checkpoint with the run that is to go on from it, before anything is computed.

    Raises:
        InputError: it is of another run, or lacks the best model that is to be kept.
    """
    training = training_identity(config.train, config.loss.build(), inputs.pairs, inputs.eval_pairs)
    identity = {**models_identity(config, models), **training}
    refuse_another_run(checkpoint.state, identity, source=str(checkpoint.path))
    best = checkpoint.state["best_step"]
    if not config.train.keep_best or best is None:
        return
    if not (path := checkpoint_path(checkpoint.path.parent, best)).exists():
        raise InputError(
            f"cannot resume from {checkpoint.path} with train.keep_best: {path}, the best so far, "
            "was not kept; go on with --no-keep-best"
        )


def check_models(config: RunConfig, models: Models) -> None:
    """Refuse before any data is read what cannot be trained in the way that is asked for.

    Raises:
        InputError: an option of an adapter or a name finds nothing, or a model cannot be in parts.
    """
    _check_adapter(config, models)
    _check_names(config, models)
    if is_in_parts(config.train):
        check_parts(config, models)


def _check_adapter(config: RunConfig, models: Models) -> None:
    """Refuse options of an adapter that the model at hand would ignore.

    Raises:
        InputError: an adapter is asked for twice, or an option asks for one that there is not.
    """
    has_adapter = models.policy.adapter is not None
    if has_adapter and config.adapter.kind is not None:
        raise InputError(
            f"adapter.kind is {config.adapter.kind}, but {models.policy.name} is an adapter "
            "already, which is trained on: leave adapter.kind away, or merge it first (dpo merge)"
        )
    if has_adapter or config.adapter.kind is not None:
        return
    for name in ("quantize", "b_rate_ratio"):
        if getattr(config.adapter, name) is not None:
            raise InputError(
                f"adapter.{name} needs an adapter to train: give adapter.kind, or a model that is "
                "an adapter"
            )


def _check_names(config: RunConfig, models: Models) -> None:
    """Refuse names of layers and of parameters that find none, by a policy without memory.

    The trainer and the adapter ask the same, but after the reference is computed.

    Raises:
        InputError: adapter.targets or a pattern of train.rates finds nothing.
    """
    if config.adapter.kind is None and not config.train.rates:
        return
    if (known := models.policy.adapter) is not None:
        names = adapter_parameters(known.path)
    else:
        names = trained_names(outlined_policy(models.policy.config, config))
    rate_scales(names, config.train.rates)
