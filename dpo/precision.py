"""Numerics of a run: what dtype the parameters have and what the arithmetic runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Final

import torch

from dpo.train_config import TrainConfig


@dataclass(frozen=True)
class Precision:
    """One choice of numerics.

    Attributes:
        parameters: dtype of weights, gradients and optimizer state.
        autocast: dtype of matrix products where it differs, or None.
        scales_loss: float16 gradients underflow unless the loss is scaled up.
        noise: what one token's log-prob may differ by between two ways to batch it, in nats.
    """

    parameters: torch.dtype
    autocast: torch.dtype | None = None
    scales_loss: bool = False
    noise: float = 1e-4

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


# Measured on SmolLM2-135M: mean error per token 0.02 nats in bfloat16, the largest of thousands
# 0.1; float16 has eight times the resolution, and so has tf32.
_FLOAT16_NOISE: Final = 0.02
PRECISIONS: Final[dict[str, Precision]] = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16, noise=0.1),
    "bf16-mixed": Precision(torch.float32, torch.bfloat16, noise=0.1),
    "fp16-mixed": Precision(torch.float32, torch.float16, scales_loss=True, noise=_FLOAT16_NOISE),
}


def precision_of(config: TrainConfig) -> Precision:
    """Return the numerics of a run."""
    precision = PRECISIONS[config.dtype]
    return replace(precision, noise=_FLOAT16_NOISE) if config.tf32 else precision
