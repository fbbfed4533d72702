"""The model of a run to the Hugging Face Hub: ``dpo push``."""

from pathlib import Path

from dpo.errors import InputError
from dpo.hub import Destination, push_files

_CONFIGS = {"config.json": "model*.safetensors", "adapter_config.json": "adapter_model.safetensors"}


def push(source: Path, destination: Destination) -> str:
    """Push the model of a run, or a model folder, and return the address of the commit.

    Args:
        source: the folder of a run, of a model or of an adapter.
        destination: where to.

    Raises:
        InputError: there is no whole model, or as ``push_files``.
        RunError: as ``push_files``.
    """
    return push_files(model_of(source), destination)


def model_of(source: Path) -> Path:
    """Return the folder of the model that ``source`` is, or that it holds as a run.

    Raises:
        InputError: it is and holds none.
    """
    for folder in (source / "model", source):
        for config, weights in _CONFIGS.items():
            if (folder / config).is_file() and any(folder.glob(weights)):
                return folder
    if (source / "config.toml").is_file():
        raise InputError(f"{source}: this run has not written its model yet: dpo resume {source}")
    raise InputError(f"{source} is neither the folder of a model nor of a run that has one")
