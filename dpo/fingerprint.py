"""Names for models by content: equal only if weights and mathematics are equal.

A fingerprint is a SHA-256 over the name, dtype, shape and bytes of every weight and over the
configuration: it stays when a model folder is copied, renamed or cut into other shards.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpo.errors import InputError
from dpo.files import JSON, read_json
from dpo.models.weights import weight_files

# Keys of config.json that no forward pass depends on. Any other key counts, known or not.
_HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def weights_fingerprint(folder: Path) -> str:
    """Return the fingerprint of a model folder, read through once and not loaded.

    Raises:
        InputError: a file is missing or damaged.
    """
    digests = [digest for path in weight_files(folder) for digest in _file_digests(path)]
    return _combined(digests, read_json(folder / "config.json"))


def adapter_fingerprint(base: str, weights: Path, config: Mapping[str, JSON]) -> str:
    """Return the fingerprint of a model that is a base and an adapter.

    Args:
        base: fingerprint of the base.
        weights: file of the adapter's weights, read through once.
        config: whatever else the adapter's mathematics depends on.

    Raises:
        InputError: the file is damaged.
    """
    return _combined([base, *_file_digests(weights)], config)


def module_fingerprint(module: nn.Module, config: Mapping[str, JSON]) -> str:
    """Return the fingerprint of a model in memory.

    It is not that of the folder the model came from, which may have another dtype and names a tied
    weight once.

    Args:
        module: its parameters and persistent buffers count.
        config: whatever else its forward pass depends on.
    """
    tensors = module.state_dict().items()
    return _combined([_digest(name, tensor) for name, tensor in tensors], config)


def _file_digests(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file, ThreadPoolExecutor() as pool:
            return list(pool.map(lambda name: _digest(name, file.get_tensor(name)), file.keys()))
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or cut off: {error}") from error


def _digest(name: str, tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(json.dumps([name, str(plain.dtype), list(plain.shape)]).encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _combined(digests: Iterable[str], config: Mapping[str, JSON]) -> str:
    mathematics = {key: value for key, value in config.items() if key not in _HARMLESS}
    content = json.dumps([sorted(digests), mathematics], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
