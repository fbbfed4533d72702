"""The arithmetic that training on some pairs cannot do without.

Shapes: P pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dpo.models import Decoder
from dpo.models.transforms import RECOMPUTED
from dpo.quantization import QuantizedLinear
from dpo.train_config import Recompute

Lengths: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingFlops:
    """What a step on pairs takes: 6 x active weights x useful tokens, and attention.

    A multiplication and its addition are two. Of the three passes through a product (forward, the
    gradient of its input, that of its weight) a frozen weight has two. The head counts for answers
    alone; padding, or a prompt a second time, never.

    Attributes:
        per_token: of the layers' products.
        per_answer_token: of the head's.
        per_visible_token: of attention, by its window, for each token that a token sees.
    """

    per_token: float
    per_answer_token: float
    per_visible_token: Mapping[int | None, float]

    @classmethod
    def of(cls, model: Decoder, *, recompute: Recompute | None = None) -> TrainingFlops:
        """Read the shapes of a model's weights, and which are trained.

        Args:
            model: what is trained.
            recompute: count what is computed again as for ``dpo train``, as work of its own.
        """
        config, per_token = model.config, 0.0
        attention: dict[int | None, float] = defaultdict(float)
        for block, window, experts in zip(
            model.model.layers, config.windows, config.experts, strict=True
        ):
            made_again = set() if recompute is None else _made_again(block, recompute)
            for module in block.modules():
                again = int(module in made_again)
                for weight in module.parameters(recurse=False):
                    share = experts.chosen / experts.count if experts and weight.dim() == 3 else 1.0
                    per_token += share * (again + _passes(weight)) * _flops(weight, module)
                per_token += (again + 2) * _quantized_flops(module)
            again = int(block.self_attn in made_again)
            attention[window] += (again + 3) * 4.0 * config.heads * config.head_size
        head = 2.0 * config.vocab_size * config.hidden_size
        return cls(per_token, _passes(model.output_head().weight) * head, dict(attention))

    def __call__(self, lengths: Lengths) -> float:
        """Count for (P, 3) tokens of prompt, chosen and rejected answer."""
        attention = sum(
            each * visible_tokens(lengths, window)
            for window, each in self.per_visible_token.items()
        )
        products = self.per_token * float(lengths.sum())
        return products + attention + self.per_answer_token * float(lengths[:, 1:].sum())


def training_flops(
    model: Decoder, lengths: Lengths, *, recompute: Recompute | None = None
) -> float:
    """Count once, as ``TrainingFlops`` does."""
    return TrainingFlops.of(model, recompute=recompute)(lengths)


def visible_tokens(lengths: Lengths, window: int | None = None) -> float:
    """Count over all tokens of (P, 3) pairs the tokens that each sees: itself and what is above."""
    prompt, answers = lengths[:, 0], lengths[:, 1:]
    ends = prompt[:, None] + answers  # (P, 2)
    above = _triangle(ends, window) - _triangle(prompt[:, None], window)
    return float(_triangle(prompt, window).sum() + above.sum())


def _triangle(length: Lengths, window: int | None) -> Lengths:
    """Sum min(place, window) over the places 1, 2, ... of texts."""
    near = length if window is None else np.minimum(length, window)
    return near * (near + 1) // 2 + (length - near) * (window or 0)


def _made_again(block: nn.Module, recompute: Recompute) -> set[nn.Module]:
    """Return what of a block runs again: not its last product, whose result nothing reads."""
    return {
        module
        for name, module in block.named_modules()
        if name.startswith(RECOMPUTED[recompute]) and not name.startswith("mlp.down_proj")
    }


def _passes(weight: Tensor) -> int:
    return 3 if weight.requires_grad else 2


def _quantized_flops(module: nn.Module) -> float:
    """Per token and pass, of the weights that are held in codes and so are no parameters."""
    if not isinstance(module, QuantizedLinear):
        return 0.0
    return 2.0 * module.in_features * module.out_features


def _flops(weight: Tensor, module: nn.Module) -> float:
    """Per token and pass: none of a vector, which only scales; of all parts of a divided matrix."""
    if weight.dim() > 1 and isinstance(module, nn.Linear):
        return 2.0 * module.in_features * module.out_features
    return 2.0 * weight.numel() if weight.dim() > 1 else 0.0
