"""What a decoder is made of, read from a Hugging Face ``config.json``.

What the entries mean for each architecture is in ``dpo.models.architectures``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dpo.errors import InputError
from dpo.files import read_json
from dpo.models.activations import ACTIVATIONS
from dpo.models.architectures import ARCHITECTURES, Experts, Facts, head_size
from dpo.models.entries import Entries, HubConfig
from dpo.models.rope import Rope, parse_rope

_MOST_LAYERS: Final = 1_000  # a file of a few bytes is not to make a million modules


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. Sizes are counts of numbers, not bytes; the defaults are a Llama's.

    Attributes:
        architecture: a name in ``ARCHITECTURES``.
        vocab_size: tokens that there are embeddings of.
        hidden_size: numbers of a token between the layers.
        intermediate_size: hidden numbers of an MLP.
        layers: how many there are.
        heads: of queries.
        key_heads: of keys and values; divides ``heads``.
        head_size: numbers of a head.
        norm_epsilon: added to the mean square that a norm divides by.
        max_positions: tokens of a text that the model was made for.
        ties_embeddings: the output projection is the embedding.
        windows: per layer, the tokens a token sees; None for all.
        ropes: per layer, the rotary embedding; None for none.
        experts: per layer, None for a plain MLP.
        activation: of the MLPs; a name in ``dpo.models.activations.ACTIVATIONS``.
        is_gated: the MLPs are gated (arXiv 2002.05202).
        has_mlp_bias: of all matrices of the MLPs.
        has_qkv_bias: of the projections to queries, keys and values.
        has_attention_output_bias: of the projection behind the heads.
        norm: a name in ``dpo.models.norms.NORMS``.
        norms_inputs: what attention and MLP read is normed.
        norms_outputs: what they write is normed.
        has_one_norm: the MLP reads what the attention reads, normed by the same norm.
        is_parallel: the MLP reads what the attention reads, not the sum with its output.
        query_key_norm: queries and keys are normed, "each head" alone or "all heads" together; None
            for not.
        query_scale: factor on the products of queries and keys; None for ``head_size ** -0.5``.
        attention_softcap: bound of these products; None for none.
        embedding_scale: factor on the embeddings.
        residual_scale: factor on what attention and MLP add.
        logit_scale: factor on the logits.
        logit_softcap: bound of the logits; None for none.
        has_learned_positions: each position has an embedding.
        source: the decoded config.json.
    """

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
    ties_embeddings: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    experts: tuple[Experts | None, ...]
    activation: str = "silu"
    is_gated: bool = True
    has_mlp_bias: bool = False
    has_qkv_bias: bool = False
    has_attention_output_bias: bool = False
    norm: str = "rms"
    norms_inputs: bool = True
    norms_outputs: bool = False
    has_one_norm: bool = False
    is_parallel: bool = False
    query_key_norm: str | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    has_learned_positions: bool = False
    source: HubConfig = field(default_factory=dict, repr=False, compare=False)

    @property
    def refuses_longer_texts(self) -> bool:
        """Is there nothing, or something else, to compute beyond ``max_positions``?"""
        return self.has_learned_positions or _longrope_context(self.ropes) is not None


def read_config(folder: Path) -> ModelConfig:
    """Read ``folder/config.json``.

    Raises:
        InputError: no such file, not JSON, or a model that this engine does not support.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder: config.json is missing")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    return parse_config(config, where=str(path))


def parse_config(config: HubConfig, *, where: str = "config") -> ModelConfig:
    """Turn a decoded ``config.json`` into a ``ModelConfig``.

    Raises:
        InputError: an unsupported or contradictory entry, named with ``where``.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{where}: model_type {name!r} is not supported; "
            f"supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    if config.get("quantization_config") is not None:
        raise InputError(f"{where}: quantization_config: quantised weights cannot be trained")
    architecture = ARCHITECTURES[name]
    entries = Entries(config, where, architecture.names, architecture.defaults)
    heads = entries.count("num_attention_heads")
    facts: Facts = {
        "architecture": name,
        "vocab_size": entries.count("vocab_size"),
        "hidden_size": entries.count("hidden_size"),
        "layers": entries.count("num_hidden_layers", most=_MOST_LAYERS),
        "heads": heads,
        "key_heads": _key_heads(entries, heads),
        "head_size": head_size(entries),
        "norm_epsilon": entries.positive("rms_norm_eps", 1e-6),
        "max_positions": entries.count_or_none("max_position_embeddings") or 2048,
        "ties_embeddings": entries.flag("tie_word_embeddings"),
        "activation": _activation(entries),
        "source": dict(config),
    }
    facts |= architecture.facts(entries)
    return ModelConfig(**_with_usual_layers(facts, entries))


def _key_heads(entries: Entries, heads: int) -> int:
    key_heads = entries.count_or_none("num_key_value_heads") or heads
    if heads % key_heads:
        raise entries.fault(
            "num_attention_heads", f"{heads} is no multiple of num_key_value_heads {key_heads}"
        )
    return key_heads


def _activation(entries: Entries) -> str:
    activation = entries.get("hidden_act") or "silu"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        expected = ", ".join(map(repr, ACTIVATIONS))
        raise entries.fault("hidden_act", f"{activation!r} is not supported; expected {expected}")
    return activation


def _with_usual_layers(facts: Facts, entries: Entries) -> Facts:
    """Add what an architecture did not say of its layers, and bound its texts."""
    layers = facts["layers"]
    facts = {"windows": (None,) * layers, "experts": (None,) * layers, **facts}
    if "intermediate_size" not in facts:
        facts["intermediate_size"] = entries.count("intermediate_size")
    if "ropes" not in facts:
        facts["ropes"] = (parse_rope(entries, facts["head_size"]),) * layers
    if context := _longrope_context(facts["ropes"]):
        facts["max_positions"] = min(facts["max_positions"], context)
    return facts


def _longrope_context(ropes: tuple[Rope | None, ...]) -> int | None:
    """Return the tokens up to which "longrope" has the same frequencies for all texts."""
    contexts = [rope.original_context for rope in ropes if rope and rope.kind == "longrope"]
    return min(contexts, default=None)
