"""Adapters on disk in the layout of PEFT: what is written here loads there, and the reverse.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``; the base is named, not
held.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dpo.adapters import AdaptedLinear, Adapter, adapt, adapted_layers, matching
from dpo.errors import InputError
from dpo.files import JSON, OTHER_SHAPE, read_json, write_json
from dpo.models.architectures import ARCHITECTURES
from dpo.models.decoder import Decoder
from dpo.quantization import is_linear
from dpo.tensor_files import read_tensors, write_tensors

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"

_PREFIX: Final = "base_model.model."
_SUFFIXES: Final = {  # of PEFT's names: of our parameters
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_magnitude_vector": "magnitude",
}
_SHOWN: Final = 5  # faults named in a message

# What decides nothing here: which layers have an update is read from their names in the weights.
# Dropout is a matter of training, and this engine has none.
_HARMLESS: Final = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
# Any other entry asks for something that is not done here, unless it is empty or one of these.
_UNDERSTOOD: Final[Mapping[str, tuple[object, ...]]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),  # others change the base itself
    "peft_type": ("LORA",),
}


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk, in the layout of PEFT.

    Attributes:
        path: the folder.
        adapter: rank and form of its updates.
        base: the folder or the id on the Hub of the model that it belongs to; empty if not named.
        base_revision: of a base on the Hub.
        dropout: what it was trained with elsewhere.
    """

    path: Path
    adapter: Adapter
    base: str
    base_revision: str | None
    dropout: float


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder is an adapter: it has its configuration, and not that of a model."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def read_adapter(folder: Path) -> AdapterFolder:
    """Read what an adapter is; its weights are left alone.

    Raises:
        InputError: no such file, not JSON, or something is asked for that this engine does not do;
            names all such entries.
    """
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"{folder}: not an adapter: {CONFIG} is missing")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    if faults := [*_faults(config)]:
        raise InputError(f"{path}: {'; '.join(faults)}")
    adapter = Adapter(
        config["r"],
        config["lora_alpha"],
        is_rslora=bool(config.get("use_rslora")),
        is_dora=bool(config.get("use_dora")),
    )
    return AdapterFolder(
        folder,
        adapter,
        base=config.get("base_model_name_or_path") or "",
        base_revision=config.get("revision"),
        dropout=config.get("lora_dropout", 0.0),
    )


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank <= 0:
        yield f"r must be a positive integer, got {rank!r}"
    if not (type(alpha) is int or type(alpha) is float) or not 0 < alpha < math.inf:
        yield f"lora_alpha must be a positive number, got {alpha!r}"
    dropout = config.get("lora_dropout", 0)
    if type(dropout) not in (int, float):
        yield f"lora_dropout must be a number, got {dropout!r}"
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            yield f"{key} must be a text, got {config[key]!r}"
    for key, value in config.items():
        expected = _UNDERSTOOD.get(key, ())
        if key not in _HARMLESS and value and value not in expected:
            known = " or ".join(json.dumps(item) for item in expected) or "nothing"
            yield f"{key} = {json.dumps(value)} is not supported, expected {known}"


def adapter_weights(folder: Path) -> Path:
    """Return the file of an adapter's weights.

    Raises:
        InputError: there is none.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise InputError(f"{folder}: no weights of an adapter: {WEIGHTS} is missing")
    return path


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a saved adapter into ``model``, in place: its updates are trained, all else is frozen.

    Args:
        model: the base.
        folder: written by ``save_adapter`` or by PEFT.

    Raises:
        InputError: the folder is no adapter, is damaged, or does not fit the model; names all
            faults.
    """
    adapter = read_adapter(folder).adapter
    path = adapter_weights(folder)
    saved = _read_weights(path)
    faults = [*_unequal_copies(model, saved.copies)]
    for name, parts in saved.updates.items():
        faults += _misfits(model, name, parts, adapter)
    if faults or not saved.updates:
        raise InputError(f"{path}: {'; '.join(faults[:_SHOWN]) or 'there are no updates in it'}")
    layers = adapt(model, saved.updates, adapter)
    with torch.no_grad():
        for name, parts in saved.updates.items():
            for part, tensor in parts.items():
                layers[name].get_parameter(part).copy_(tensor)


def adapter_parameters(folder: Path) -> list[str]:
    """Name the parameters of a saved adapter as they are named in a model that has it.

    Raises:
        InputError: the weights are missing or damaged.
    """
    updates = _read_weights(adapter_weights(folder)).updates
    return [f"{layer}.{part}" for layer, parts in updates.items() for part in parts]


@dataclass(frozen=True)
class _Weights:
    """What a file of weights holds.

    Attributes:
        updates: layer to part to tensor.
        copies: of the base, by its names.
    """

    updates: Mapping[str, Mapping[str, Tensor]]
    copies: Mapping[str, Tensor]


def _read_weights(path: Path) -> _Weights:
    try:
        tensors = read_tensors(path)
    except (SafetensorError, OSError, *OTHER_SHAPE) as error:
        raise InputError(f"{path}: damaged or cut off: {error}") from error
    updates: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is None:
            copies[name.replace(".base_layer.", ".")] = tensor
        else:
            updates.setdefault(name.removesuffix(suffix), {})[_SUFFIXES[suffix]] = tensor
    return _Weights(updates, copies)


def _unequal_copies(model: nn.Module, copies: Mapping[str, Tensor]) -> Iterator[str]:
    """Name what is no update and no copy of the base either.

    PEFT saves the weight of an adapted output projection, and embeddings that were trained.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in copies.items():
        weight = weights.get(name)
        if weight is None or not torch.equal(tensor.to(weight), weight):
            yield f"{name} is neither an update nor equal to the base's"


def _misfits(
    model: nn.Module, name: str, parts: Mapping[str, Tensor], adapter: Adapter
) -> Iterator[str]:
    """Compare the parts of an update with the layer that they are for."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or not is_linear(layer):
        yield f"the model has no linear layer {name}"
        return
    expected: dict[str, tuple[int, ...]] = {
        "down": (adapter.rank, layer.in_features),
        "up": (layer.out_features, adapter.rank),
    }
    if adapter.is_dora:
        expected["magnitude"] = (layer.out_features,)
    for suffix, part in _SUFFIXES.items():
        found = tuple(parts[part].shape) if part in parts else None
        if found != expected.get(part):
            yield f"{name}{suffix} has shape {found}, expected {expected.get(part)}"


def check_names(model: nn.Module) -> None:
    """Refuse an adapter that PEFT's layout cannot tell of, by the names of the base's own files.

    Raises:
        InputError: an adapted layer has another name there, or is part of a joined matrix.
    """
    if not isinstance(model, Decoder):
        return
    layout = ARCHITECTURES[model.config.architecture].layout
    linears = [*adapted_layers(model)]
    lost = [name for name in linears if not layout.keeps(f"{name}.weight")]
    if not lost:
        return
    fit = sorted({name.rpartition(".")[2] for name in linears if name not in lost})
    stored = layout.rename(f"{lost[0]}.weight")
    raise InputError(
        f"adapter.targets: {lost[0]} of a {model.config.architecture} is {stored} in its files, "
        "joined with others, renamed or turned: an adapter file cannot tell of it. "
        + (f"Give --adapter-targets {','.join(fit)}" if fit else "Train all weights")
    )


def save_adapter(
    model: nn.Module, folder: Path, *, base: str, base_revision: str | None = None
) -> None:
    """Write the adapter of ``model`` into an existing ``folder``.

    Args:
        model: has one.
        folder: of the adapter.
        base: where the base is found: a folder, or an id on the Hub.
        base_revision: of a base on the Hub.

    Raises:
        InputError: as ``check_names``.
        OSError: a file could not be written.
    """
    layers = adapted_layers(model)
    check_names(model)
    adapter = next(iter(layers.values())).adapter
    tensors = {
        f"{_PREFIX}{name}{suffix}": layer.get_parameter(part)
        for name, layer in layers.items()
        for suffix, part in _SUFFIXES.items()
        if part != "magnitude" or adapter.is_dora
    }
    write_tensors(folder / WEIGHTS, tensors)
    alpha = adapter.alpha
    config: dict[str, JSON] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": base_revision,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model, layers),
        "use_rslora": adapter.is_rslora,
        "use_dora": adapter.is_dora,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, config)


def _target_modules(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return the last parts of the layers' names if they mean these alone, else whole names."""
    names = [n for n, m in model.named_modules() if is_linear(m) or isinstance(m, AdaptedLinear)]
    ends = sorted({name.rpartition(".")[2] for name in layers})
    return ends if set(matching(names, ends)) == set(layers) else sorted(layers)
