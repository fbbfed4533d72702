"""What can be done to a decoder before training: functions that change a module and return nothing.

The trainer knows nothing of them.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpo.models.decoder import Decoder
from dpo.quantization import QuantizedLinear
from dpo.train_config import Recompute

RECOMPUTED: Final[dict[Recompute, str]] = {"mlp": "mlp", "layer": ""}
"""Which submodule of a block it is."""


def recompute(model: Decoder, part: Recompute) -> None:
    """Keep only the input of a part of each block and compute the part again, in place.

    Gradients are bit-equal. Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
    arXiv 1604.06174.
    """
    for block in model.model.layers:
        module = block.get_submodule(RECOMPUTED[part])
        vars(module)["usual_forward"] = module.forward
        # a method, which a compiler takes for the same one in all layers
        module.forward = MethodType(_forward_to_repeat, module)


def _forward_to_repeat(module: nn.Module, *inputs: Any) -> Any:
    # no dropout, no random state to keep
    forward: Any = module.usual_forward
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(model: Decoder) -> None:
    """Compile each block for streams of any length, in place; all blocks share their graphs.

    Left out are attention, which would be compiled anew for each plan, and quantized layers: the
    making of a weight from codes cannot be traced.
    """
    outside: Any = torch.compiler.disable(model.model.attend_in)
    model.model.attend_in = outside
    modules: list[nn.Module] = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    for module in modules:
        module.forward = torch.compiler.disable(module.forward)
    for block in model.model.layers:
        # the forward pass, and not the module: what is done to that stays outside of the graphs
        block.forward = torch.compile(block.forward, dynamic=True)
