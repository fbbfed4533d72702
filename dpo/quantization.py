"""Frozen linear layers in 8, 4.5 or 4.13 bits a weight.

A weight is made again from its codes in the forward and in the backward pass, and never kept. The
arithmetic is that of the input's dtype: only memory is saved.

To add a scheme: a ``Scheme``, a line in ``SCHEMES`` and its name in
``dpo.adapter_config.Quantization``; the tests go by the table.

Shapes: I inputs and O outputs of a layer, N inputs in a call, n weights in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.errors import InputError
from dpo.policy import Policy

BLOCK: Final = 64  # weights that share a scale in nf4
SCALES: Final = 256  # of these that share a scale of theirs in nf4-double

# Dettmers et al. 2023 (arXiv 2305.14314), appendix E: quantiles of the normal distribution, of
# which one is zero, divided by the largest.
NF4_CODES: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """A way to hold a weight in codes and scales.

    Attributes:
        encode: (O, I) weight to codes and float32 scales, each of any shape.
        decode: codes, scales and (O, I) to the weight, in the dtype of the scales.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, torch.Size], Tensor]


def _encode_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by a 127th of its largest weight and round: (O, I) int8, (O, 1) scales."""
    scales = weight.float().abs().amax(dim=1, keepdim=True) / 127  # (O, 1)
    codes = weight.float() / torch.where(scales > 0, scales, 1)
    return codes.round_().to(torch.int8), scales


def _decode_int8(codes: Tensor, scales: Tensor, _shape: torch.Size) -> Tensor:
    return codes * scales


def _encode_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Take the nearest of 16 values in each block of 64: (n / 2,) uint8, (n / 64, 1) scales.

    Two codes share a byte, the first in its upper half; the last block is filled up with zeros.
    """
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)  # (n / 64, 1)
    values = torch.tensor(NF4_CODES, device=weight.device)
    borders = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / torch.where(scales > 0, scales, 1), borders, out_int32=True)
    high, low = codes.to(torch.uint8).view(-1, 2).unbind(1)
    return high << 4 | low, scales


def _decode_nf4(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    values = scales.new_tensor(NF4_CODES)
    pairs = torch.cartesian_prod(values, values)  # (256, 2): what each byte stands for
    weights = F.embedding(codes.int(), pairs).view(-1, BLOCK).mul_(scales)  # (n / 64, 64)
    return weights.flatten()[: shape.numel()].view(shape)


def _encode_nf4_double(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Hold the scales of nf4 as 255ths of the largest of 256.

    Returns (n / 2 + n / 64,) uint8, the codes of all weights and then those of their scales, and
    (n / 16384, 1) scales of scales. The double quantization of Dettmers et al. 2023 (arXiv
    2305.14314, section 3) in as many bits, 0.127 a weight for scales; but where the paper codes
    their distance from their mean in both signs, they are coded from zero, which outliers harm
    less, and what was quantized once is quantized again without error.
    """
    codes, scales = _encode_nf4(weight)
    rows = F.pad(scales.flatten(), (0, -len(scales) % SCALES)).view(-1, SCALES)
    steps = rows.amax(dim=1, keepdim=True) / 255  # (n / 16384, 1)
    scale_codes = (rows / torch.where(steps > 0, steps, 1)).round_().to(torch.uint8)
    return torch.cat([codes, scale_codes.flatten()[: len(scales)]]), steps


def _decode_nf4_double(codes: Tensor, steps: Tensor, shape: torch.Size) -> Tensor:
    blocks = -(-shape.numel() // BLOCK)
    weight_codes, scale_codes = codes.split([blocks * BLOCK // 2, blocks])
    steps_of_blocks = steps.flatten().repeat_interleave(SCALES)[:blocks]
    scales = scale_codes * steps_of_blocks  # (n / 64,)
    return _decode_nf4(weight_codes, scales.unsqueeze(1), shape)


SCHEMES: Final[dict[str, Scheme]] = {
    "int8": Scheme(_encode_int8, _decode_int8),
    "nf4": Scheme(_encode_nf4, _decode_nf4),
    "nf4-double": Scheme(_encode_nf4_double, _decode_nf4_double),
}


class QuantizedLinear(nn.Module):
    """A frozen linear layer that holds codes of its weight; the bias stays as it is."""

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, scheme: str) -> None:
        """Quantize ``linear``, which is left as it is.

        Args:
            linear: what this layer stands for.
            scheme: a name in ``SCHEMES``.

        Raises:
            InputError: there is no such scheme.
        """
        super().__init__()
        if scheme not in SCHEMES:
            raise InputError(
                f"adapter.quantize must be one of {', '.join(SCHEMES)}, got {scheme!r}"
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme, self.bias, self.dtype = scheme, linear.bias, linear.weight.dtype
        codes, scales = SCHEMES[scheme].encode(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.to(torch.promote_types(self.dtype, torch.float32)))

    def take(self, weight: Tensor) -> None:
        """Hold ``weight`` (O, I) from now on, in the memory that is there."""
        codes, scales = SCHEMES[self.scheme].encode(weight)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    @property
    def weight(self) -> Tensor:
        """The (O, I) weight that the codes stand for, made anew, in the dtype of the original."""
        return _decoded(self.codes, self.scales, self.scheme, self._shape, self.dtype)

    @property
    def _shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            hidden, self.codes, self.scales, self.scheme, self._shape
        )
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """``hidden @ weight.T`` that keeps the codes for the backward pass, and no weight."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, codes: Tensor, scales: Tensor, scheme: str, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.kind = scheme, shape
        return F.linear(hidden, _decoded(codes, scales, scheme, shape, hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        scheme, shape = ctx.kind
        grad = grads[0]
        return grad @ _decoded(codes, scales, scheme, shape, grad.dtype), None, None, None, None


def _decoded(
    codes: Tensor, scales: Tensor, scheme: str, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    return SCHEMES[scheme].decode(codes, scales, shape).to(dtype)


def quantize_linears(model: nn.Module, scheme: str) -> dict[str, QuantizedLinear]:
    """Quantize every linear layer of ``model`` but the output projection, in place.

    Args:
        model: what is quantized.
        scheme: a name in ``SCHEMES``.

    Returns:
        The quantized layers by name.

    Raises:
        InputError: there is no such scheme.
    """
    layers = {
        name: QuantizedLinear(module, scheme)
        for name, module in inner_linears(model).items()
        if isinstance(module, nn.Linear)
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | QuantizedLinear]:
    """Tell whether a module is a linear layer, quantized or not."""
    return isinstance(module, nn.Linear | QuantizedLinear)


def inner_linears(model: nn.Module) -> dict[str, nn.Linear | QuantizedLinear]:
    """Return the linear layers of ``model`` by name, without the output projection of a policy."""
    head = head_weight(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and not holds(module, head)
    }


def head_weight(model: nn.Module) -> Tensor | None:
    """Return the weight of a policy's output projection; None if ``model`` is no policy."""
    return model.output_head().weight if isinstance(model, Policy) else None


def holds(module: nn.Module, weight: Tensor | None) -> bool:
    """Tell whether ``weight`` is the very weight of a linear layer."""
    return isinstance(module, nn.Linear) and module.weight is weight
