"""Tokens written one after another, with a cache of keys and values.

Prompts of any lengths are read as one stream without padding, by the attention that training uses.
After that each text grows by one token a step, which sees the cached keys of its own text alone.

Shapes: B texts, N tokens, V vocabulary, D hidden size, H query heads, G key heads, E size of a
head, C tokens that a text can grow to, T tokens written at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.attention import AttentionOptions, attend, attend_dense
from dpo.errors import InputError
from dpo.models.decoder import Decoder
from dpo.policy import OutputHead
from dpo.segments import AttentionPlan, Segments, plan_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How texts are written; by default with the likeliest token each time.

    Attributes:
        max_new_tokens: most tokens written, the one that ends the text included; at least 1.
        temperature: above 0; logits are divided by it, then tokens are drawn. None draws nothing.
        top_k: draw from so many of the likeliest tokens, at least 1; None from all.
        top_p: draw from the fewest likeliest tokens that have this share, in (0, 1]; None from all
            (Holtzman et al. 2019, arXiv 1904.09751). Applied after ``top_k``.
        seed: of the draws, in [0, 2^63); None is 0.

    Raises:
        InputError: values are out of range, or there is nothing to draw; names all faults.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise InputError("\n".join(faults))

    def _faults(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"max_new_tokens must be at least 1, got {self.max_new_tokens}"
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            yield f"temperature must be above 0 and finite, got {self.temperature}"
        if self.top_k is not None and self.top_k < 1:
            yield f"top_k must be at least 1, got {self.top_k}"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"top_p must be in (0, 1], got {self.top_p}"
        if self.seed is not None and not 0 <= self.seed < 2**63:
            yield f"seed must be in [0, 2^63), got {self.seed}"
        if self.temperature is None:
            for name in ("top_k", "top_p", "seed"):
                if getattr(self, name) is not None:
                    yield f"{name} is for drawing tokens: give a temperature, such as 1, as well"


@dataclass(slots=True)
class Writing:
    """A text as it is written.

    Attributes:
        ids: the tokens so far, the one that ended it included.
        log_probs: of each of them, in nats, under the model as it is: temperature 1, all tokens.
        is_finished: did the model end it?
    """

    ids: list[int]
    log_probs: list[float]
    is_finished: bool = False


def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    stop_ids: Sequence[frozenset[int]],
    uniforms: Tensor,
    on_token: Callable[[int, int], object] | None = None,
) -> list[Writing]:
    """Continue prompts until each has written one of its stop ids, or the most allowed.

    Args:
        model: what continues.
        prompts: tokens of each text, at least one; B texts.
        options: how tokens are chosen.
        stop_ids: for each text the tokens that end it.
        uniforms: (B, T) float64 in [0, 1): what decides each draw.
        on_token: called with the text's index and each token but the last of a finished text.
    """
    texts = [Writing([], []) for _ in prompts]
    active = list(range(len(prompts)))
    head, uniforms = model.output_head(), uniforms.to(_device(model))
    with torch.inference_mode():
        reader = _CachedReader(model, prompts, capacity=options.max_new_tokens)
        hidden = reader.read_prompts()  # (B, D)
        for step in range(options.max_new_tokens):
            log_probs = _logits(hidden, head).log_softmax(dim=1)  # (B, V)
            tokens = choose_tokens(log_probs, options, uniforms[active, step])  # (B,)
            chosen = log_probs.gather(1, tokens[:, None])[:, 0]
            for row, token, log_prob in zip(active, tokens.tolist(), chosen.tolist(), strict=True):
                texts[row].ids.append(token)
                texts[row].log_probs.append(log_prob)
                texts[row].is_finished = token in stop_ids[row]
                if on_token is not None and not texts[row].is_finished:
                    on_token(row, token)
            going_on = [i for i, row in enumerate(active) if not texts[row].is_finished]
            if not going_on or step + 1 == options.max_new_tokens:
                break
            if len(going_on) < len(active):
                active = [active[i] for i in going_on]
                reader.keep(going_on)
                tokens = tokens[going_on]
            hidden = reader.read_tokens(tokens)
    return texts


def choose_tokens(log_probs: Tensor, options: GenerateOptions, uniforms: Tensor) -> Tensor:
    """Choose a token for each text.

    Args:
        log_probs: (B, V).
        options: how.
        uniforms: (B,) float64 in [0, 1); the token drawn is where they lie in the cumulative
            distribution of the tokens that can be drawn, the likeliest first.

    Returns:
        (B,) int64.
    """
    if options.temperature is None:
        return log_probs.argmax(dim=1)
    kept = min(options.top_k or log_probs.shape[1], log_probs.shape[1])
    scores, tokens = log_probs.double().topk(kept, dim=1)  # (B, kept), the likeliest first
    shares = (scores / options.temperature).softmax(dim=1)
    if options.top_p is not None:
        before = shares.cumsum(dim=1) - shares
        shares = shares.masked_fill(before >= options.top_p, 0.0)
    ends = shares.cumsum(dim=1)
    places = torch.searchsorted(ends, uniforms[:, None] * ends[:, -1:], right=True)  # (B, 1)
    return tokens.gather(1, places.clamp(max=kept - 1))[:, 0]


def _logits(hidden: Tensor, head: OutputHead) -> Tensor:
    """(B, V) logits in float32, or float64 of a float64 model."""
    logits = F.linear(hidden, head.weight, head.bias)
    if head.update is not None:
        logits = logits + head.update(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _device(model: Decoder) -> torch.device:
    return model.model.embed_tokens.weight.device


class _CachedReader:
    """Reads texts with a model, and keeps the keys and values of what it has read."""

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], *, capacity: int) -> None:
        self._model = model
        self._prompts = prompts
        self._longest = max(map(len, prompts))
        config, weight = model.config, model.model.embed_tokens.weight
        size = (len(prompts), config.key_heads, self._longest + capacity - 1, config.head_size)
        # zeros: what no query sees is multiplied by zero, which leaves NaN a NaN
        self._keys = [weight.new_zeros(size) for _ in config.windows]  # (B, G, C, E) of each layer
        self._values = [weight.new_zeros(size) for _ in config.windows]
        self._lengths = torch.tensor([len(ids) for ids in prompts], device=weight.device)  # (B,)

    def read_prompts(self) -> Tensor:
        """Return (B, D) hidden states of the last token of each prompt."""
        lengths = [len(ids) for ids in self._prompts]
        segments = Segments(tuple(lengths), (None,) * len(lengths))
        device = self._lengths.device
        hidden = self._read(
            torch.tensor([token for ids in self._prompts for token in ids], device=device),
            torch.arange(len(lengths), device=device).repeat_interleave(self._lengths),
            torch.from_numpy(segments.positions()).to(device),
            plan_attention(segments).to(device),
        )  # (N, D)
        return hidden[self._lengths.cumsum(0) - 1]

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """Read one more token of each text, (B,), and return its (B, D) hidden states."""
        rows = torch.arange(len(tokens), device=tokens.device)
        self._longest += 1
        hidden = self._read(tokens, rows, self._lengths, None)
        self._lengths = self._lengths + 1
        return hidden

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all texts but ``rows``."""
        self._lengths = self._lengths[rows]
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]

    def _read(
        self, ids: Tensor, rows: Tensor, positions: Tensor, plan: AttentionPlan | None
    ) -> Tensor:
        """Return (N, D) hidden states; equals calling the model on the texts from their start.

        Args:
            ids: (N,) tokens.
            rows: (N,) the text each belongs to.
            positions: (N,) its place therein.
            plan: how tokens see each other, where these are the first of all texts; None where
                each is the next token of its text.
        """
        attend_in = [
            partial(self._attend, layer, rows, positions, plan)
            for layer in range(self._model.config.layers)
        ]
        return self._model.model.read(ids, positions, attend_in)

    def _attend(
        self,
        layer: int,
        rows: Tensor,
        positions: Tensor,
        plan: AttentionPlan | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        """Keep (N, G, E) keys and values; attend to all that the queries' texts have, (N, H, E)."""
        self._keys[layer][rows, :, positions] = key
        self._values[layer][rows, :, positions] = value
        if plan is not None:
            return attend(query, key, value, plan, options)
        places = torch.arange(self._longest, device=query.device)
        visible = places <= positions[:, None]  # (B, C)
        if options.window is not None:
            visible &= places > positions[:, None] - options.window
        attended = attend_dense(
            query[:, :, None],
            self._keys[layer][:, :, : self._longest],
            self._values[layer][:, :, : self._longest],
            visible[:, None, None],
            options,
        )  # (B, H, 1, E)
        return attended[:, :, 0]
