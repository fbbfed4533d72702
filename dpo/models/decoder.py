"""The decoder: one class for every architecture, over a flat stream of tokens.

Parameter names are those of Hugging Face checkpoints, so loading and saving need no map.

Shapes: N tokens, D hidden size, H heads, G key heads, E size of a head, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.attention import attend
from dpo.models.config import ModelConfig, Rope
from dpo.policy import OutputHead
from dpo.segments import AttentionPlan, TokenStream


class Decoder(nn.Module):
    """A causal language model of the Llama family.

    Follows the ``Policy`` protocol: calling it gives hidden states, ``output_head`` the way to
    logits.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output projection the embedding itself, if the configuration says so."""
        if self.config.ties_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, stream: TokenStream) -> Tensor:
        """Return (N, D) hidden states of ``stream`` after the last norm."""
        hidden: Tensor = self.model(stream)
        return hidden

    def output_head(self) -> OutputHead:
        """Return the output projection."""
        return OutputHead(self.lm_head.weight)


class Trunk(nn.Module):
    """Embedding, blocks, last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, window) for window in config.windows)
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_epsilon)

    def forward(self, stream: TokenStream) -> Tensor:
        """Return (N, D) hidden states of ``stream`` after the last norm."""
        hidden = self.embed_tokens(stream.input_ids)  # (N, D)
        cosines, sines = rotations(stream.positions, self.config.head_size, self.config.rope)
        for block in self.layers:
            hidden = block(hidden, cosines, sines, stream.plan)
        normed: Tensor = self.norm(hidden)
        return normed


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.self_attn = Attention(config, window)
        self.mlp = GatedMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_epsilon)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_epsilon)

    def forward(
        self, hidden: Tensor, cosines: Tensor, sines: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """Map (N, D) to (N, D)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cosines, sines, plan)
        mixed: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return mixed


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over the segments of the stream."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        size, head = config.hidden_size, config.head_size
        self.head_size, self.window = head, window
        has_bias = config.has_qkv_bias
        self.q_proj = nn.Linear(size, config.heads * head, bias=has_bias)
        self.k_proj = nn.Linear(size, config.key_heads * head, bias=has_bias)
        self.v_proj = nn.Linear(size, config.key_heads * head, bias=has_bias)
        self.o_proj = nn.Linear(config.heads * head, size, bias=config.has_attention_output_bias)
        normalizes = config.normalizes_query_key
        self.q_norm = nn.RMSNorm(head, config.norm_epsilon) if normalizes else nn.Identity()
        self.k_norm = nn.RMSNorm(head, config.norm_epsilon) if normalizes else nn.Identity()

    def forward(
        self, hidden: Tensor, cosines: Tensor, sines: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """Map (N, D) to (N, D)."""
        query = self.q_norm(self.q_proj(hidden).unflatten(1, (-1, self.head_size)))  # (N, H, E)
        key = self.k_norm(self.k_proj(hidden).unflatten(1, (-1, self.head_size)))  # (N, G, E)
        value = self.v_proj(hidden).unflatten(1, (-1, self.head_size))  # (N, G, E)
        query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        attended = attend(query.to(value.dtype), key.to(value.dtype), value, plan, self.window)
        output: Tensor = self.o_proj(attended.flatten(1))  # (N, D)
        return output


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (N, D) to (N, D)."""
        projected: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return projected


def rotations(positions: Tensor, head_size: int, rope: Rope) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles.

    Args:
        positions: (N,) int64.
        head_size: E.
        rope: base and scaling.

    Returns:
        Two (N, 1, E) float32 tensors, the angles of the first half of a head repeated for the
        second.
    """
    angles = positions[:, None].float() * frequencies(head_size, rope, positions.device)  # (N, E/2)
    angles = torch.cat([angles, angles], dim=1)[:, None]  # (N, 1, E)
    return angles.cos(), angles.sin()


def frequencies(head_size: int, rope: Rope, device: torch.device | None = None) -> Tensor:
    """(E/2,) float32 rotary frequencies in radians per token (Su et al. 2021, arXiv 2104.09864).

    "linear" stretches positions (Chen et al. 2023, arXiv 2306.15595); "llama3" scales long waves
    only and blends in between (Llama 3.1).
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    base = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    turns = rope.original_context * base / (2 * math.pi)  # rotations over the original context
    span = rope.high_frequency_factor - rope.low_frequency_factor
    kept = ((turns - rope.low_frequency_factor) / span).clamp(0, 1)
    return kept * base + (1 - kept) * base / rope.factor


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate (N, H, E) queries or keys by their positions; halves of a head form the pairs."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat([-second, first], dim=-1) * sines
