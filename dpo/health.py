"""How the optimizer steps of a window went, in numbers that stay on the device until it is closed.

Shapes: W weights that are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

from dpo.metrics import wide

SAMPLE: Final = 2**18  # weights that are looked at, at most


class StepMeans:
    """Means over steps of scalars on the device, which is waited for once, to read all of them."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add the value of a step, ()."""
        self._values.setdefault(name, []).append(value)

    def result(self) -> dict[str, float]:
        """Return the means, each over the steps that had such a value."""
        means = [wide(torch.stack(values)).mean() for values in self._values.values()]
        return dict(zip(self._values, torch.stack(means).tolist() if means else [], strict=True))


class WeightSample:
    """Every n-th trained weight, so that at most ``SAMPLE`` are looked at: all if there are fewer.

    To look at it costs the same whatever the optimizer and the size of the model: no copy of the
    weights and no pass through all of them. Of so many the norm is that of all within a hundredth,
    unless a few weights make most of it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, most: int = SAMPLE) -> None:
        """Choose the weights; the parameters must stay where they are in memory.

        Args:
            parameters: those that are frozen or do not lie in one piece are passed over.
            most: weights in the sample.
        """
        trained = [p.detach() for p in parameters if p.requires_grad and p.is_contiguous()]
        every = max(1, math.ceil(sum(p.numel() for p in trained) / most))
        widths = {p.shape[-1] for p in trained if p.dim() > 1}
        while any(math.gcd(every, width) > 1 for width in widths):
            every += 1  # else some columns would be looked at in every row, and others never
        self._views = [p.view(-1)[::every] for p in trained]

    def read(self) -> Tensor:
        """Return the weights as they are, (W,), without waiting for the device."""
        return torch.cat(self._views)


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Return ``|after - before| / |before|``, (), in L2 norms, float32 at least."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    change, size = (
        torch.linalg.vector_norm(each, dtype=dtype) for each in (after - before, before)
    )
    ratio: Tensor = change / size
    return ratio
