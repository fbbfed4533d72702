"""Training checkpoints: complete or not there, checked byte for byte, and free of pickle.

A checkpoint is a folder ``step-000100`` with one ``<stem>.safetensors`` for each mapping of named
tensors (model, optimizer, random number generators), ``state.json`` for all that is not a tensor,
and ``manifest.json`` with the hash of every file. The writer holds the run's ``FolderLock``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dpo.errors import InputError, RunError
from dpo.files import (
    JSON,
    OTHER_SHAPE,
    atomic_directory,
    read_json,
    remove_folder,
    remove_leftovers,
    verify_manifest,
    write_json,
    write_manifest,
)
from dpo.ranks import Ranks
from dpo.tensor_files import read_tensors, write_tensors

FORMAT = 1
_COUNTS = ("step", "weight_sum")  # states of an optimizer that the host reads at each step


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and found sound.

    Attributes:
        path: the folder it was read from.
        step: optimizer steps done when it was written.
        tensors: file stem to named tensors, on the CPU; names that shared memory share it again.
        state: what was given to ``save_checkpoint`` as ``state``.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class NewestCheckpoint:
    """What ``latest_checkpoint`` found.

    Attributes:
        checkpoint: the newest sound one, or None if there is none.
        damaged: for every newer one, newest first, what is wrong with it.
    """

    checkpoint: Checkpoint | None
    damaged: tuple[str, ...]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
) -> Path:
    """Write ``folder/step-<step>`` in one step, in the place of one of that step if there is one.

    Args:
        folder: the run's folder of checkpoints.
        step: optimizer steps done.
        tensors: file stem to named tensors, on any device; tied tensors are stored once.
        state: everything else that resuming needs.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written; what was there before is unharmed, nothing is added.
    """
    remove_leftovers(folder)
    path = checkpoint_path(folder, step)
    with atomic_directory(path, replace=True) as temporary:
        for stem, named in tensors.items():
            write_tensors(temporary / f"{stem}.safetensors", named)
        write_json(temporary / "state.json", {"format": FORMAT, "step": step, "state": state})
        write_manifest(temporary)
    return path


def copied(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copy what ``save_checkpoint`` writes to the host's memory; one tensor stays one."""
    copies: dict[Tensor, Tensor] = {}
    for named in tensors.values():
        for tensor in named.values():
            copies.setdefault(tensor, tensor.detach().to("cpu", copy=True))
    return {
        stem: {name: copies[tensor] for name, tensor in named.items()}
        for stem, named in tensors.items()
    }


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies, if there is one."""
    return folder / f"step-{step:06d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, sound or not, by rising step."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))
    return sorted(found, key=_step)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after comparing every file with its hash.

    Raises:
        InputError: ``path`` is no checkpoint, or one of a later format.
        RunError: it is damaged; the message names the files and both hashes. Or its hashes are
            right, and what they are of was not written here.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint folder")
    if faults := verify_manifest(path):
        raise RunError("\n  ".join([f"checkpoint {path} is damaged:", *faults]))
    try:
        content = read_json(path / "state.json")
        files = sorted(path.glob("*.safetensors")) if content["format"] == FORMAT else []
        tensors = {file.stem: read_tensors(file) for file in files}
        found = Checkpoint(path, int(content["step"]), tensors, dict(content["state"]))
    except (SafetensorError, *OTHER_SHAPE) as error:  # its hashes are right, but whose are they
        raise RunError(f"checkpoint {path} was not written by this engine: {error!r}") from error
    if content["format"] != FORMAT:
        raise InputError(f"{path}: checkpoint format {content['format']}, expected {FORMAT}")
    return found


def latest_checkpoint(folder: Path) -> NewestCheckpoint:
    """Read the newest sound checkpoint, going back over damaged ones."""
    damaged: list[str] = []
    for path in reversed(checkpoint_folders(folder)):
        try:
            return NewestCheckpoint(load_checkpoint(path), tuple(damaged))
        except (RunError, OSError) as error:
            damaged.append(str(error))
    return NewestCheckpoint(None, tuple(damaged))


def set_aside_later(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints after ``step`` to ``<name>.aside``, and return their new paths.

    A run that resumes at ``step`` calls this: a damaged or abandoned later checkpoint must neither
    be resumed by accident nor be kept by ``prune`` in the place of one of this run.
    """
    moved = []
    for path in checkpoint_folders(folder):
        if _step(path) > step:
            aside = path.with_name(f"{path.name}.aside")
            if aside.exists():
                remove_folder(aside)
            moved.append(path.rename(aside))
    return moved


def prune(folder: Path, *, keep: int, best: int | None = None) -> list[Path]:
    """Remove checkpoints but the newest ``keep`` and that of step ``best``; return the removed."""
    if keep < 1:
        raise InputError(f"keep must be at least 1 checkpoint, got {keep}")
    removed = [path for path in checkpoint_folders(folder)[:-keep] if _step(path) != best]
    for path in removed:
        remove_folder(path)
    return removed


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained, detached, by parameter name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def restore_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], ranks: Ranks | None = None
) -> None:
    """Copy what ``trained_weights`` returned into ``model``, of which ranks may hold parts."""
    ranks = ranks or Ranks()
    for name, weight in trained_weights(model).items():
        weight.copy_(ranks.divide(tensors[name], weight))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state as ``<parameter name>/<key>`` to tensor.

    Rates, decays and other settings of the groups are not part of it: the configuration has them.

    Raises:
        InputError: a parameter is not the model's, or a state is not a tensor.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise InputError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} "
                "that the model has not: its state cannot be saved by name"
            )
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise InputError(
                    f"optimizer state {key!r} of {names[parameter]} is "
                    f"{type(value).__name__}, expected a tensor"
                )
            tensors[f"{names[parameter]}/{key}"] = value
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    ranks: Ranks | None = None,
) -> None:
    """Replace the optimizer's state by copies of what ``optimizer_tensors`` returned, bit for bit.

    Unlike ``Optimizer.load_state_dict``, it goes by parameter name, not by position, and casts
    nothing.

    Raises:
        InputError: a state belongs to no parameter that the optimizer trains.
    """
    ranks = ranks or Ranks()
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in model.named_parameters() if p in groups}
    optimizer.state.clear()
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        if parameter_name not in parameters:
            raise InputError(
                f"the checkpoint has optimizer state {name!r}, "
                f"but no parameter {parameter_name!r} is trained"
            )
        parameter = parameters[parameter_name]
        group = groups[parameter]
        # torch.optim: step counts live beside the parameter only if the update runs there whole.
        on_host = key in _COUNTS and not (group.get("fused") or group.get("capturable"))
        device = torch.device("cpu") if on_host else parameter.device
        value = value.to(device, copy=True)
        optimizer.state[parameter][key] = ranks.divide(value, parameter)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
