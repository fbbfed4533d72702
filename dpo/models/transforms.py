"""What can be done to a decoder before training: functions that change a module and return nothing.

The trainer knows nothing of them.
"""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from dpo.models.decoder import Decoder


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
    """Compile each block for streams of any length, in place; all blocks share one graph."""
    for block in model.model.layers:
        block.compile(dynamic=True)
