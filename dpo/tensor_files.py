"""Named tensors on disk: safetensors files with the usual permissions and the usual errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors; a tensor under a second name is stored as that name only.

    Raises:
        OSError: the file could not be written.
    """
    first_names: dict[object, str] = {}
    storages: set[int] = set()
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        first = first_names.setdefault(_identity(tensor) or name, name)
        if first != name:
            shared[name] = first
            continue
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    metadata = {"format": "pt"} | ({"shared": json.dumps(shared)} if shared else {})
    path.touch()  # for the usual permissions: only the owner can read what safetensors makes
    mode = path.stat().st_mode
    try:
        save_file(stored, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors that ``write_tensors`` wrote, those of one memory sharing it again."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shared = json.loads((file.metadata() or {}).get("shared", "{}"))
    return tensors | {name: tensors[first] for name, first in shared.items()}


def _identity(tensor: Tensor) -> tuple[object, ...] | None:
    """Return what equals only for tensors over the very same memory; None for empty tensors."""
    if tensor.numel() == 0:
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
