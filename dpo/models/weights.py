"""Model folders: Hugging Face layout in and out, safetensors only.

Tensors are mapped from the file and converted one by one: two copies of the model are never in
memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpo.errors import InputError
from dpo.files import write_json
from dpo.models.config import ModelConfig, read_config
from dpo.models.decoder import Decoder
from dpo.quantization import quantize_linears
from dpo.tensor_files import write_tensors

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_TIED: Final = "lm_head.weight"
_IGNORED_SUFFIX: Final = "rotary_emb.inv_freq"  # old checkpoints store what is computed
_DTYPES: Final = ("F32", "BF16", "F16", "F64")  # quantised weights would be read as other numbers
_SHOWN: Final = 5  # faults named in a message


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> Decoder:
    """Load a decoder from a model folder.

    Args:
        folder: holds config.json and model.safetensors, or shards with an index.
        dtype: of the parameters in memory, whatever they are stored as.
        device: where they go.
        quantize: a name in ``dpo.quantization.SCHEMES``, in which the linear layers of the blocks
            are held, each from the moment its weight is read; None for none.

    Raises:
        InputError: a file is missing, damaged, or does not fit config.json, all faults of one kind
        together; or there is no such scheme.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.ties_embeddings:
        del expected[_TIED]
    quantized = {} if quantize is None else quantize_linears(model, quantize)
    for layer in quantized.values():  # before whole weights come and go, or memory is in pieces
        layer.to_empty(device=device)
    weights: dict[str, Tensor] = {}
    missing = set(expected)
    for path in weight_files(folder):
        for name, weight in _read_file(path, expected, dtype, torch.device(device)):
            missing.discard(name)
            if (owner := name.removesuffix(".weight")) in quantized:
                quantized[owner].take(weight)
            else:
                weights[name] = weight
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} weights are missing: {_listed(sorted(missing))}"
        )
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder.

    Raises:
        InputError: there are none, the index is damaged, a shard is absent or lies outside the
        folder.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        pickles = [path.name for path in sorted(folder.glob("*.bin"))]
        hint = f" ({', '.join(pickles)} are pickles, which are never opened)" if pickles else ""
        raise InputError(f"{folder}: no weights: expected {SINGLE} or {INDEX}{hint}")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index}: not a safetensors index: no weight_map of file names"
        ) from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or shard == "..":
            raise InputError(f"{index}: weight_map names {shard!r}, which is not in this folder")
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        raise InputError(f"{index}: weight_map names absent files: {', '.join(absent)}")
    return [folder / shard for shard in shards]


def _read_file(
    path: Path, expected: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of one file that are ``expected``, checking shapes before touching data."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = list(file.keys())
            unknown = [n for n in names if n not in expected and not _may_be_ignored(n, expected)]
            if unknown:
                raise InputError(
                    f"{path}: {len(unknown)} weights have no place in this architecture: "
                    + _listed(sorted(unknown))
                )
            kept = [name for name in names if name in expected]
            stored = {name: file.get_slice(name) for name in kept}
            unfit = [
                f"{name} has shape {tuple(part.get_shape())}, "
                f"config.json says {tuple(expected[name])}"
                for name, part in stored.items()
                if tuple(part.get_shape()) != tuple(expected[name])
            ]
            unfit += [
                f"{name} is stored as {part.get_dtype()}, expected one of {', '.join(_DTYPES)}"
                for name, part in stored.items()
                if part.get_dtype() not in _DTYPES
            ]
            if unfit:
                raise InputError(f"{path}: {len(unfit)} weights do not fit: {_listed(unfit)}")
        for name in kept:
            # opened anew, and copied out: a mapped file keeps in memory whatever was read of it
            with safe_open(path, framework="pt", device=str(device)) as file:
                yield name, file.get_tensor(name).to(dtype, copy=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or cut off: {error}") from error


def _listed(faults: Sequence[str]) -> str:
    more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return ", ".join(faults[:_SHOWN]) + more


def _may_be_ignored(name: str, expected: Mapping[str, torch.Size]) -> bool:
    return name.endswith(_IGNORED_SUFFIX) or (name == _TIED and _TIED not in expected)


def save_model(
    model: Decoder,
    folder: Path,
    *,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write config.json and the weights of ``model`` into an existing ``folder``.

    The weights keep the dtype they have in memory: an update of 1e-6 would vanish in bfloat16.
    Write into a folder that is renamed when complete (``dpo.files.atomic_directory``).

    Raises:
        OSError: a file could not be written.
    """
    weights = dict(model.named_parameters())
    shards = _split(weights, max_shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / SINGLE, weights)
    else:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_tensors(folder / name, shard)
            weight_map |= dict.fromkeys(shard, name)
        size = sum(tensor.nbytes for tensor in weights.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    source = dict(model.config.source)
    source.pop("dtype", None)
    write_json(folder / "config.json", source | {"torch_dtype": dtype})


def _split(weights: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Divide weights over files of at most ``max_bytes``, but for a larger one alone."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def init_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Make an untrained decoder: zero biases, unit norms, matrices from normal(0, 1/sqrt(columns)).

    So every layer keeps the scale of its input, whatever the width; a fixed 0.02, made for widths
    in the hundreds, leaves the attention of a small model all but uniform, and slow to learn. The
    same seed draws other numbers on another kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
