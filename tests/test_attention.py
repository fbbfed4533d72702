from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpo.attention import BACKENDS, PLAIN, AttentionOptions, attend, sdpa, varlen
from dpo.segments import Segments, plan_attention

FORESTS = {
    "one text": Segments((5,), (None,)),
    "a pair": Segments((4, 3, 2), (None, 0, 0)),
    "packed pairs": Segments((4, 3, 1, 6, 2, 5), (None, 0, None, 2, 0, 2)),
    "tree": Segments((3, 2, 2, 4, 1), (None, 0, 0, 0, 3)),
}

OPTIONS = {
    "plain": PLAIN,
    "window": AttentionOptions(window=3),
    "scale": AttentionOptions(scale=0.7),
    "softcap": AttentionOptions(softcap=0.5),
    "all": AttentionOptions(window=3, scale=1.9, softcap=1.5),
}


def heads(count: int, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, count, 8, generator=generator, dtype=dtype).requires_grad_()


def inputs(segments: Segments, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(segments.lengths)
    return heads(4, tokens, dtype, 0), heads(2, tokens, dtype, 1), heads(2, tokens, dtype, 2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("segments", FORESTS.values(), ids=FORESTS)
def test_sdpa_equals_the_reference_with_gradients(
    segments: Segments, options: AttentionOptions
) -> None:
    plan = plan_attention(segments)
    outputs, gradients = [], []
    for backend in (BACKENDS["reference"], sdpa):
        leaves = inputs(segments)
        output = backend(*leaves, plan, options)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        outputs.append(output)
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def test_token_of_one_pair_does_not_see_another() -> None:
    segments = FORESTS["packed pairs"]
    query, key, value = inputs(segments)
    before = attend(query, key, value, plan_attention(segments))
    with torch.no_grad():
        value[7:13] += 1.0  # prompt and chosen answer of the second pair
    after = attend(query, key, value, plan_attention(segments))
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:13], after[7:13])


def test_cpu_tensors_take_sdpa_in_every_dtype() -> None:
    segments = FORESTS["a pair"]
    plan = plan_attention(segments)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = inputs(segments, dtype)
        assert torch.equal(attend(*leaves, plan), sdpa(*leaves, plan))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("longest", [4, 512])
@pytest.mark.parametrize("segments", FORESTS.values(), ids=FORESTS)
def test_narrow_floats_on_a_cpu_equal_the_reference_in_short_runs_and_long(
    segments: Segments, longest: int, options: AttentionOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo.cpu_attention.SHORT_KEYS", longest)
    plan, narrow = plan_attention(segments), inputs(segments, torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in narrow]
    expected = BACKENDS["reference"](exact[0], exact[1], exact[2], plan, options)
    with torch.autocast("cpu", torch.bfloat16):
        found = sdpa(*narrow, plan, options)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2)
    slopes = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    gradients = torch.autograd.grad(found, narrow, slopes.bfloat16())
    for one, other in zip(gradients, torch.autograd.grad(expected, exact, slopes), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_cpu_keeps_a_number_for_each_token_and_head_beside_the_stream(
    bytes_kept: Callable[..., int], dtype: torch.dtype
) -> None:
    segments = FORESTS["packed pairs"]
    leaves, plan = inputs(segments, dtype), plan_attention(segments)
    found = bytes_kept(lambda: attend(*leaves, plan), beside=leaves)
    assert found == sum(segments.lengths) * 4 * 4  # four heads, float32


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "window", "scale"])
@pytest.mark.parametrize("segments", FORESTS.values(), ids=FORESTS)
def test_varlen_equals_the_reference_on_cuda(segments: Segments, name: str) -> None:
    plan = plan_attention(segments).to(torch.device("cuda"))
    leaves = [leaf.detach().cuda() for leaf in inputs(segments, torch.float32)]
    narrow = [leaf.bfloat16() for leaf in leaves]
    expected = BACKENDS["reference"](leaves[0], leaves[1], leaves[2], plan, OPTIONS[name])
    found = varlen(narrow[0], narrow[1], narrow[2], plan, OPTIONS[name])
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=3e-2)


def test_varlen_asks_the_kernel_for_what_sdpa_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the CUDA kernel with its documented meaning, run by run."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_bounds: Tensor,
        key_bounds: Tensor,
        longest_query: int,
        longest_key: int,
        *,
        window_size: tuple[int, int],
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        assert enable_gqa
        left, right = window_size
        assert right == 0
        outputs = []
        spans = zip(query_bounds.tolist(), query_bounds.tolist()[1:], strict=False)
        for (q0, q1), (k0, k1) in zip(
            spans, zip(key_bounds.tolist(), key_bounds.tolist()[1:], strict=False), strict=True
        ):
            assert q1 - q0 <= longest_query
            assert k1 - k0 <= longest_key
            length, keys = q1 - q0, k1 - k0
            mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
            if left >= 0:
                mask = mask.triu(keys - length - left)
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[None, q0:q1].transpose(1, 2),
                    key[None, k0:k1].transpose(1, 2),
                    value[None, k0:k1].transpose(1, 2),
                    attn_mask=mask,
                    scale=scale,
                    enable_gqa=True,
                )[0].transpose(0, 1)
            )
        return torch.cat(outputs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    for segments in FORESTS.values():
        for options in (PLAIN, AttentionOptions(window=3), AttentionOptions(scale=0.7)):
            plan, leaves = plan_attention(segments), inputs(segments)
            torch.testing.assert_close(varlen(*leaves, plan, options), sdpa(*leaves, plan, options))


def test_varlen_refuses_a_softcap_and_is_not_chosen_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, leaves = plan_attention(FORESTS["a pair"]), inputs(FORESTS["a pair"], torch.bfloat16)
    with pytest.raises(NotImplementedError, match="varlen_attn has no softcap"):
        varlen(*leaves, plan, OPTIONS["softcap"])
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert torch.equal(
        attend(*leaves, plan, OPTIONS["softcap"]), sdpa(*leaves, plan, OPTIONS["softcap"])
    )
