"""Parts of the decoder with a backward pass of their own: what they equal and what they keep."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.models import init_model, parse_config
from dpo.models.activations import ACTIVATIONS
from dpo.models.gating import gated
from dpo.models.norms import rms_norm
from dpo.models.rope import Rope, rotation
from dpo.models.transforms import RECOMPUTED, recompute
from dpo.segments import Segments, TokenStream, plan_attention
from dpo.train_config import Recompute

BytesKept = Callable[..., int]

ROPES = {
    "halves": Rope(theta=100.0, size=8),
    "part of a head": Rope(theta=100.0, size=4),
    "neighbours": Rope(theta=100.0, size=8, pairs_neighbours=True),
}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def results(output: Tensor, leaves: Iterable[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of some function of it."""
    slopes = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, list(leaves), slopes)]


@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8)])
@pytest.mark.parametrize("epsilon", [1e-5, None])
def test_norm_equals_torchs_with_gradients(shape: tuple[int, ...], epsilon: float | None) -> None:
    leaves = random(*shape), random(8, seed=1)
    found = results(rms_norm(*leaves, epsilon), leaves)
    expected = results(F.rms_norm(leaves[0], (8,), leaves[1], epsilon), leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gain_dtype", [torch.bfloat16, torch.float32])
def test_norm_of_narrow_numbers_is_computed_in_wide_ones(gain_dtype: torch.dtype) -> None:
    x, gain = random(64, 8, dtype=torch.bfloat16), random(8, dtype=gain_dtype, seed=1)
    found = results(rms_norm(x, gain, 1e-5), (x, gain))
    exact = (x.detach().double().requires_grad_(), gain.detach().double().requires_grad_())
    expected = results(rms_norm(*exact, 1e-5), exact)
    assert [tensor.dtype for tensor in found] == [gain_dtype, torch.bfloat16, gain_dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2**-7, atol=2**-7)


def test_frozen_gain_has_no_gradient_and_its_norm_has() -> None:
    x, gain = random(5, 8), random(8, seed=1).detach()
    rms_norm(x, gain, 1e-5).sum().backward()
    assert x.grad is not None


def test_norm_keeps_its_input_and_one_number_for_each_norm(bytes_kept: BytesKept) -> None:
    x, gain = random(64, 8, dtype=torch.float32), random(8, dtype=torch.float32)
    assert bytes_kept(lambda: rms_norm(x, gain, 1e-5), beside=(x, gain)) == 64 * 4


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_product_equals_the_plain_one_with_gradients(name: str) -> None:
    leaves = random(5, 8), random(5, 8, seed=1)
    found = results(gated(*leaves, ACTIVATIONS[name]), leaves)
    expected = results(ACTIVATIONS[name](leaves[0]) * leaves[1], leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_product_keeps_its_factors_alone(bytes_kept: BytesKept, name: str) -> None:
    leaves = random(5, 8), random(5, 8, seed=1)
    assert bytes_kept(lambda: gated(*leaves, ACTIVATIONS[name]), beside=leaves) == 0


@pytest.mark.parametrize("name", ROPES)
def test_rotation_is_a_product_of_complex_numbers_with_gradients(name: str) -> None:
    rope = ROPES[name]
    half = rope.size // 2
    heads = random(6, 2, 8)
    positions = torch.tensor([0, 1, 2, 7, 3, 50])
    pairs = heads[..., : rope.size]
    if rope.pairs_neighbours:
        real, imaginary = pairs[..., 0::2], pairs[..., 1::2]
    else:
        real, imaginary = pairs[..., :half], pairs[..., half:]
    angles = positions[:, None, None] / rope.theta ** (torch.arange(half) / half)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    parts = torch.stack([turned.real, turned.imag], dim=-1 if rope.pairs_neighbours else -2)
    expected = torch.cat([parts.flatten(-2), heads[..., rope.size :]], dim=-1)
    found = results(rotation(positions, rope).rotate(heads), [heads])
    torch.testing.assert_close(found, results(expected, [heads]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", [None, *RECOMPUTED])
def test_layer_keeps_what_its_products_read_and_nothing_twice(
    bytes_kept: BytesKept, part: Recompute | None
) -> None:
    inner, size, key_heads, heads, head = 96, 64, 2, 4, 16
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 11,
        "hidden_size": size,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 64,
    }
    tokens = 32
    stream = TokenStream(
        torch.zeros(tokens, dtype=torch.int64),
        torch.arange(tokens),
        plan_attention(Segments((tokens,), (None,))),
    )

    def bytes_of(layers: int) -> int:
        model = init_model(parse_config(config | {"num_hidden_layers": layers}), seed=0)
        if part is not None:
            recompute(model, part)

        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                hidden: Tensor = model(stream)
            return hidden

        weights = list(model.parameters())
        matrices = [
            (name, weight)
            for name, weight in model.model.layers.named_parameters()
            if weight.dim() == 2 and (part is None or RECOMPUTED[part] not in name)
        ]
        narrow_copies = 2 * sum(matrix.numel() for _, matrix in matrices)
        return bytes_kept(run, beside=weights) - narrow_copies

    bfloat16, float32 = 2, 4
    residuals = 2 * size * float32
    read = (2 * size + (heads + 2 * key_heads) * head + heads * head) * bfloat16
    in_mlp = 3 * inner * bfloat16
    scales = (2 + heads) * float32  # of two norms, and of each head's softmax
    kept = {
        None: residuals + read + in_mlp + scales,
        "mlp": residuals + read + scales,
        "layer": size * float32,
    }
    assert bytes_of(2) - bytes_of(1) == tokens * kept[part]
