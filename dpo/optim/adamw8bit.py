"""AdamW with states of 8 bits, after Dettmers et al. 2021 (arXiv 2110.02861).

Shapes: B blocks, V values.
"""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.optim.eager import State, zeros_like
from dpo.optim.groups import ParameterGroup
from dpo.optim.parameterwise import ParameterwiseAdamW

BLOCK: Final = 256  # values that share a scale, in the order in which they lie in memory
FEWEST: Final = 4096  # a smaller parameter keeps float32 states, as in the paper
CHUNK: Final = 2**20  # values that are float32 at once, whole blocks: bounds the memory of a step

_MOMENTS: Final = {"mean": torch.int8, "root": torch.uint8}
_GOLDEN: Final = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, are as even as can be
_BELOW_ONE: Final = 1 - 2**-24  # the last float32


class AdamW8bit(ParameterwiseAdamW):
    """AdamW that keeps a byte in place of each float32 of its two states.

    The first state is the mean of the gradients, as in AdamW. The second is the root of the mean of
    their squares: the squares themselves span twice as many powers of ten, and one that is rounded
    to 0 would leave a step as long as epsilon allows. A step changes the root by less than what a
    byte resolves, so it is rounded up as often as is right over many steps, not to the nearest.
    """

    def first_states(self, parameter: Tensor) -> State:
        """Return the states of ``parameter`` before its first update."""
        count, step = parameter.numel(), torch.zeros((), dtype=torch.float32)
        if count < FEWEST or not parameter.is_contiguous():
            return {"step": step} | {
                name: zeros_like(parameter, dtype=torch.float32) for name in _MOMENTS
            }
        blocks, like = math.ceil(count / BLOCK), parameter.new_zeros
        numbers = {name: like(blocks, BLOCK, dtype=dtype) for name, dtype in _MOMENTS.items()}
        scales = {f"{name}_scale": like(blocks, dtype=torch.float32) for name in _MOMENTS}
        return {"step": step, **numbers, **scales}

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: State, group: ParameterGroup
    ) -> None:
        if "mean_scale" in state:
            _update_in_chunks(parameter.view(-1), gradient.reshape(-1), state, group)
        else:
            _update(parameter, gradient, state["mean"], state["root"], state["step"], group)


def quantise(values: Tensor, dtype: torch.dtype, *, offset: float = 0.5) -> tuple[Tensor, Tensor]:
    """Round each of V values to one that a byte and the scale of its block can hold.

    Those are ``scale * (n / N)^4``, with n a whole number up to N = 127 or 255 and the scale the
    greatest absolute value of the block: as block-wise quantisation in section 2.1 of the paper,
    with a formula in place of its table of numbers. It spans nine powers of ten as well.

    Args:
        values: (V,) float32.
        dtype: int8, or uint8 where no value is below 0.
        offset: a float32 in [0, 1) that is added to an n before it is cut to a whole number; 0.5
            rounds to the nearest.

    Returns:
        (B, 256) numbers n, with the sign of the value and zeros at the end of the last block, and
        (B,) float32 scales.
    """
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)  # (B, 256)
    scales = blocks.abs().amax(dim=1)  # (B,)
    shares = blocks.abs().div_(scales.clamp(min=torch.finfo(values.dtype).tiny)[:, None])
    most = torch.iinfo(dtype).max
    numbers = shares.sqrt_().sqrt_().mul_(most).add_(min(offset, _BELOW_ONE)).floor_()
    numbers.clamp_(max=most)  # float32 rounds 255 + 0.999999 to 256
    return numbers.copysign_(blocks).to(dtype), scales


def dequantise(numbers: Tensor, scales: Tensor) -> Tensor:
    """Return the values that ``quantise`` rounded to: (256 B,) float32."""
    roots = numbers.float().div_(torch.iinfo(numbers.dtype).max)  # (B, 256)
    return roots.square().square_().copysign_(roots).mul_(scales[:, None]).view(-1)


def _update_in_chunks(
    weights: Tensor, gradient: Tensor, state: State, group: ParameterGroup
) -> None:
    """Update (V,) ``weights`` and their ``state``, with few values in float32 at a time."""
    offsets = {"mean": 0.5, "root": state["step"].item() * _GOLDEN % 1}
    for first in range(0, len(weights), CHUNK):
        chunk = slice(first, first + CHUNK)
        blocks = slice(first // BLOCK, (first + CHUNK) // BLOCK)
        mean, root = (
            dequantise(state[name][blocks], state[f"{name}_scale"][blocks])[: len(weights[chunk])]
            for name in _MOMENTS
        )
        _update(weights[chunk], gradient[chunk], mean, root, state["step"], group)
        for name, moment in (("mean", mean), ("root", root)):
            state[name][blocks], state[f"{name}_scale"][blocks] = quantise(
                moment, _MOMENTS[name], offset=offsets[name]
            )


def _update(
    weights: Tensor,
    gradient: Tensor,
    mean: Tensor,
    root: Tensor,
    step: Tensor,
    group: ParameterGroup,
) -> None:
    """Do AdamW's update number ``step``, from 1: changes ``weights``, ``mean`` and ``root``."""
    (beta1, beta2), number, gradient = group["betas"], step.item(), gradient.float()
    mean.lerp_(gradient, 1 - beta1)
    root.square_().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
    denominator = (root / math.sqrt(1 - beta2**number)).add_(group["eps"])
    weights.mul_(1 - group["lr"] * group["weight_decay"])
    weights.add_(mean / denominator, alpha=-group["lr"] / (1 - beta1**number))
