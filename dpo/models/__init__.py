"""One decoder, configured per architecture."""

from dpo.models.architectures import ARCHITECTURES
from dpo.models.config import ModelConfig, parse_config, read_config
from dpo.models.decoder import Decoder
from dpo.models.weights import init_model, load_model, save_model

__all__ = [
    "ARCHITECTURES",
    "Decoder",
    "ModelConfig",
    "init_model",
    "load_model",
    "parse_config",
    "read_config",
    "save_model",
]
