"""The architectures: what each ``model_type`` means, as data.

To add one, add an entry to ``ARCHITECTURES``: a function from the entries of ``config.json`` to the
few facts in which it differs from a Llama, and what its files call things. ``tests/test_models.py``
then holds it against transformers by being named; ``README.md`` beside this file shows the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dpo.models.entries import Entries
from dpo.models.layouts import Layout
from dpo.models.rope import Rope, parse_rope

Facts = dict[str, Any]  # fields of ModelConfig


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, of which each token takes a few.

    Attributes:
        count: how many there are.
        chosen: how many a token takes.
        size: hidden numbers of one.
        shares_sum_to_one: the shares of the chosen are scaled to sum to one.
    """

    count: int
    chosen: int
    size: int
    shares_sum_to_one: bool


@dataclass(frozen=True)
class Architecture:
    """What a ``model_type`` means.

    Attributes:
        facts: from the entries of config.json to the fields of ``ModelConfig`` that are not those
            of a Llama.
        names: what its config.json calls an entry, by Llama's name, where that is another.
        defaults: of entries that its config.json may leave out, by Llama's name.
        layout: how its checkpoints name and arrange the weights.
    """

    facts: Callable[[Entries], Facts]
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)


def head_size(entries: Entries) -> int:
    """Return the numbers of a head."""
    hidden, heads = entries.count("hidden_size"), entries.count("num_attention_heads")
    return entries.count_or_none("head_dim") or hidden // heads


def _llama(entries: Entries) -> Facts:
    return _attention_biases(entries) | {"has_mlp_bias": entries.flag("mlp_bias")}


def _attention_biases(entries: Entries) -> Facts:
    has_bias = entries.flag("attention_bias")
    return {"has_qkv_bias": has_bias, "has_attention_output_bias": has_bias}


def _mistral(entries: Entries) -> Facts:
    window = entries.count_or_none("sliding_window")
    return {"windows": (window,) * entries.count("num_hidden_layers")}


def _mixtral(entries: Entries) -> Facts:
    experts = Experts(
        count=entries.count("num_local_experts"),
        chosen=entries.count("num_experts_per_tok"),
        size=entries.count("intermediate_size"),
        shares_sum_to_one=True,
    )
    return _mistral(entries) | {"experts": (experts,) * entries.count("num_hidden_layers")}


def _qwen2(entries: Entries) -> Facts:
    return {"has_qkv_bias": True, "windows": _qwen_windows(entries)}


def _qwen3(entries: Entries) -> Facts:
    facts = {"query_key_norm": "each head", "windows": _qwen_windows(entries)}
    return _attention_biases(entries) | facts


def _qwen_windows(entries: Entries) -> tuple[int | None, ...]:
    """Layers from ``max_window_layers`` on have the sliding window, if it is switched on at all."""
    layers = entries.count("num_hidden_layers")
    first = entries.count("max_window_layers", least=0)
    window = entries.count("sliding_window") if entries.flag("use_sliding_window") else None
    return tuple(window if layer >= first else None for layer in range(layers))


def _qwen3_moe(entries: Entries) -> Facts:
    """All layers have the window, if it is switched on; some may have a plain MLP."""
    layers = entries.count("num_hidden_layers")
    older = entries.get("num_local_experts") is None  # than transformers 5
    experts = Experts(
        count=entries.count("num_experts" if older else "num_local_experts"),
        chosen=entries.count("num_experts_per_tok"),
        size=entries.count("moe_intermediate_size"),
        shares_sum_to_one=entries.flag("norm_topk_prob"),
    )
    plain, every = entries.get("mlp_only_layers") or [], entries.count("decoder_sparse_step")
    window = entries.count("sliding_window") if entries.flag("use_sliding_window") else None
    return _attention_biases(entries) | {
        "query_key_norm": "each head",
        "windows": (window,) * layers,
        "experts": tuple(
            None if layer in plain or (layer + 1) % every else experts for layer in range(layers)
        ),
    }


def _gemma2(entries: Entries) -> Facts:
    entries.refuse("use_bidirectional_attention", allowed=False)
    return _attention_biases(entries) | {
        "norm": "rms, gain less one",
        "norms_outputs": True,
        "embedding_scale": entries.count("hidden_size") ** 0.5,
        "query_scale": entries.positive("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": entries.positive_or_none("attn_logit_softcapping"),
        "logit_softcap": entries.positive_or_none("final_logit_softcapping"),
        "windows": _windows(entries, _is_sliding(entries, every=2)),
    }


def _gemma3(entries: Entries) -> Facts:
    every = "sliding_window_pattern"
    is_sliding = _is_sliding(entries, every=entries.count(every))
    return _gemma2(entries) | {
        "query_key_norm": "each head",
        "attention_softcap": None,
        "windows": _windows(entries, is_sliding),
        "ropes": _ropes(entries, is_sliding, theta_of_sliding="rope_local_base_freq"),
    }


def _is_sliding(entries: Entries, *, every: int) -> list[bool]:
    """Say of each layer whether it has a window; without a list every so-manieth has none."""
    layers = entries.count("num_hidden_layers")
    types = entries.listed("layer_types", layers)
    if types is None:
        return [(layer + 1) % every != 0 for layer in range(layers)]
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise entries.fault(
                "layer_types",
                f"{kind!r} is not supported; expected 'sliding_attention' or 'full_attention'",
            )
    return [kind == "sliding_attention" for kind in types]


def _windows(entries: Entries, is_sliding: list[bool]) -> tuple[int | None, ...]:
    window = entries.count("sliding_window") if any(is_sliding) else None
    return tuple(window if slides else None for slides in is_sliding)


def _ropes(
    entries: Entries, is_sliding: list[bool], *, theta_of_sliding: str
) -> tuple[Rope | None, ...]:
    """Read two rotary embeddings; without one of its own, a layer with a window has a plain one."""
    by_type = entries.within("rope_parameters")
    full = by_type.within("full_attention") if by_type else None
    sliding = by_type.within("sliding_attention") if by_type else None
    size = head_size(entries)
    plain = Entries({"rope_type": "default"}, entries.where)
    rope_of_full = parse_rope(entries, size, scaling=full)
    rope_of_sliding = parse_rope(entries, size, scaling=sliding or plain, theta=theta_of_sliding)
    return tuple(rope_of_sliding if slides else rope_of_full for slides in is_sliding)


def _olmo2(entries: Entries) -> Facts:
    return _attention_biases(entries) | {
        "query_key_norm": "all heads",
        "norms_inputs": False,
        "norms_outputs": True,
    }


def _olmo3(entries: Entries) -> Facts:
    is_sliding = _is_sliding(entries, every=4)
    return _olmo2(entries) | {
        "windows": _windows(entries, is_sliding),
        "ropes": _ropes(entries, is_sliding, theta_of_sliding="rope_theta"),
    }


def _smollm3(entries: Entries) -> Facts:
    """Some layers have no rotary embedding; these have the window, if it is switched on."""
    layers = entries.count("num_hidden_layers")
    every = entries.count("no_rope_layer_interval")
    rotates = entries.listed("no_rope_layers", layers)
    if rotates is None:
        rotates = [(layer + 1) % every != 0 for layer in range(layers)]
    is_sliding = [False] * layers
    if entries.flag("use_sliding_window"):
        given = entries.get("layer_types") is not None
        is_sliding = _is_sliding(entries, every=every) if given else [not each for each in rotates]
    rope = parse_rope(entries, head_size(entries))
    return _llama(entries) | {
        "windows": _windows(entries, is_sliding),
        "ropes": tuple(rope if each else None for each in rotates),
    }


def _granite(entries: Entries) -> Facts:
    """A Llama with four factors that keep the scales of wide models: Yang et al. 2022."""
    return _llama(entries) | {
        "embedding_scale": entries.positive("embedding_multiplier"),
        "residual_scale": entries.positive("residual_multiplier"),
        "query_scale": entries.positive("attention_multiplier"),
        "logit_scale": 1.0 / entries.positive("logits_scaling"),
    }


def _glm4(entries: Entries) -> Facts:
    rope = parse_rope(entries, head_size(entries), pairs_neighbours=True)
    return {
        "has_qkv_bias": entries.flag("attention_bias"),
        "norms_outputs": True,
        "ropes": (rope,) * entries.count("num_hidden_layers"),
    }


def _cohere2(entries: Entries) -> Facts:
    """Attention and MLP read one norm side by side; layers without a window do not rotate."""
    is_sliding = _is_sliding(entries, every=entries.count("sliding_window_pattern"))
    rope = parse_rope(entries, head_size(entries), pairs_neighbours=True)
    return _attention_biases(entries) | {
        "norm": "layer, no bias",
        "is_parallel": True,
        "has_one_norm": True,
        "logit_scale": entries.positive("logit_scale"),
        "windows": _windows(entries, is_sliding),
        "ropes": tuple(rope if slides else None for slides in is_sliding),
    }


def _gpt2(entries: Entries) -> Facts:
    for key in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        entries.refuse(key, allowed=False)
    inner = entries.count_or_none("intermediate_size")
    return {
        "intermediate_size": inner or 4 * entries.count("hidden_size"),
        "has_learned_positions": True,
        "ropes": (None,) * entries.count("num_hidden_layers"),
        "query_scale": None if entries.flag("scale_attn_weights") else 1.0,
    } | _WITH_BIASES


def _gpt_neox(entries: Entries) -> Facts:
    facts = _attention_biases(entries) | {"is_parallel": entries.flag("use_parallel_residual")}
    return _WITH_BIASES | facts


_WITH_BIASES: Final = {
    "norm": "layer",
    "is_gated": False,
    "has_qkv_bias": True,
    "has_attention_output_bias": True,
    "has_mlp_bias": True,
}
_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP: Final = {
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}
_OUTPUT_NORMS: Final = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_GEMMA: Final[dict[str, Any]] = {
    "names": {"hidden_act": "hidden_activation"},
    "layout": Layout({"post_attention_layernorm": "pre_feedforward_layernorm", **_OUTPUT_NORMS}),
}
_GEMMA_DEFAULTS: Final = {
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture(_llama),
    "mistral": Architecture(_mistral, defaults={"sliding_window": 4096}),
    "mixtral": Architecture(
        _mixtral,
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        layout=Layout(
            {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
        ),
    ),
    "qwen2": Architecture(_qwen2, defaults={"max_window_layers": 28, "sliding_window": 4096}),
    "qwen3": Architecture(
        _qwen3, defaults={"max_window_layers": 28, "sliding_window": 4096, "head_dim": 128}
    ),
    "qwen3_moe": Architecture(
        _qwen3_moe,
        defaults={
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
        },
    ),
    "gemma2": Architecture(
        _gemma2,
        defaults={
            **_GEMMA_DEFAULTS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        **_GEMMA,
    ),
    "gemma3_text": Architecture(
        _gemma3,
        defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        **_GEMMA,
    ),
    "phi3": Architecture(
        _mistral,
        defaults={"rms_norm_eps": 1e-5},
        layout=Layout(dict.fromkeys(_QKV, "self_attn.qkv_proj") | _GATE_UP),
    ),
    "olmo2": Architecture(_olmo2, defaults={"rms_norm_eps": 1e-5}, layout=Layout(_OUTPUT_NORMS)),
    "olmo3": Architecture(
        _olmo3,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
        layout=Layout(_OUTPUT_NORMS),
    ),
    "smollm3": Architecture(
        _smollm3,
        defaults={
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Architecture(
        _granite,
        defaults={
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "glm4": Architecture(
        _glm4,
        defaults={
            "head_dim": 128,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1.5625e-7,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
        },
        layout=Layout(
            {
                **_GATE_UP,
                "attention_output_norm": "post_self_attn_layernorm",
                "mlp_output_norm": "post_mlp_layernorm",
            }
        ),
    ),
    "cohere2": Architecture(
        _cohere2,
        names={"rms_norm_eps": "layer_norm_eps"},
        defaults={
            "rms_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": Architecture(
        _gpt2,
        names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        },
        layout=Layout(
            {
                "model.embed_tokens": "transformer.wte",
                "model.embed_positions": "transformer.wpe",
                "model.layers": "transformer.h",
                "model.norm": "transformer.ln_f",
                "input_layernorm": "ln_1",
                "post_attention_layernorm": "ln_2",
                **dict.fromkeys(_QKV, "attn.c_attn"),
                "self_attn.o_proj": "attn.c_proj",
                "mlp.up_proj": "mlp.c_fc",
                "mlp.down_proj": "mlp.c_proj",
            },
            optional_prefix="transformer.",
            transposes_layers=True,
        ),
    ),
    "gpt_neox": Architecture(
        _gpt_neox,
        names={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        defaults={
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        layout=Layout(
            {
                "model.embed_tokens": "gpt_neox.embed_in",
                "model.layers": "gpt_neox.layers",
                "model.norm": "gpt_neox.final_layer_norm",
                **dict.fromkeys(_QKV, "attention.query_key_value"),
                "self_attn.o_proj": "attention.dense",
                "mlp.up_proj": "mlp.dense_h_to_4h",
                "mlp.down_proj": "mlp.dense_4h_to_h",
                "lm_head": "embed_out",
            },
            interleaves_heads=True,
        ),
    ),
}
