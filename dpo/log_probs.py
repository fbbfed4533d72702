"""Log-probabilities of answer tokens without ever holding the logits.

Shapes: N tokens in the stream, K answer tokens, D hidden size, V vocabulary, C vocabulary entries
in a tile, R rank of the head's update.

Only the K positions that predict an answer token reach the vocabulary, and the vocabulary is walked
in tiles: a (K, C) tile of logits is folded into a running log-sum-exp and thrown away; the backward
pass makes it again. Tiles run over the vocabulary and not over tokens, so each row of the weight's
gradient is written once. An update of the head's weight is never added to it: its factors are more
columns, ``(h, s h A^T) (W, B)^T = h (W + s B A)^T``.

Processes that divide the vocabulary walk their own part each, and exchange a few numbers for each
token: no logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dpo.batching import AnswerBatch
from dpo.policy import OutputHead, Policy, Vocabulary

TILE_BYTES: Final = 64 * 2**20
CPU_TILE_BYTES: Final = 8 * 2**20  # stays in the cache, and in memory that is used again


@dataclass(frozen=True)
class TokenLogProbs:
    """What one pass over the vocabulary says about K answer tokens.

    Attributes:
        log_probs: (K,) float32 (float64 from float64 models), nats, differentiable.
        entropy: (K,) of the distribution each token was drawn from, nats, no gradient.
        is_top: (K,) bool, is the token the most likely one?
        log_square: (K,) log of the sum of squared probabilities, no gradient, if asked for.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top: Tensor
    log_square: Tensor | None = None


@dataclass(frozen=True)
class Predictions:
    """Next-token distributions at K places, as hidden states (K, D) and the way to logits."""

    hidden: Tensor
    head: OutputHead


def predict_answers(policy: Policy, texts: AnswerBatch) -> Predictions:
    """Run ``policy`` over ``texts``; return what it predicts at each answer token."""
    hidden = policy(texts.stream).index_select(0, texts.predictors)  # (K, D)
    return Predictions(hidden, policy.output_head())


def completion_log_probs(
    policy: Policy, texts: AnswerBatch, *, tile_bytes: int | None = None
) -> TokenLogProbs:
    """Score the answer tokens of ``texts`` under ``policy``.

    Equals gathering the targets from the log-softmax of the full (N, V) logits.

    Example:
        >>> from dpo import collate, completion_log_probs, load_model, load_tokenizer
        >>> from dpo import read_pairs, tokenize_pairs
        >>> pairs = tokenize_pairs(read_pairs("pairs.jsonl"), load_tokenizer("model")).pairs
        >>> batch = collate([pairs[0]])
        >>> log_probs = completion_log_probs(load_model("model"), batch.texts).log_probs
        >>> batch.texts.sum_per_answer(log_probs).shape  # of the chosen and of the rejected answer
        torch.Size([2])
    """
    predicted = predict_answers(policy, texts)
    return token_log_probs(predicted.hidden, texts.targets, predicted.head, tile_bytes=tile_bytes)


def token_log_probs(
    hidden: Tensor,
    targets: Tensor,
    head: OutputHead,
    *,
    tile_bytes: int | None = None,
    with_square: bool = False,
) -> TokenLogProbs:
    """Log-probs of ``targets`` (K,) int64 from ``hidden`` (K, D).

    The products run in the autocast dtype if there is one, sums and exponentials in float32
    (float64 for float64 input).

    Args:
        hidden: (K, D), in the order of ``targets``.
        targets: (K,) int64.
        head: the output projection.
        tile_bytes: memory for one tile of logits; None: ``CPU_TILE_BYTES`` on a CPU, else
            ``TILE_BYTES``.
        with_square: compute ``log_square`` too.
    """
    hidden, up = with_update(Predictions(head.vocabulary.shared(hidden), head))
    results = _TiledLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden,
        head.weight,
        up,
        head.bias,
        targets,
        head.scale,
        head.softcap,
        tile_bytes or default_tile_bytes(hidden.device),
        with_square,
        head.vocabulary,
    )
    return TokenLogProbs(*results)


def with_update(predicted: Predictions) -> tuple[Tensor, Tensor | None]:
    """Return the hidden states, and the factor that makes logits of their last R columns.

    They are (K, D + R) and (V, R) of a head with an update, else (K, D) and None.
    """
    update, hidden = predicted.head.update, predicted.hidden
    if update is None:
        return hidden, None
    return torch.cat([hidden, update.project(hidden)], dim=1), update.up


def default_tile_bytes(device: torch.device) -> int:
    """Return the memory for one tile of logits on a kind of device."""
    return CPU_TILE_BYTES if device.type == "cpu" else TILE_BYTES


class _TiledLogProbs(torch.autograd.Function):
    """Forward: running sums over vocabulary tiles. Backward: the tiles once more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        up: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        tile_bytes: int,
        with_square: bool,
        vocabulary: Vocabulary,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        head = TileMaker(hidden, weight, up, bias, scale, softcap, tile_bytes)
        # running max of z; finite, since (top - new_top) * total must be 0 at first
        top = hidden.new_full((len(hidden),), torch.finfo(head.wide).min, dtype=head.wide)
        total = torch.zeros_like(top)  # sum of e^(z - top)
        total_z = torch.zeros_like(top)  # sum of (z - top) e^(z - top)
        total_square = torch.zeros_like(top)  # sum of e^2(z - top)
        argmax = torch.zeros_like(targets)
        buffer = head.buffer()
        for start, tile in head.tiles():
            tile_top, tile_argmax = tile.max(dim=1)
            argmax = torch.where(tile_top > top, tile_argmax + start, argmax)
            new_top = torch.maximum(top, tile_top)
            shrink = (top - new_top).exp()
            tile -= new_top[:, None]
            exps = torch.exp(tile, out=_view(buffer, tile.shape))  # (K, C)
            if with_square:
                total_square = total_square * shrink.square() + torch.linalg.vecdot(exps, exps)
            total_z = (total_z + (top - new_top) * total) * shrink
            total = total * shrink + exps.sum(dim=1)
            total_z += exps.mul_(tile).sum(dim=1)
            top = new_top
        # what the parts of the vocabulary found, each against its own top, against that of all
        new_top = vocabulary.max(top)
        shrink = (top - new_top).exp()
        nowhere = torch.iinfo(argmax.dtype).max
        places = torch.where(top == new_top, argmax + vocabulary.first, nowhere)
        argmax = -vocabulary.max(-places)
        own = OwnTargets.of(targets, vocabulary.first, len(weight))
        sums = [total * shrink, (total_z + (top - new_top) * total) * shrink]
        sums += [total_square * shrink.square(), own.only(head.target_logits(own.places))]
        total, total_z, total_square, target_logits = vocabulary.sum(torch.stack(sums))
        log_normalizer = new_top + total.log()
        log_probs = target_logits - log_normalizer
        ctx.save_for_backward(hidden, weight, up, bias, targets, log_normalizer)
        ctx.options = (scale, softcap, tile_bytes, head.narrow, vocabulary.first)
        entropy, is_top = total.log() - total_z / total, argmax == targets
        ctx.mark_non_differentiable(entropy, is_top)
        if not with_square:
            return log_probs, entropy, is_top, None
        log_square = total_square.log() - 2 * total.log()
        ctx.mark_non_differentiable(entropy, is_top, log_square)
        return log_probs, entropy, is_top, log_square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]  # (K,); the others have none
        hidden, weight, up, bias, targets, log_normalizer = ctx.saved_tensors
        scale, softcap, tile_bytes, narrow, first = ctx.options
        head = TileMaker(hidden, weight, up, bias, scale, softcap, tile_bytes, narrow)
        # d log_prob / d z = -(softmax(z) - 1[target]): first the softmax, tile by tile
        gradients = HeadGradients(head, -grad, *ctx.needs_input_grad[:4])
        for start, tile in head.tiles():
            slope = head.slope(tile)
            tile.sub_(log_normalizer[:, None]).exp_()
            gradients.add_tile(start, tile if slope is None else tile.mul_(slope))

        # then the ones, exactly, where the targets are
        own = OwnTargets.of(targets, first, len(weight))
        slope = head.slope(head.target_logits(own.places))
        ones = torch.ones_like(grad) if slope is None else slope
        gradients.add_targets(own.places, -own.only(ones))
        return *gradients.result(), None, None, None, None, None, None


@dataclass(frozen=True)
class OwnTargets:
    """Those of K targets that lie in a part of the vocabulary.

    Attributes:
        places: (K,) int64 in the part; any of it for the others.
        are_own: (K,) bool.
    """

    places: Tensor
    are_own: Tensor

    @classmethod
    def of(cls, targets: Tensor, first: int, size: int) -> OwnTargets:
        """Find them in the ``size`` entries from ``first`` on."""
        places = targets - first
        return cls(places.clamp(0, size - 1), (places >= 0) & (places < size))

    def only(self, values: Tensor) -> Tensor:
        """Return (K,) values, zero where the target is of another part."""
        return torch.where(self.are_own, values, 0)


class HeadGradients:
    """Gradients of what makes logits, from those of the logits, row by row times a factor.

    Of the hidden states (K, D), with an update (K, D + R); of the weight (V, D); of the update's
    factor (V, R); of the bias (V,). Those that are not wanted are None.
    """

    def __init__(
        self,
        head: TileMaker,
        factor: Tensor,
        wants_hidden: bool,
        wants_weight: bool,
        wants_up: bool,
        wants_bias: bool,
    ) -> None:
        """Begin; every tile of the vocabulary must be added once. ``factor`` is (K,)."""
        self.head, self.factor = head, factor
        self.scaled = head.hidden * factor[:, None]  # (K, D)
        self.narrow = self.scaled.to(head.narrow)
        self.hidden = torch.zeros_like(head.hidden, dtype=head.wide) if wants_hidden else None
        self.weight = torch.empty_like(head.weight) if wants_weight else None
        self.up = torch.empty_like(head.up) if wants_up and head.up is not None else None
        self.bias = torch.empty_like(head.bias) if wants_bias and head.bias is not None else None
        self.size = head.weight.shape[1]

    def add_tile(self, start: int, tile: Tensor) -> None:
        """Add the (K, C) gradient, but for the factor, of the products from index ``start`` on."""
        rows = slice(start, start + tile.shape[1])
        narrow = tile.to(self.head.narrow)  # (K, C)
        if self.hidden is not None:
            self.hidden += narrow @ self.head.rows(rows).to(self.head.narrow)
        if self.weight is not None:
            self.weight[rows] = narrow.T @ self.narrow[:, : self.size]
        if self.up is not None:
            self.up[rows] = narrow.T @ self.narrow[:, self.size :]
        if self.bias is not None:
            self.bias[rows] = self.factor.to(tile.dtype) @ tile

    def add_targets(self, targets: Tensor, gradient: Tensor) -> None:
        """Add the (K,) gradient, but for the factor, of each row's target; after all tiles."""
        ones = gradient[:, None]
        if self.hidden is not None:
            self.hidden += ones * self.head.rows(targets)
        if self.weight is not None:
            of_rows = (ones * self.scaled[:, : self.size]).to(self.weight.dtype)
            self.weight.index_add_(0, targets, of_rows)
        if self.up is not None:
            self.up.index_add_(0, targets, (ones * self.scaled[:, self.size :]).to(self.up.dtype))
        if self.bias is not None:
            self.bias.index_add_(0, targets, (gradient * self.factor).to(self.bias.dtype))

    def result(self) -> tuple[Tensor | None, ...]:
        """Return the gradients, in that order, in the dtypes of what they are of."""
        hidden = self.hidden
        if hidden is not None:
            hidden = (hidden * self.factor[:, None]).to(self.head.hidden.dtype)
        return hidden, self.weight, self.up, self.bias


class TileMaker:
    """Makes (K, C) tiles of the logits of one batch.

    ``narrow`` is the dtype of the products, ``wide`` that of everything after them.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        up: Tensor | None,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        tile_bytes: int,
        narrow: torch.dtype | None = None,
    ) -> None:
        device = hidden.device.type
        if narrow is None and torch.is_autocast_enabled(device):
            narrow = torch.get_autocast_dtype(device)
        self.narrow = hidden.dtype if narrow is None else narrow
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden, self.weight, self.up, self.bias = hidden, weight, up, bias
        self.scale, self.softcap = scale, softcap
        self.tile_size = max(64, tile_bytes // (self.wide.itemsize * max(1, len(hidden))))

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first vocabulary index and the (K, C) logits of each tile, in ``wide``.

        A tile may be changed; it lives until the next is made, in the same memory.
        """
        hidden = self.hidden.to(self.narrow)
        wide = self.buffer()
        narrow = wide if self.narrow == self.wide else self.buffer(self.narrow)
        with torch.autocast(self.hidden.device.type, enabled=False):
            for start in range(0, len(self.weight), self.tile_size):
                weight = self.rows(slice(start, start + self.tile_size)).to(self.narrow)
                shape = torch.Size((len(hidden), len(weight)))
                products = torch.mm(hidden, weight.T, out=_view(narrow, shape))
                tile = products if narrow is wide else _view(wide, shape).copy_(products)
                if self.bias is not None:
                    tile += self.bias[start : start + self.tile_size]
                yield start, self._bound(tile)

    def buffer(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory for a tile, of ``wide`` if no dtype is given."""
        size = len(self.hidden) * min(self.tile_size, len(self.weight))
        return self.hidden.new_empty(size, dtype=dtype or self.wide)

    def rows(self, index: slice | Tensor) -> Tensor:
        """Rows of the weight; with an update, (W, B): its factor beside it."""
        if self.up is None:
            return self.weight[index]
        return torch.cat([self.weight[index], self.up[index]], dim=1)

    def target_logits(self, targets: Tensor) -> Tensor:
        """(K,) logits of ``targets``, as products in ``wide``: 16 bits lose the last digits."""
        chosen = self.rows(targets).to(self.wide)  # (K, D), or (K, D + R)
        logits = torch.linalg.vecdot(self.hidden.to(self.wide), chosen)
        if self.bias is not None:
            logits = logits + self.bias.index_select(0, targets)
        return self._bound(logits)

    def _bound(self, logits: Tensor) -> Tensor:
        """Scale and bound ``logits``, in place."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the bounded logits by the raw products, or None for one everywhere."""
        if self.softcap is not None:
            return self.scale * (1 - (logits / self.softcap).square())
        return None if self.scale == 1.0 else torch.full_like(logits, self.scale)


def _view(buffer: Tensor, shape: torch.Size) -> Tensor:
    """Return the start of ``buffer`` as a tensor of ``shape``."""
    return buffer[: shape.numel()].view(shape)
