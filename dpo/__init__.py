"""Direct Preference Optimization: the engine, the dataset builder and the evaluator.

The public names are imported when they are first used, so that ``import dpo`` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo import losses as losses
    from dpo.batching import collate as collate
    from dpo.log_probs import completion_log_probs as completion_log_probs
    from dpo.models import load_model as load_model
    from dpo.preferences import PreferencePair as PreferencePair
    from dpo.preferences import read_pairs as read_pairs
    from dpo.preferences import write_pairs as write_pairs
    from dpo.tokenizer import load_tokenizer as load_tokenizer
    from dpo.train_config import TrainConfig as TrainConfig
    from dpo.trainer import Trainer as Trainer

_HOMES = {
    "PreferencePair": "dpo.preferences",
    "TrainConfig": "dpo.train_config",
    "Trainer": "dpo.trainer",
    "collate": "dpo.batching",
    "completion_log_probs": "dpo.log_probs",
    "load_model": "dpo.models",
    "load_tokenizer": "dpo.tokenizer",
    "losses": "dpo",
    "read_pairs": "dpo.preferences",
    "write_pairs": "dpo.preferences",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*(name for name in globals() if name.startswith("__")), *_HOMES])
