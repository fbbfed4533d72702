"""What each rank holds of a model in parts, from what a step holds where one process has it whole.

Arithmetic, not a rehearsal: what FSDP keeps of the parameters that it puts together
(``dpo.sharding``) is added to a rank's part of the training state, as if all of it met at the peak.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from torch import Tensor

from dpo.memory_tracker import GRADIENTS, OPTIMIZER, WEIGHTS
from dpo.models import Decoder
from dpo.token_budget import MemoryPlan

COUNTS: Final = (2, 4, 8, 16, 32, 64)  # of ranks


def bytes_in_parts(memory: MemoryPlan, policy: Decoder, count: int) -> float:
    """Return the bytes that each of ``count`` ranks holds at the peak of a step, at most.

    Beside its part of the state those are the whole embedding, last norm and output projection and
    two whole layers, once more for gradients if they are trained; adapters with their states, which
    every rank has; and all that is no state.

    Args:
        memory: of a step of one process.
        policy: as it is trained, its adapters included.
        count: of ranks.
    """
    held = {kind: memory.peak.get(kind, 0.0) for kind in (WEIGHTS, GRADIENTS, OPTIMIZER)}
    others = memory.total - sum(held.values())
    gradients = _nbytes(p for p in policy.parameters() if p.requires_grad)
    if all(parameter.requires_grad for parameter in policy.parameters()):
        state = held[WEIGHTS] + gradients + held[OPTIMIZER]
        return state / count + 2 * _put_together(policy) + others
    whole = 2 * gradients + held[OPTIMIZER]  # adapters are as large as their gradients
    return (held[WEIGHTS] - gradients) / count + whole + _put_together(policy) + others


def _put_together(policy: Decoder) -> float:
    """Return the bytes of what is in no layer and of the two largest layers, adapters left out."""
    is_whole = all(parameter.requires_grad for parameter in policy.parameters())
    divided = {p for p in policy.parameters() if is_whole or not p.requires_grad}
    layers = [divided & {*layer.parameters()} for layer in policy.model.layers]
    outside = divided.difference(*layers)
    return _nbytes(outside) + sum(sorted(map(_nbytes, layers))[-2:])


def _nbytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.nbytes for tensor in tensors))
