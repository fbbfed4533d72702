"""Model folders: Hugging Face layout in and out, safetensors only.

Tensors are mapped from the file and converted one by one: two copies of the model are never in
memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpo.errors import InputError
from dpo.files import read_json, write_json
from dpo.models.architectures import ARCHITECTURES
from dpo.models.config import ModelConfig, read_config
from dpo.models.decoder import Decoder
from dpo.models.layouts import StoredTensor
from dpo.quantization import QuantizedLinear, quantize_linears
from dpo.ranks import Ranks
from dpo.tensor_files import write_tensors

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_IGNORED_SUFFIXES: Final = (  # old checkpoints store what is computed: angles and causal masks
    "rotary_emb.inv_freq", "attn.bias", "attn.masked_bias",
    "attention.bias", "attention.masked_bias",
)  # fmt: skip
_DTYPES: Final = ("F32", "BF16", "F16", "F64")  # quantised weights would be read as other numbers
_SHOWN: Final = 5  # faults named in a message


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    ranks: Ranks | None = None,
) -> Decoder:
    """Load a decoder from a model folder.

    Args:
        folder: holds config.json and model.safetensors, or shards with an index.
        dtype: of the parameters in memory, whatever they are stored as.
        device: where they go.
        quantize: a name in ``dpo.quantization.SCHEMES``, in which the linear layers of the blocks
            are held, each from the moment its weight is read; None for none.
        ranks: those that may hold a part of each weight; None for one that holds all.

    Raises:
        InputError: a file is missing, damaged, or does not fit config.json, all faults of one kind
        together; or there is no such scheme.

    Example:
        >>> from dpo import load_model
        >>> sum(parameter.numel() for parameter in load_model("model").parameters()) > 0
        True
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        with torch.device("meta"):
            model = Decoder(config).to(dtype)
    except (RuntimeError, TypeError) as error:  # sizes whose products are no sizes
        raise InputError(f"{folder / 'config.json'}: no such model can be made: {error}") from error
    parameters = dict(model.named_parameters())
    stored = _stored(model)
    quantized = {} if quantize is None else quantize_linears(model, quantize)
    for layer in quantized.values():  # before whole weights come and go, or memory is in pieces
        layer.to_empty(device=device)
    ranks = ranks or Ranks()
    ranks.prepare(model)
    places = dict(model.named_parameters())
    weights: dict[str, Tensor] = {}
    found: set[str] = set()
    for path in weight_files(folder):
        for tensor, value in _read_file(path, config, stored, parameters, torch.device(device)):
            found.add(tensor.name)
            # copied out: a mapped file keeps in memory whatever was read of it
            _place(weights, tensor, value.to(dtype, copy=True), parameters)
            _quantize(weights, tensor, quantized)
            for part in tensor.parts:
                if part.parameter in weights:
                    weights[part.parameter] = ranks.divide(
                        weights[part.parameter], places[part.parameter]
                    )
    missing = stored.keys() - found
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} weights are missing: {_listed(sorted(missing))}"
        )
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def _stored(model: Decoder) -> dict[str, StoredTensor]:
    """List the tensors that a checkpoint of ``model`` has, by their names there."""
    layout = ARCHITECTURES[model.config.architecture].layout
    return layout.stored(dict(model.named_parameters()), heads=model.config.heads)


def _place(
    weights: dict[str, Tensor],
    stored: StoredTensor,
    value: Tensor,
    parameters: Mapping[str, Tensor],
) -> None:
    """Put what ``stored`` holds into ``weights``; an expert's matrix into its place there."""
    for part, tensor in zip(stored.parts, stored.split(value), strict=True):
        if part.expert is None:
            weights[part.parameter] = tensor
            continue
        if part.parameter not in weights:
            weights[part.parameter] = tensor.new_empty(parameters[part.parameter].shape)
        weights[part.parameter][part.expert] = tensor


def _quantize(
    weights: dict[str, Tensor], stored: StoredTensor, quantized: Mapping[str, QuantizedLinear]
) -> None:
    """Move what ``stored`` has put into ``weights`` to the layers that hold it in codes."""
    for part in stored.parts:
        if layer := quantized.get(part.parameter.removesuffix(".weight")):
            layer.take(weights.pop(part.parameter))


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
        shards = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index}: not a safetensors index: no weight_map of file names"
        ) from error
    for shard in shards:
        is_name = isinstance(shard, str) and Path(shard).name == shard and len(shard) <= 255
        if not is_name or shard in ("", ".."):
            raise InputError(f"{index}: weight_map names {shard!r}, which is not in this folder")
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        raise InputError(f"{index}: weight_map names absent files: {', '.join(absent)}")
    return [folder / shard for shard in shards]


def _read_file(
    path: Path,
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    parameters: Mapping[str, Tensor],
    device: torch.device,
) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Read the tensors of one file one by one, having checked all shapes before touching data."""
    prefix = ARCHITECTURES[config.architecture].layout.optional_prefix
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            keys = list(file.keys())
            names = {name: name if name in stored else prefix + name for name in keys}
            unknown = [
                name
                for name, full in names.items()
                if full not in stored and not _may_be_ignored(name, config)
            ]
            if unknown:
                raise InputError(
                    f"{path}: {len(unknown)} weights have no place in this architecture: "
                    + _listed(sorted(unknown))
                )
            kept = {name: stored[full] for name, full in names.items() if full in stored}
            slices = {name: file.get_slice(name) for name in kept}
            expected = {name: tuple(each.join(parameters).shape) for name, each in kept.items()}
            unfit = [
                f"{name} has shape {tuple(part.get_shape())}, config.json says {expected[name]}"
                for name, part in slices.items()
                if tuple(part.get_shape()) != expected[name]
            ]
            unfit += [
                f"{name} is stored as {part.get_dtype()}, expected one of {', '.join(_DTYPES)}"
                for name, part in slices.items()
                if part.get_dtype() not in _DTYPES
            ]
            if unfit:
                raise InputError(f"{path}: {len(unfit)} weights do not fit: {_listed(unfit)}")
        for name, each in kept.items():
            # opened anew, for an open file keeps in memory whatever was read of it
            with safe_open(path, framework="pt", device=str(device)) as file:
                yield each, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or cut off: {error}") from error


def _listed(faults: Sequence[str]) -> str:
    more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return ", ".join(faults[:_SHOWN]) + more


def _may_be_ignored(name: str, config: ModelConfig) -> bool:
    tied = ARCHITECTURES[config.architecture].layout.rename("lm_head.weight")
    return name.endswith(_IGNORED_SUFFIXES) or (name == tied and config.ties_embeddings)


def save_model(
    model: Decoder,
    folder: Path,
    *,
    max_shard_bytes: int = 5 * 2**30,
    ranks: Ranks | None = None,
) -> None:
    """Write config.json and the weights of ``model`` into an existing ``folder``.

    All of several ranks that hold parts of it call this, and the first writes.

    The weights keep the dtype they have in memory: an update of 1e-6 would vanish in bfloat16.
    Write into a folder that is renamed when complete (``dpo.files.atomic_directory``).

    Raises:
        OSError: a file could not be written.
    """
    ranks = ranks or Ranks()
    ranks.take_apart(model)
    parameters = dict(model.named_parameters())
    with torch.device("meta"):  # ranks may hold parts of smaller shapes
        shapes = Decoder(model.config).to(next(iter(parameters.values())).dtype)
    whole_parameters = dict(shapes.named_parameters())
    shards = _split(_stored(shapes).values(), whole_parameters, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else SINGLE
        here = dict.fromkeys(part.parameter for each in shard for part in each.parts)
        whole = {name: ranks.whole(parameters[name], name) for name in here}
        if ranks.is_first:
            write_tensors(folder / name, {each.name: each.join(whole) for each in shard})
        weight_map |= dict.fromkeys([each.name for each in shard], name)
    if not ranks.is_first:
        return
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in whole_parameters.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    source = dict(model.config.source)
    source.pop("dtype", None)
    write_json(folder / "config.json", source | {"torch_dtype": dtype})


def _split(
    tensors: Iterable[StoredTensor], parameters: Mapping[str, Tensor], max_bytes: int
) -> list[list[StoredTensor]]:
    """Divide tensors over files of at most ``max_bytes``, but for a larger one alone."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = sum(part.of(parameters).nbytes for part in tensor.parts)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def init_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Make an untrained decoder: no biases, plain norms, matrices of normal(0, 1/sqrt(columns)).

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
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.zero_()
        for module in model.modules():
            if isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()
    return model
