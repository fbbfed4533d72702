"""What a decoder is made of, read from a Hugging Face ``config.json``.

To add an architecture, add an entry to ``ARCHITECTURES``: a function from the parsed file to the
few facts in which it differs from a Llama. ``tests/test_models.py`` then holds it against
transformers by being named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dpo.errors import InputError

HubConfig = Mapping[str, Any]  # the decoded config.json

_ROPE_OPTIONS: Final[dict[str, dict[str, str]]] = {  # kind -> our name: name in config.json
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and, for long contexts, how frequencies are scaled.

    Attributes:
        theta: base of the geometric series of frequencies.
        kind: "default", "linear" or "llama3".
        factor: context extension factor of "linear" and "llama3".
        low_frequency_factor: "llama3" only; wavelengths above context / this are scaled by the
            factor.
        high_frequency_factor: "llama3" only; wavelengths below context / this are left alone.
        original_context: "llama3" only; tokens the model was first trained with.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. Sizes are counts of numbers, not bytes."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    norm_epsilon: float
    max_positions: int
    rope: Rope
    ties_embeddings: bool
    has_qkv_bias: bool = False
    has_attention_output_bias: bool = False
    has_mlp_bias: bool = False
    normalizes_query_key: bool = False
    windows: tuple[int | None, ...] = ()  # per layer: tokens a token sees, None for all
    source: HubConfig = field(default_factory=dict, repr=False, compare=False)


Facts = dict[str, object]


def _llama(config: HubConfig) -> Facts:
    has_bias = bool(config.get("attention_bias", False))
    return {
        "has_qkv_bias": has_bias,
        "has_attention_output_bias": has_bias,
        "has_mlp_bias": bool(config.get("mlp_bias", False)),
    }


def _mistral(config: HubConfig) -> Facts:
    return {"windows": (config.get("sliding_window"),) * config["num_hidden_layers"]}


def _qwen2(config: HubConfig) -> Facts:
    return {"has_qkv_bias": True, "windows": _qwen_windows(config)}


def _qwen3(config: HubConfig) -> Facts:
    has_bias = bool(config.get("attention_bias", False))
    return {
        "has_qkv_bias": has_bias,
        "has_attention_output_bias": has_bias,
        "normalizes_query_key": True,
        "windows": _qwen_windows(config),
    }


def _qwen_windows(config: HubConfig) -> tuple[int | None, ...]:
    """Layers from ``max_window_layers`` on have the sliding window, if it is switched on at all."""
    layers = int(config["num_hidden_layers"])
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    first = config.get("max_window_layers", 28)
    window = config.get("sliding_window", 4096)
    return tuple(window if layer >= first else None for layer in range(layers))


ARCHITECTURES: Final[dict[str, Callable[[HubConfig], Facts]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}

_OPTIONAL_COUNTS: Final = (
    "num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings",
)  # fmt: skip
_DEFAULT_HEAD_SIZE: Final = {"qwen3": 128}


def read_config(folder: Path) -> ModelConfig:
    """Read ``folder/config.json``.

    Raises:
        InputError: no such file, not JSON, or a model that this engine does not support.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: not a model folder: config.json is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    return parse_config(config, where=str(path))


def parse_config(config: HubConfig, *, where: str = "config") -> ModelConfig:
    """Turn a decoded ``config.json`` into a ``ModelConfig``.

    Raises:
        InputError: an unsupported or contradictory entry, named with ``where``.
    """
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise InputError(
            f"{where}: model_type {architecture!r} is not supported; "
            f"supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    if config.get("quantization_config") is not None:
        raise InputError(f"{where}: quantization_config: quantised weights cannot be trained")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise InputError(f"{where}: hidden_act {activation!r} is not supported; expected 'silu'")
    for key in _OPTIONAL_COUNTS:
        if config.get(key) is not None:
            _count(config, key, where)
    if "max_window_layers" in config:
        _count(config, "max_window_layers", where, least=0)
    heads = _count(config, "num_attention_heads", where)
    hidden_size = _count(config, "hidden_size", where)
    layers = _count(config, "num_hidden_layers", where)
    key_heads = config.get("num_key_value_heads") or heads
    if heads % key_heads:
        raise InputError(
            f"{where}: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {key_heads}"
        )
    facts: dict[str, Any] = {"windows": (None,) * layers} | ARCHITECTURES[architecture](config)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_count(config, "vocab_size", where),
        hidden_size=hidden_size,
        intermediate_size=_count(config, "intermediate_size", where),
        layers=layers,
        heads=heads,
        key_heads=key_heads,
        head_size=config.get("head_dim")
        or _DEFAULT_HEAD_SIZE.get(architecture, hidden_size // heads),
        norm_epsilon=_positive(config, "rms_norm_eps", where, default=1e-6),
        max_positions=config.get("max_position_embeddings") or 2048,
        rope=_parse_rope(config, where),
        ties_embeddings=bool(config.get("tie_word_embeddings", False)),
        source=dict(config),
        **facts,
    )


def _count(config: HubConfig, key: str, where: str, *, least: int = 1) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        expected = "a positive integer" if least else "an integer >= 0"
        raise InputError(f"{where}: {key} must be {expected}, got {value!r}")
    return value


def _positive(config: HubConfig, key: str, where: str, *, default: float | None = None) -> float:
    value = config.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise InputError(f"{where}: {key} must be a positive number, got {value!r}")
    return float(value)


def _parse_rope(config: HubConfig, where: str) -> Rope:
    """Read ``rope_parameters`` (transformers 5), else ``rope_theta`` with ``rope_scaling``."""
    scaling: HubConfig = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise InputError(f"{where}: rope_scaling must be an object, got {scaling!r}")
    theta = _positive({**config, **scaling}, "rope_theta", where, default=10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_OPTIONS:
        supported = ", ".join(_ROPE_OPTIONS)
        raise InputError(f"{where}: rope type {kind!r} is not supported; supported are {supported}")
    missing = [name for name in _ROPE_OPTIONS[kind].values() if name not in scaling]
    if missing:
        raise InputError(f"{where}: rope type {kind!r} needs {missing[0]!r}")
    for name in _ROPE_OPTIONS[kind].values():
        _positive(scaling, name, where)
    return Rope(
        theta, kind, **{ours: scaling[theirs] for ours, theirs in _ROPE_OPTIONS[kind].items()}
    )
