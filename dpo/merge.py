"""A plain model of an adapter and its base: ``dpo merge``."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from dpo.adapters import merge_adapter
from dpo.errors import InputError
from dpo.files import atomic_directory
from dpo.inputs import GENERATION_CONFIG, find_model
from dpo.models import save_model


def merge_folders(
    adapter: str,
    out: Path,
    *,
    base: str | None = None,
    quantize: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the model that ``adapter`` makes of its base to ``out``, in Hugging Face layout.

    Args:
        adapter: a folder, or an id on the Hub.
        out: the folder of the model.
        base: of the adapter; None: the one that it names.
        quantize: scheme that the base was held in while the adapter was trained, to merge what was
            trained; None merges onto the base as it is.
        dtype: of the weights on disk; the sum is computed in float32.

    Raises:
        InputError: ``adapter`` is none or does not fit the base, or ``out`` exists.
    """
    with atomic_directory(out) as temporary:
        folder = find_model(adapter, None, base=base, quantize=quantize)
        if folder.adapter is None:
            raise InputError(f"{adapter} is a model and not an adapter: there is nothing to merge")
        model = folder.load(dtype=torch.float32, device=torch.device("cpu"))
        merge_adapter(model)
        save_model(model.to(dtype), temporary)
        folder.load_tokenizer().save(temporary)
        if (source := folder.path / GENERATION_CONFIG).exists():
            shutil.copyfile(source, temporary / GENERATION_CONFIG)
