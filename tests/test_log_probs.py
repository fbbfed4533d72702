import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo.log_probs import TokenLogProbs, token_log_probs
from dpo.policy import LowRank, OutputHead

K, D, V = 6, 5, 150


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(K, D, generator=generator, dtype=dtype)
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    bias = torch.randn(V, generator=generator, dtype=dtype)
    return hidden, weight, bias, torch.randint(V, (K,), generator=generator)


def naive(hidden: Tensor, head: OutputHead) -> Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(dim=-1)


HEADS = {"plain": (1.0, None), "scaled": (0.25, None), "capped": (2.0, 3.0)}


@pytest.mark.parametrize(("scale", "softcap"), HEADS.values(), ids=HEADS)
def test_gradients_pass_gradcheck(scale: float, softcap: float | None) -> None:
    hidden, weight, bias, targets = problem()

    def scored(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = OutputHead(weight, bias, scale, softcap)
        return token_log_probs(hidden, targets, head, tile_bytes=64 * K * 8).log_probs

    leaves = tuple(leaf.requires_grad_() for leaf in (hidden, weight, bias))
    assert torch.autograd.gradcheck(scored, leaves)


@pytest.mark.parametrize(("scale", "softcap"), HEADS.values(), ids=HEADS)
def test_gradients_of_an_update_pass_gradcheck(scale: float, softcap: float | None) -> None:
    hidden, weight, bias, targets = problem()
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(2, D, generator=generator, dtype=torch.float64)
    up = torch.randn(V, 2, generator=generator, dtype=torch.float64)

    def scored(hidden: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
        head = OutputHead(weight, bias, scale, softcap, LowRank(down, up, 0.5))
        return token_log_probs(hidden, targets, head, tile_bytes=64 * K * 8).log_probs

    leaves = tuple(leaf.requires_grad_() for leaf in (hidden, weight, bias, down, up))
    assert torch.autograd.gradcheck(scored, leaves)
    merged = OutputHead(weight + 0.5 * up @ down, bias, scale, softcap)
    expected = token_log_probs(hidden, targets, merged).log_probs
    torch.testing.assert_close(scored(*leaves), expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4000), st.sampled_from(sorted(HEADS)), st.booleans())
def test_log_probs_equal_the_definition_for_any_tile(
    tile_bytes: int, head_name: str, has_bias: bool
) -> None:
    hidden, weight, bias, targets = problem()
    head = OutputHead(weight, bias if has_bias else None, *HEADS[head_name])
    scored = token_log_probs(hidden, targets, head, tile_bytes=tile_bytes, with_square=True)
    log_softmax = naive(hidden, head)
    expected = TokenLogProbs(
        log_softmax[torch.arange(K), targets],
        -(log_softmax.exp() * log_softmax).sum(dim=1),
        log_softmax.argmax(dim=1) == targets,
    )
    torch.testing.assert_close(scored.log_probs, expected.log_probs, rtol=0, atol=1e-12)
    torch.testing.assert_close(scored.entropy, expected.entropy, rtol=0, atol=1e-12)
    assert torch.equal(scored.is_top, expected.is_top)
    assert scored.log_square is not None
    log_square = (2 * log_softmax).logsumexp(dim=1)
    torch.testing.assert_close(scored.log_square, log_square, rtol=0, atol=1e-12)


def test_bfloat16_products_keep_float32_sums() -> None:
    hidden, weight, _, targets = problem(torch.float32)
    exact = naive(hidden.bfloat16().double(), OutputHead(weight.bfloat16().double()))
    scored = token_log_probs(hidden.bfloat16(), targets, OutputHead(weight.bfloat16())).log_probs
    assert scored.dtype == torch.float32
    assert (scored - exact[torch.arange(K), targets]).abs().max() < 2e-3


def test_autocast_multiplies_in_its_dtype_and_gives_float32_gradients() -> None:
    hidden, weight, _, targets = problem(torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored = token_log_probs(hidden, targets, OutputHead(weight)).log_probs
    scored.sum().backward()
    narrow = naive(hidden.bfloat16().float(), OutputHead(weight.detach().bfloat16().float()))
    assert (scored - narrow[torch.arange(K), targets]).abs().max() < 2e-2
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_frozen_weight_gets_no_gradient_and_none_is_computed() -> None:
    hidden, weight, _, targets = problem()
    hidden.requires_grad_()
    token_log_probs(hidden, targets, OutputHead(weight)).log_probs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    hidden, targets = torch.randn(40, D), torch.zeros(40, dtype=torch.int64)
    weight = torch.randn(4000, D, requires_grad=True)
    with Largest() as largest:
        token_log_probs(
            hidden, targets, OutputHead(weight), tile_bytes=40 * 100 * 4
        ).log_probs.sum().backward()
    assert largest.numbers <= weight.numel()  # its gradient; all logits would be eight times that
