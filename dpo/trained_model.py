"""The model folder that a run leaves, at its end or of one of its checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dpo.adapter_files import save_adapter
from dpo.adapters import adapted_layers
from dpo.averaging import averaged_weights
from dpo.checkpoint import (
    Checkpoint,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
    restore_weights,
)
from dpo.config import RunConfig
from dpo.errors import InputError, RunError
from dpo.files import atomic_directory
from dpo.identity import Identity, refuse_another_run
from dpo.inputs import GENERATION_CONFIG, Models, find_models
from dpo.model_card import write_model_card
from dpo.models import Decoder, save_model
from dpo.precision import precision_of
from dpo.prepare import prepare_policy
from dpo.ranks import Ranks
from dpo.run_folder import CHECKPOINTS, read_evaluations
from dpo.run_optimizer import make_run_optimizer


def models_identity(config: RunConfig, models: Models) -> Identity:
    """Return what a checkpoint must have in common with the run beside what the trainer knows."""
    return {**models.fingerprints(), "adapter": config.adapter.identity()}


def write_trained_model(
    folder: Path,
    policy: Decoder,
    config: RunConfig,
    models: Models,
    evaluations: Sequence[Mapping[str, float]] = (),
    *,
    ranks: Ranks | None = None,
    hardware: str | None = None,
) -> None:
    """Write everything that a model folder holds into an existing, empty ``folder``.

    All of several ranks that hold parts of it call this, and the first writes.

    Args:
        folder: what becomes the model folder, or that of an adapter if the policy has one.
        policy: holds the weights to be saved.
        config: of the run.
        models: of the run.
        evaluations: from the first one to that of these weights; maybe none.
        ranks: that hold the policy; None for a process that is alone.
        hardware: what it was trained on, in words, if that is known.
    """
    ranks = ranks or Ranks()
    _save_policy(policy, folder, config, models, ranks)
    if not ranks.is_first:
        return
    models.tokenizer.save(folder)
    if (source := models.policy.path / GENERATION_CONFIG).exists():
        shutil.copyfile(source, folder / GENERATION_CONFIG)
    write_model_card(folder, config, evaluations, base_folder=models.policy.path, hardware=hardware)


def export_checkpoint(config: RunConfig, out: Path, *, step: int | None = None) -> int:
    """Write the model of a checkpoint to ``out``, as the run would have if it ended there.

    Args:
        config: of the run, whose data is not read.
        out: the folder of the model.
        step: of the checkpoint; None: the newest sound one.

    Returns:
        The step.

    Raises:
        InputError: there is no such checkpoint, the model that the run began with is another one,
            or ``out`` exists.
        RunError: the checkpoint is damaged.
    """
    with atomic_directory(out) as temporary:
        checkpoint = _find(Path(config.out) / CHECKPOINTS, step)
        models = find_models(config)
        refuse_another_run(
            checkpoint.state, models_identity(config, models), source=str(checkpoint.path)
        )
        dtype = precision_of(config.train).parameters
        policy = models.policy.load(dtype=dtype, device=torch.device("cpu"))
        prepare_policy(policy, config)
        restore_weights(policy, checkpoint.tensors["model"])
        optimizer = make_run_optimizer(policy, config.train)
        restore_optimizer(optimizer, policy, checkpoint.tensors["optimizer"])
        evaluations = read_evaluations(Path(config.out), up_to=checkpoint.step)
        with averaged_weights(optimizer):
            hardware = checkpoint.state.get("hardware")
            write_trained_model(temporary, policy, config, models, evaluations, hardware=hardware)
    return checkpoint.step


def _find(folder: Path, step: int | None) -> Checkpoint:
    if step is not None:
        return load_checkpoint(checkpoint_path(folder, step))
    newest = latest_checkpoint(folder)
    if newest.checkpoint is None:
        if newest.damaged:
            raise RunError(f"{folder}: no checkpoint is sound:\n  " + "\n  ".join(newest.damaged))
        raise InputError(f"{folder}: there is no checkpoint")
    return newest.checkpoint


def _save_policy(
    policy: Decoder, folder: Path, config: RunConfig, models: Models, ranks: Ranks
) -> None:
    """Write the model, or its adapter alone if it has one."""
    if not adapted_layers(policy):
        save_model(policy, folder, ranks=ranks)
        return
    if not ranks.is_first:
        return
    base, revision = config.model, config.revision
    if (known := models.policy.adapter) is not None:
        base, revision = known.base, known.base_revision
    if Path(base).exists():
        base = str(Path(base).resolve())
    save_adapter(policy, folder, base=base, base_revision=revision)
