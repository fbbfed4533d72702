"""What the engine asks of a model: the one protocol between models and everything else.

Shapes: N tokens in the stream, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from dpo.segments import TokenStream


@dataclass(frozen=True)
class OutputHead:
    """The map from hidden states to logits: ``z = softcap(scale * (h @ weight.T + bias))``.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        scale: factor on the logits.
        softcap: bounds logits by ``c * tanh(z / c)`` (Gemma 2); None for no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@runtime_checkable
class Policy(Protocol):
    """What the engine asks of a model: hidden states of a stream, and how they become logits."""

    def __call__(self, stream: TokenStream, /) -> Tensor:
        """Return (N, D) final hidden states, after the last norm."""
        ...

    def output_head(self) -> OutputHead:
        """Return the output projection; called after each forward pass."""
        ...
