"""Linear layers held in codes: the error of a scheme, and that nothing else is lost or kept."""

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor, nn

from dpo.errors import InputError
from dpo.models import Decoder, load_model, save_model
from dpo.quantization import (
    NF4_CODES,
    SCHEMES,
    QuantizedLinear,
    Scheme,
    inner_linears,
    quantize_linears,
)

# root mean square of the error over that of normal weights, and bytes per weight
FIGURES = {
    "int8": (0.0075, 1 + 4 / 512),
    "nf4": (0.092, 0.5 + 4 / 64),
    "nf4-double": (0.092, 0.5 + (1 + 4 / 256) / 64),
}


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def linear(outputs: int, inputs: int, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(drawn(outputs, inputs))
    return layer


def test_nf4_codes_are_the_quantiles_of_the_paper() -> None:
    """Appendix E: 8 quantiles below zero, 7 above and zero itself, over the largest."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    codes = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    np.testing.assert_allclose(NF4_CODES, codes, rtol=0, atol=2e-6)


def test_every_scheme_has_its_figures() -> None:
    assert set(FIGURES) == set(SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_and_size_are_as_stated(scheme: str) -> None:
    error, size = FIGURES[scheme]
    layer = linear(256, 512)
    held, weight = QuantizedLinear(layer, scheme), layer.weight.detach()
    found = (held.weight - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert float(found) == pytest.approx(error, rel=0.02)
    assert (held.codes.nbytes + held.scales.nbytes) / (256 * 512) == pytest.approx(size)


def test_scales_of_nf4_double_are_255ths_of_the_largest_of_256() -> None:
    """Each differs from nf4's by half a step at most; the paper states 0.127 bits for them."""
    layer = linear(300, 64)  # 300 blocks: one whole row of 256 scales and a part of another
    exact = QuantizedLinear(layer, "nf4").scales.flatten()
    held = QuantizedLinear(layer, "nf4-double")
    steps = torch.stack([exact[:256].max(), exact[256:].max()]) / 255
    torch.testing.assert_close(held.scales.flatten(), steps)
    found = held.codes[300 * 32 :] * steps.repeat_interleave(256)[:300]
    assert bool(((found - exact).abs() <= 0.5001 * steps.repeat_interleave(256)[:300]).all())
    assert 8 * FIGURES["nf4-double"][1] - 4 == pytest.approx(0.127, abs=1e-4)


def test_quantized_scales_add_little_to_the_error_of_nf4() -> None:
    """Also where a few columns are twenty times as large as the others."""
    layer = linear(256, 512)
    with torch.no_grad():
        layer.weight[:, :4] *= 20
    errors = [
        float((QuantizedLinear(layer, scheme).weight - layer.weight).detach().square().mean())
        for scheme in ("nf4", "nf4-double")
    ]
    assert errors[0] < errors[1] < 1.02 * errors[0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 64), (5, 67)])
def test_what_was_quantized_is_quantized_without_error(scheme: str, size: tuple[int, int]) -> None:
    layer = linear(*size)
    with torch.no_grad():
        layer.weight[0] = 0  # a row, and perhaps a block, without a scale
    once = QuantizedLinear(layer, scheme)
    assert once.weight.shape == layer.weight.shape
    assert torch.equal(once.weight[0], torch.zeros(size[1]))
    again = linear(*size)
    again.weight = nn.Parameter(once.weight)
    torch.testing.assert_close(QuantizedLinear(again, scheme).weight, once.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_equals_the_linear_layer_of_its_weight(scheme: str, bias: bool) -> None:
    layer = QuantizedLinear(linear(6, 10, bias=bias).double(), scheme)
    hidden = drawn(2, 3, 10).double().requires_grad_()
    expected = F.linear(hidden, layer.weight, layer.bias)
    torch.testing.assert_close(layer(hidden), expected)
    grad = drawn(2, 3, 6).double()
    (found,) = torch.autograd.grad(layer(hidden), hidden, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, hidden, grad)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_computes_in_its_dtype(scheme: str) -> None:
    layer = QuantizedLinear(linear(6, 10), scheme)
    hidden = drawn(3, 10).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(hidden)
        expected = F.linear(hidden, layer.weight, layer.bias)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.05)
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_backward_keeps_codes_and_no_weight(scheme: str) -> None:
    layer = QuantizedLinear(linear(64, 64), scheme)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(drawn(2, 64).requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {
        layer.codes.data_ptr(),
        layer.scales.data_ptr(),
    }


@pytest.mark.parametrize("ties", [True, False])
def test_all_linear_layers_but_the_output_are_quantized(
    make_model: Callable[..., Decoder], ties: bool
) -> None:
    model = make_model(tie_word_embeddings=ties)
    layers = quantize_linears(model, "int8")
    assert len(layers) == 2 * 7
    assert dict(inner_linears(model)) == layers
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_while_read_equals_quantized_in_memory(
    make_model: Callable[..., Decoder], tmp_path: Path, scheme: str
) -> None:
    model = make_model(attention_bias=True)
    save_model(model, tmp_path, max_shard_bytes=5000)
    quantize_linears(model, scheme)
    read = load_model(tmp_path, quantize=scheme)
    assert read.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    narrow = load_model(tmp_path, quantize=scheme, dtype=torch.bfloat16)
    assert {layer.weight.dtype for layer in inner_linears(narrow).values()} == {torch.bfloat16}


def test_whole_weights_are_let_go_while_a_model_is_read(
    make_model: Callable[..., Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(make_model(dtype=torch.float64), tmp_path)
    alive: list[weakref.ref[Tensor]] = []

    def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
        if weight.device.type != "meta":
            assert [seen for seen in alive if seen() is not None] == []
            alive.append(weakref.ref(weight))
        return SCHEMES["int8"].encode(weight)

    monkeypatch.setitem(SCHEMES, "spy", Scheme(encode, SCHEMES["int8"].decode))
    load_model(tmp_path, quantize="spy")
    assert len(alive) == 2 * 7


def test_unknown_scheme_is_refused(make_model: Callable[..., Decoder]) -> None:
    with pytest.raises(
        InputError, match=r"quantize must be one of int8, nf4, nf4-double, got 'int4'"
    ):
        quantize_linears(make_model(), "int4")
