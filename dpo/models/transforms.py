"""What can be done to a decoder before training: functions that change a module and return nothing.

The trainer knows nothing of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpo.models.decoder import Decoder
from dpo.quantization import QuantizedLinear


def checkpoint_activations(model: Decoder) -> None:
    """Keep only the input of each block and compute the block again in the backward pass, in place.

    Gradients are bit-equal. Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
    arXiv 1604.06174.
    """
    for block in model.model.layers:
        # no dropout, no random state to keep
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


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
        block.compile(dynamic=True)
