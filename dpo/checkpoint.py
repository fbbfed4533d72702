"""Training checkpoints: complete or not there, checked byte for byte, and free of pickle.

A checkpoint is a folder ``step-000100`` with one ``<stem>.safetensors`` for each mapping of named
tensors (model, optimizer, random number generators), ``state.json`` for all that is not a tensor,
and ``manifest.json`` with the hash of every file. The writer holds the run's ``FolderLock``.

Of a model in parts each rank writes what it holds, ``<stem>-00002-of-00004.safetensors``: pieces of
tensors, and where they lie. No rank is sent the part of another, neither here nor when a run goes
on, with however many ranks: each reads what it is to hold.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dpo.errors import InputError, RunError
from dpo.files import (
    JSON,
    OTHER_SHAPE,
    Entry,
    atomic_directory,
    read_json,
    remove_folder,
    remove_leftovers,
    verify_manifest,
    write_json,
    write_manifest,
)
from dpo.ranks import Piece, Ranks
from dpo.tensor_files import StoredTensors, write_tensors

FORMAT = 1
_COUNTS = ("step", "weight_sum")  # states of an optimizer that the host reads at each step
_OF_A_RANK = re.compile(r"-\d{5,}-of-\d{5,}$")  # what a share's file has behind the stem

Share = Mapping[str, Mapping[str, Piece]]
"""What a rank writes: file stem to tensor name to the piece of it."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, found sound.

    Attributes:
        path: the folder that it is in.
        step: optimizer steps done when it was written.
        tensors: file stem to named tensors; each is read when it is asked for, onto the CPU.
        state: what was given to ``save_checkpoint`` as ``state``.
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
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


@dataclass
class Draft:
    """A checkpoint under a temporary name, to which each rank writes its share.

    Attributes:
        folder: the same on all ranks.
        ranks: that write it.
        files: entries of the manifest of what this rank has written.
        error: why it could not.
    """

    folder: Path
    ranks: Ranks
    files: dict[str, Entry] = field(default_factory=dict)
    error: OSError | None = None

    def write(self, share: Share) -> None:
        """Write this rank's share, a tensor at a time; an error is kept for the others to hear."""
        try:
            for stem, pieces in share.items():
                file = f"{stem}{self._suffix(pieces)}.safetensors"
                parts = {name: piece.part for name, piece in pieces.items()}
                places = {name: p.place for name, p in pieces.items() if not _is_whole(p)}
                self.files[file] = write_tensors(self.folder / file, parts, places)
        except OSError as error:
            self.error = error

    def _suffix(self, pieces: Mapping[str, Piece]) -> str:
        if self.ranks.is_first and all(map(_is_whole, pieces.values())):
            return ""
        return f"-{self.ranks.process + 1:05}-of-{self.ranks.processes:05}"

    def all_files(self) -> dict[str, Entry]:
        """Return the entries of all ranks.

        Raises:
            OSError: one of them could not write, on all of them.
        """
        if self.ranks.processes == 1 and self.error is not None:
            raise self.error
        own = {"files": self.files, "error": self.error and str(self.error)}
        told = [json.loads(text) for text in self.ranks.texts(json.dumps(own))]
        for rank, each in enumerate(told):
            if each["error"] is not None:
                raise OSError(f"rank {rank}: {each['error']}") from self.error
        return {name: entry for each in told for name, entry in each["files"].items()}


@contextmanager
def drafted_checkpoint(
    folder: Path, step: int, state: Mapping[str, JSON], ranks: Ranks | None = None
) -> Iterator[Draft]:
    """Yield what becomes the checkpoint of ``step`` when the block ends well.

    All ranks call this, and all write their shares within the block. Where it begins and ends they
    meet; if it ends badly, or a rank could not write, what was there before is unharmed, and
    nothing is added.

    Args:
        folder: the run's folder of checkpoints.
        step: optimizer steps done.
        state: all that resuming needs beside the tensors; that of the first rank is written.
        ranks: that write; None for a process that is alone.

    Raises:
        OSError: a rank could not write.
    """
    ranks = ranks or Ranks()
    if not ranks.is_first:
        draft = Draft(Path(ranks.first_text("")), ranks)
        yield draft
        draft.all_files()
        return
    remove_leftovers(folder)
    with atomic_directory(checkpoint_path(folder, step), replace=True) as temporary:
        ranks.first_text(str(temporary.resolve()))
        draft = Draft(temporary, ranks)
        yield draft
        files = draft.all_files()
        write_json(temporary / "state.json", {"format": FORMAT, "step": step, "state": state})
        write_manifest(temporary, known=files)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    ranks: Ranks | None = None,
) -> Path:
    """Write ``folder/step-<step>`` in one step, in the place of one of that step if there is one.

    Args:
        folder: the run's folder of checkpoints.
        step: optimizer steps done.
        tensors: file stem to named tensors, on any device; tied tensors are stored once.
        state: everything else that resuming needs.
        ranks: all of which call this, each with what it holds; None for a process that is alone.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written; what was there before is unharmed, nothing is added.
    """
    with drafted_checkpoint(folder, step, state, ranks) as draft:
        draft.write(own_share(tensors, draft.ranks))
    return checkpoint_path(folder, step)


def own_share(tensors: Mapping[str, Mapping[str, Tensor]], ranks: Ranks) -> Share:
    """Choose what this rank writes of ``tensors``, which all ranks have or have parts of.

    What all have is written by the first; a part that several have by that of them which has the
    fewest bytes to write until then.
    """
    share: dict[str, dict[str, Piece]] = {}
    loads: dict[int, list[int]] = {}  # by the number of copies, the bytes of each
    for stem, named in tensors.items():
        for name, tensor in named.items():
            piece = ranks.piece(tensor, name.partition("/")[0])
            is_own = ranks.is_first
            if piece.is_divided:
                load = loads.setdefault(piece.copies, [0] * piece.copies)
                writer = load.index(min(load))
                load[writer] += tensor.nbytes
                is_own = piece.copy == writer and not _is_behind(piece)
            if is_own:
                share.setdefault(stem, {})[name] = piece
    return share


def copied(share: Share) -> Share:
    """Copy a share to the host's memory; one tensor stays one."""
    copies: dict[Tensor, Tensor] = {}
    for pieces in share.values():
        for piece in pieces.values():
            copies.setdefault(piece.part, piece.part.detach().to("cpu", copy=True))
    return {
        stem: {name: replace(piece, part=copies[piece.part]) for name, piece in pieces.items()}
        for stem, pieces in share.items()
    }


def _is_whole(piece: Piece) -> bool:
    return tuple(piece.part.shape) == piece.place.shape


def _is_behind(piece: Piece) -> bool:
    """Say whether a piece is none: there are fewer rows than ranks."""
    return piece.part.numel() == 0 and any(piece.place.starts)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies, if there is one."""
    return folder / f"step-{step:06d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, sound or not, by rising step."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))
    return sorted(found, key=_step)


def load_checkpoint(path: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Open a checkpoint after comparing every file with its hash.

    Args:
        path: of its folder.
        ranks: all of which call this, and compare a part of the files each; None for a process
            that is alone.

    Raises:
        InputError: ``path`` is no checkpoint, or one of a later format.
        RunError: it is damaged; the message names the files and both hashes. Or its hashes are
            right, and what they are of was not written here.
    """
    ranks = ranks or Ranks()
    if ranks.any(not path.is_dir()):
        raise InputError(f"{path}: no such checkpoint folder")
    if faults := _faults(path, ranks):
        raise RunError("\n  ".join([f"checkpoint {path} is damaged:", *faults]))
    try:
        content = read_json(path / "state.json")
        files = sorted(path.glob("*.safetensors")) if content["format"] == FORMAT else []
        files_by_stem: dict[str, list[Path]] = {}
        for file in files:
            files_by_stem.setdefault(_OF_A_RANK.sub("", file.stem), []).append(file)
        tensors = {stem: StoredTensors(found) for stem, found in files_by_stem.items()}
        found = Checkpoint(path, int(content["step"]), tensors, dict(content["state"]))
    except (SafetensorError, *OTHER_SHAPE) as error:  # its hashes are right, but whose are they
        raise RunError(f"checkpoint {path} was not written by this engine: {error!r}") from error
    if content["format"] != FORMAT:
        raise InputError(f"{path}: checkpoint format {content['format']}, expected {FORMAT}")
    return found


def _faults(path: Path, ranks: Ranks) -> list[str]:
    """Return what is wrong with the files of a checkpoint, which the ranks divide, on all ranks."""
    try:
        own = verify_manifest(path, part=ranks.process, parts=ranks.processes)
    except OSError as error:
        own = [str(error)]
    told = [json.loads(text) for text in ranks.texts(json.dumps(own))]
    return list(dict.fromkeys(fault for faults in told for fault in faults))


def latest_checkpoint(folder: Path, ranks: Ranks | None = None) -> NewestCheckpoint:
    """Open the newest sound checkpoint, going back over damaged ones; all ranks the same."""
    ranks = ranks or Ranks()
    own = [*reversed(checkpoint_folders(folder))]
    told = json.loads(ranks.first_text(json.dumps([str(path.resolve()) for path in own])))
    damaged: list[str] = []
    for path in own if ranks.is_first else map(Path, told):
        found, fault = None, None
        try:
            found = load_checkpoint(path, ranks)
        except (RunError, OSError) as error:
            fault = str(error)
        faults = [text for text in ranks.texts(fault or "") if text]
        if found is not None and not faults:
            return NewestCheckpoint(found, tuple(damaged))
        damaged.append(faults[0])
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
        piece = ranks.piece(weight, name)
        piece.part.copy_(_own_part(tensors, name, piece))


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
    for name in tensors:
        parameter_name, _, key = name.rpartition("/")
        if parameter_name not in parameters:
            raise InputError(
                f"the checkpoint has optimizer state {name!r}, "
                f"but no parameter {parameter_name!r} is trained"
            )
        parameter = parameters[parameter_name]
        group = groups[parameter]
        if (piece := ranks.piece(parameter, parameter_name)).is_divided and key not in _COUNTS:
            part = _own_part(tensors, name, piece)
            state = torch.empty_like(parameter.detach(), dtype=part.dtype)
            ranks.piece(state, parameter_name).part.copy_(part)
            optimizer.state[parameter][key] = state
            continue
        # torch.optim: step counts live beside the parameter only if the update runs there whole.
        on_host = key in _COUNTS and not (group.get("fused") or group.get("capturable"))
        device = torch.device("cpu") if on_host else parameter.device
        optimizer.state[parameter][key] = tensors[name].to(device, copy=True)


def _own_part(tensors: Mapping[str, Tensor], name: str, piece: Piece) -> Tensor:
    """Return the part of a tensor that lies where ``piece`` does."""
    if isinstance(tensors, StoredTensors):
        return tensors.region(name, piece.place, piece.part.shape)
    return tensors[name]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
