"""The activations of MLPs.

To add one, put it into ``ACTIVATIONS`` under its name in ``config.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A function of each number.

    Attributes:
        function: of a tensor.
        backward: from the gradient of what it gave and from what it was given to the gradient of
            the latter.
    """

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function of ``x``."""
        return self.function(x)


_GELU: Final = Activation(F.gelu, _aten.gelu_backward)
_GELU_BY_TANH: Final = Activation(
    partial(F.gelu, approximate="tanh"), partial(_aten.gelu_backward, approximate="tanh")
)
ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": Activation(F.silu, _aten.silu_backward),
    "gelu": _GELU,
    "gelu_new": _GELU_BY_TANH,
    "gelu_pytorch_tanh": _GELU_BY_TANH,
}
