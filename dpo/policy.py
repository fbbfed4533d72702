"""What the engine asks of a model: the one protocol between models and everything else.

Shapes: N tokens in the stream, D hidden size, V vocabulary, R rank of an update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from dpo.segments import TokenStream


@dataclass(frozen=True)
class LowRank:
    """An update ``scale * up @ down`` of a weight, in its two factors.

    Attributes:
        down: (R, D).
        up: (V, R).
        scale: what the update is multiplied by.
    """

    down: Tensor
    up: Tensor
    scale: float

    def project(self, hidden: Tensor) -> Tensor:
        """Return what ``up`` is multiplied by, (..., R) of (..., D), in the dtype of products."""
        return F.linear(hidden, self.down.to(hidden.dtype)) * self.scale

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the update's part of a product, (..., V) of (..., D)."""
        return F.linear(self.project(hidden), self.up.to(hidden.dtype))


class Vocabulary:
    """The part of the vocabulary whose logits this process makes: all of it.

    Of one that is divided over processes, ``dpo.tensor_parallel`` has another.

    Attributes:
        first: index of its first entry.
    """

    first = 0

    def shared(self, hidden: Tensor) -> Tensor:
        """Return (K, D) hidden states that all parts read; the gradients of all are summed."""
        return hidden

    def max(self, values: Tensor) -> Tensor:
        """Return the greatest of what each part has, number by number."""
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of what each part has, number by number."""
        return values


WHOLE: Final = Vocabulary()


@dataclass(frozen=True)
class OutputHead:
    """The map from hidden states to logits: ``z = softcap(scale * (h @ weight.T + bias))``.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        scale: factor on the logits.
        softcap: bounds logits by ``c * tanh(z / c)`` (Gemma 2); None for no bound.
        update: what is added to ``weight``, which is then frozen; None for nothing.
        vocabulary: the part of the vocabulary that weight, bias and update have rows of.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    update: LowRank | None = None
    vocabulary: Vocabulary = WHOLE

    def detached(self) -> OutputHead:
        """Return the same map without gradient, in the memory that its tensors have now."""
        update = self.update
        if update is not None:
            update = replace(update, down=update.down.detach(), up=update.up.detach())
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias, update=update)


@runtime_checkable
class Policy(Protocol):
    """What the engine asks of a model: hidden states of a stream, and how they become logits."""

    def __call__(self, stream: TokenStream, /) -> Tensor:
        """Return (N, D) final hidden states, after the last norm."""
        ...

    def output_head(self) -> OutputHead:
        """Return the output projection; called after each forward pass."""
        ...
