"""Stochastic rounding to 16 bits, with which small updates count on average.

The chance that a number becomes the neighbour above it is how far it lies on the way there (Gupta
et al. 2015, arXiv 1502.02551), so a sum of many updates is right on average, each of which rounding
to the nearest would lose.

Shapes: V values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dpo.optim.groups import ParameterGroup

CHUNK: Final = 2**20  # values that are float32 at once: bounds the memory of a step

Update = Callable[[Tensor, Tensor, dict[str, Tensor], ParameterGroup], None]


@dataclass(frozen=True)
class StochasticRounding:
    """Rounds bfloat16 weights and states; what is drawn follows from seed, step and parameter.

    Attributes:
        seed: of the run, in [0, 2^63).
    """

    seed: int

    def apply(
        self,
        update: Update,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: ParameterGroup,
        *,
        place: int,
    ) -> None:
        """Do an elementwise ``update`` in float32 and round what it changed, in place.

        Args:
            update: changes its first and third argument, value by value.
            weight: of any contiguous shape, and so are all that follow; or states of one number.
            gradient: of it.
            state: with the number of the ``step``.
            group: its settings.
            place: of the weight among all that are updated.
        """
        generator = self._generator(weight.device, int(state["step"].item()), place)
        single = {name: value for name, value in state.items() if value.dim() == 0}
        long = {name: value.view(-1) for name, value in state.items() if value.dim() > 0}
        flat, slopes = weight.view(-1), gradient.reshape(-1)  # (V,)
        for first in range(0, len(flat), CHUNK):
            chunk = slice(first, first + CHUNK)
            wide = {name: value[chunk].float() for name, value in long.items()}
            wide_weight = flat[chunk].float()
            update(wide_weight, slopes[chunk].float(), {**single, **wide}, group)
            for narrow, value in ((flat, wide_weight), *((long[n], wide[n]) for n in wide)):
                narrow[chunk] = round_stochastically(value, narrow.dtype, generator)

    def _generator(self, device: torch.device, step: int, place: int) -> torch.Generator:
        mixed = np.random.SeedSequence([self.seed, step, place]).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(mixed[0] >> np.uint64(1)))


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return float32 ``values`` in a dtype, in bfloat16 each as one of its two neighbours there.

    A bfloat16 is the upper half of a float32: what is added to the lower half before it is cut off
    carries as often as it should.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    drawn = torch.randint(
        2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    return drawn.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(dtype)
