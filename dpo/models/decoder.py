"""The decoder: one class for every architecture, over a flat stream of tokens.

Parameter names are those of Llama's checkpoints; ``dpo.models.layouts`` maps those of others.

Shapes: N tokens, D hidden size, H heads, G key heads, E size of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dpo.attention import AttentionOptions, attend
from dpo.errors import InputError
from dpo.models.activations import ACTIVATIONS
from dpo.models.config import ModelConfig
from dpo.models.experts import SparseMLP
from dpo.models.gating import gated
from dpo.models.linear import Embedding, Linear
from dpo.models.norms import make_norm, make_query_key_norm
from dpo.models.rope import Rotation, rotation
from dpo.policy import WHOLE, OutputHead
from dpo.routing import RouterUse, total_use, use_of
from dpo.segments import AttentionPlan, Segments, TokenStream

Attend = Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor]
"""From (N, H, E) queries, (N, G, E) keys and (N, G, E) values to (N, H, E)."""

AttendIn = Callable[[AttentionPlan, Tensor, Tensor, Tensor, AttentionOptions], Tensor]


class Decoder(nn.Module):
    """A causal language model of the architecture that the configuration describes.

    Follows the ``Policy`` protocol: calling it gives hidden states, ``output_head`` the way to
    logits.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vocabulary = WHOLE  # whose rows the output projection has
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output projection the embedding itself, if the configuration says so."""
        if self.config.ties_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, stream: TokenStream) -> Tensor:
        """Return (N, D) hidden states of ``stream`` after the last norm.

        Raises:
            InputError: a text is longer than the model can read.
        """
        hidden: Tensor = self.model(stream)
        return hidden

    def record_routers(self) -> bool:
        """Let every forward pass keep what ``router_use`` needs; False if there are no experts."""
        sparse = self._sparse_layers()
        for layer in sparse:
            layer.records = True
        return bool(sparse)

    def router_use(self, weights: Tensor) -> RouterUse:
        """Return the use of experts in the last forward pass, by (N,) ``weights`` of tokens."""
        records = [layer.record for layer in self._sparse_layers()]
        return total_use([use_of(*record, weights) for record in records if record is not None])

    def _sparse_layers(self) -> list[SparseMLP]:
        return [module for module in self.modules() if isinstance(module, SparseMLP)]

    def output_head(self) -> OutputHead:
        """Return the output projection."""
        config = self.config
        return OutputHead(
            self.lm_head.weight,
            scale=config.logit_scale,
            softcap=config.logit_softcap,
            vocabulary=self.vocabulary,
        )


class Trunk(nn.Module):
    """Embedding, blocks, last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.has_learned_positions:
            self.embed_positions = Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.attend_in: AttendIn = attend_in

    def forward(self, stream: TokenStream) -> Tensor:
        """Return (N, D) hidden states of ``stream`` after the last norm.

        Raises:
            InputError: a text is longer than the model can read.
        """
        if self.config.refuses_longer_texts:
            _check_lengths(stream.plan.segments, self.config.max_positions)
        attend_in_stream = partial(self.attend_in, stream.plan)
        return self.read(
            stream.input_ids, stream.positions, [attend_in_stream] * self.config.layers
        )

    def read(self, ids: Tensor, positions: Tensor, attend_in: Sequence[Attend]) -> Tensor:
        """Return (N, D) hidden states after the last norm.

        Args:
            ids: (N,) int64 tokens.
            positions: (N,) int64, the place of each in its text.
            attend_in: how each layer attends.
        """
        hidden = self.embed_tokens(ids)  # (N, D)
        if self.config.embedding_scale != 1.0:
            hidden = hidden * self.config.embedding_scale
        if self.config.has_learned_positions:
            hidden = hidden + self.embed_positions(positions)
        ropes = self.config.ropes
        rotations = {rope: rope and rotation(positions, rope) for rope in dict.fromkeys(ropes)}
        for block, rope, attend_here in zip(self.layers, ropes, attend_in, strict=True):
            hidden = block(hidden, rotations[rope], attend_here)
        normed: Tensor = self.norm(hidden)
        return normed


class Block(nn.Module):
    """Attention and MLP, normed before or behind or both, and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        experts = config.experts[layer]
        self.self_attn = Attention(config, config.windows[layer])
        self.mlp = make_mlp(config) if experts is None else SparseMLP(config, experts)
        before, behind = config.norms_inputs, config.norms_outputs
        self.input_layernorm = make_norm(config) if before else nn.Identity()
        self.post_attention_layernorm = make_norm(config) if before else nn.Identity()
        if config.has_one_norm:
            self.post_attention_layernorm = self.input_layernorm
        self.attention_output_norm = make_norm(config) if behind else nn.Identity()
        self.mlp_output_norm = make_norm(config) if behind else nn.Identity()
        self.is_parallel, self.residual_scale = config.is_parallel, config.residual_scale

    def forward(self, hidden: Tensor, rotation: Rotation | None, attend_here: Attend) -> Tensor:
        """Map (N, D) to (N, D)."""
        read = as_factor(self.input_layernorm(hidden))
        attended = self.self_attn(read, rotation, attend_here)
        attended = self.attention_output_norm(attended)
        between = torch.add(hidden, attended, alpha=self.residual_scale)
        read = as_factor(self.post_attention_layernorm(hidden if self.is_parallel else between))
        return torch.add(between, self.mlp_output_norm(self.mlp(read)), alpha=self.residual_scale)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over the segments of the stream."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        size, head = config.hidden_size, config.head_size
        self.head_size = head
        self.options = AttentionOptions(window, config.query_scale, config.attention_softcap)
        has_bias = config.has_qkv_bias
        self.q_proj = Linear(size, config.heads * head, bias=has_bias)
        self.k_proj = Linear(size, config.key_heads * head, bias=has_bias)
        self.v_proj = Linear(size, config.key_heads * head, bias=has_bias)
        self.o_proj = Linear(config.heads * head, size, bias=config.has_attention_output_bias)
        self.q_norm = make_query_key_norm(config, config.heads)
        self.k_norm = make_query_key_norm(config, config.key_heads)

    def forward(self, hidden: Tensor, rotation: Rotation | None, attend_here: Attend) -> Tensor:
        """Map (N, D) to (N, D)."""
        query = self.q_norm(self.q_proj(hidden).unflatten(1, (-1, self.head_size)))  # (N, H, E)
        key = self.k_norm(self.k_proj(hidden).unflatten(1, (-1, self.head_size)))  # (N, G, E)
        value = self.v_proj(hidden).unflatten(1, (-1, self.head_size))  # (N, G, E)
        if rotation is not None:
            query, key = rotation.rotate(query), rotation.rotate(key)
        attended = attend_here(query.to(value.dtype), key.to(value.dtype), value, self.options)
        output: Tensor = self.o_proj(attended.flatten(1))  # (N, D)
        return output


class GatedMLP(nn.Module):
    """Two layers with a gate between them (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = Linear(size, inner, bias=bias)
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (N, D) to (N, D)."""
        inner = gated(self.gate_proj(hidden), self.up_proj(hidden), self.activation)  # (N, I)
        projected: Tensor = self.down_proj(inner)
        return projected


class PlainMLP(nn.Module):
    """Two layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (N, D) to (N, D)."""
        projected: Tensor = self.down_proj(self.activation(self.up_proj(hidden)))
        return projected


def make_mlp(config: ModelConfig) -> nn.Module:
    """Make an MLP that all tokens take."""
    return GatedMLP(config) if config.is_gated else PlainMLP(config)


def as_factor(hidden: Tensor) -> Tensor:
    """Round to autocast's dtype, if it is on: once, not in each product that reads ``hidden``."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden
    return hidden.to(torch.get_autocast_dtype(kind))


def attend_in(
    plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Tensor:
    """Attend within a stream; with its plan an ``Attend``."""
    return attend(query, key, value, plan, options)


def _check_lengths(segments: Segments, most: int) -> None:
    ends = map(sum, zip(segments.depths, segments.lengths, strict=True))
    if (longest := max(ends)) > most:
        raise InputError(
            f"a text has {longest} tokens, this model can read {most}; "
            f"--max-length {most} refuses such rows, and --truncation drops or cuts them"
        )
