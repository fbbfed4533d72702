"""The divergence of two models' predictions against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo.divergence import reference_kl
from dpo.log_probs import Predictions
from dpo.policy import OutputHead

K, D, V = 6, 5, 150
HEADS = {"plain": (1.0, None), "scaled": (0.25, None), "capped": (2.0, 3.0)}


def predictions(seed: int, size: int, head: str = "plain", *, has_bias: bool = True) -> Predictions:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bias = normal(V) if has_bias else None
    return Predictions(normal(K, size), OutputHead(normal(V, size), bias, *HEADS[head]))


def log_softmax(predicted: Predictions) -> Tensor:
    head = predicted.head
    logits = predicted.hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(dim=-1)


@given(
    st.integers(1, 4000),
    st.sampled_from(sorted(HEADS)),
    st.sampled_from(sorted(HEADS)),
    st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_divergence_is_the_definition_for_any_tile(
    tile_bytes: int, head: str, reference_head: str, has_bias: bool
) -> None:
    policy = predictions(0, D, head, has_bias=has_bias)
    reference = predictions(1, D + 2, reference_head)
    of_policy, of_reference = log_softmax(policy), log_softmax(reference)
    expected = (of_reference.exp() * (of_reference - of_policy)).sum(dim=1)
    found = reference_kl(policy, reference, tile_bytes=tile_bytes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_pass_gradcheck(head: str) -> None:
    policy, reference = predictions(0, D), predictions(1, D + 2)
    assert policy.head.bias is not None

    def divergence(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = Predictions(hidden, OutputHead(weight, bias, *HEADS[head]))
        return reference_kl(changed, reference, tile_bytes=64 * K * 8)

    leaves = (policy.hidden, policy.head.weight, policy.head.bias)
    assert torch.autograd.gradcheck(divergence, tuple(leaf.requires_grad_() for leaf in leaves))


def test_reference_gets_no_gradient() -> None:
    policy, reference = predictions(0, D), predictions(1, D)
    for leaf in (policy.hidden, reference.hidden, reference.head.weight):
        leaf.requires_grad_()
    reference_kl(policy, reference).sum().backward()
    assert policy.hidden.grad is not None
    assert reference.hidden.grad is None
    assert reference.head.weight.grad is None


def test_equal_models_do_not_diverge() -> None:
    assert reference_kl(predictions(0, D), predictions(0, D)).abs().max() < 1e-12
