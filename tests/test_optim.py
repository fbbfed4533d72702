"""Oracles: torch's own AdamW and norms, transformers' schedules."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import optimization

from dpo.optim import (
    OPTIMIZERS,
    SCHEDULES,
    clip_gradients,
    make_optimizer,
    make_schedule,
    parameter_groups,
    set_learning_rate,
)
from dpo.optim.schedules import warmup_stable_decay
from dpo.optim.torchs import adamw
from dpo.train_config import Optimizer

steps = st.tuples(
    st.integers(min_value=0, max_value=50), st.integers(min_value=1, max_value=200)
)  # warm-up and the updates after it


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def parameters_with_gradients(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in (3, (4, 5))]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return parameters


def factors(name: str, warmup: int, total: int) -> list[float]:
    return [SCHEDULES[name](step, warmup, total) for step in range(total + 1)]


def transformers_factors(schedule: object, total: int) -> list[float]:
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    return [schedule.lr_lambdas[0](step) for step in range(total + 1)]


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


class TestParameterGroups:
    def test_matrices_and_embeddings_decay_and_biases_and_gains_do_not(self) -> None:
        model = TiedModel()
        decayed, exempt = parameter_groups(model, 0.1)
        assert decayed["params"] == [model.embedding.weight, model.hidden.weight]
        assert decayed["weight_decay"] == 0.1
        assert exempt["params"] == [model.norm.weight, model.norm.bias, model.hidden.bias]
        assert exempt["weight_decay"] == 0.0

    def test_frozen_parameters_are_left_out(self) -> None:
        model = TiedModel()
        model.embedding.weight.requires_grad_(False)
        model.norm.requires_grad_(False)
        model.hidden.bias.requires_grad_(False)
        (only,) = parameter_groups(model, 0.1)
        assert only["params"] == [model.hidden.weight]


class TestAdamW:
    def test_update_equals_the_formulas_of_adamw(self, generator: torch.Generator) -> None:
        """p -= lr (decay p + m_hat / (sqrt(v_hat) + eps)), with bias-corrected moments."""
        rate, decay, beta1, beta2, epsilon = 0.01, 0.1, 0.8, 0.95, 1e-6
        parameter = nn.Parameter(torch.randn(4, 5, dtype=torch.float64, generator=generator))
        expected = parameter.detach().clone()
        groups = [{"params": [parameter], "weight_decay": decay}]
        optimizer = adamw(groups, learning_rate=rate, beta1=beta1, beta2=beta2, epsilon=epsilon)
        mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
        for step in range(1, 6):
            gradient = torch.randn(4, 5, dtype=torch.float64, generator=generator)
            parameter.grad = gradient.clone()
            optimizer.step()
            mean = beta1 * mean + (1 - beta1) * gradient
            square = beta2 * square + (1 - beta2) * gradient.square()
            denominator = (square / (1 - beta2**step)).sqrt() + epsilon
            expected *= 1 - rate * decay
            expected -= rate * mean / (1 - beta1**step) / denominator
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)

    def test_defaults_are_torchs_except_for_the_decay_of_the_groups(self) -> None:
        ours = adamw(parameter_groups(TiedModel(), 0.0), learning_rate=1e-3)
        torchs = torch.optim.AdamW(TiedModel().parameters(), lr=1e-3, weight_decay=0.0)
        ignored = {"params", "fused"}
        for group in ours.param_groups:
            theirs = torchs.param_groups[0]
            assert {k: v for k, v in group.items() if k not in ignored} == {
                k: v for k, v in theirs.items() if k not in ignored
            }

    def test_learning_rate_is_set_in_every_group(self) -> None:
        optimizer = adamw(parameter_groups(TiedModel(), 0.1), learning_rate=1e-3)
        set_learning_rate(optimizer, 2e-4)
        assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 2e-4]

    def test_is_fused_on_the_cpu(self) -> None:
        assert adamw(parameter_groups(TiedModel(), 0.0), learning_rate=1.0).defaults["fused"]

    def test_is_not_fused_on_a_device_without_the_kernel(self) -> None:
        groups = parameter_groups(TiedModel().to("meta"), 0.0)
        assert not adamw(groups, learning_rate=1.0).defaults["fused"]

    @pytest.mark.gpu
    def test_fused_on_cuda_equals_the_cpu(self, generator: torch.Generator) -> None:
        cpu = parameters_with_gradients(generator)
        cuda = [nn.Parameter(parameter.detach().cuda()) for parameter in cpu]
        for here, there in zip(cpu, cuda, strict=True):
            there.grad = here.grad.cuda() if here.grad is not None else None
        for parameters in (cpu, cuda):
            optimizer = adamw([{"params": parameters, "weight_decay": 0.1}], learning_rate=0.01)
            assert optimizer.defaults["fused"]
            optimizer.step()
        for here, there in zip(cpu, cuda, strict=True):
            torch.testing.assert_close(here, there.cpu())


class TestOtherOptimizers:
    def test_update_of_lion_equals_its_program(self, generator: torch.Generator) -> None:
        """p -= lr (sign(b1 m + (1 - b1) g) + decay p), m = b2 m + (1 - b2) g."""
        rate, decay, beta1, beta2 = 0.01, 0.1, 0.8, 0.95
        parameter = nn.Parameter(torch.randn(4, 5, dtype=torch.float64, generator=generator))
        expected = parameter.detach().clone()
        groups = [{"params": [parameter], "weight_decay": decay}]
        optimizer = make_optimizer(
            "lion", groups, learning_rate=rate, beta1=beta1, beta2=beta2, epsilon=None
        )
        momentum = torch.zeros_like(expected)
        for _ in range(5):
            gradient = torch.randn(4, 5, dtype=torch.float64, generator=generator)
            parameter.grad = gradient.clone()
            optimizer.step()
            direction = (beta1 * momentum + (1 - beta1) * gradient).sign()
            expected -= rate * (direction + decay * expected)
            momentum = beta2 * momentum + (1 - beta2) * gradient
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)

    def test_adafactor_is_torchs(self, generator: torch.Generator) -> None:
        parameters = parameters_with_gradients(generator)
        copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        for parameter, copy in zip(parameters, copies, strict=True):
            copy.grad = parameter.grad
        make_optimizer("adafactor", [{"params": parameters}], learning_rate=0.01).step()
        torch.optim.Adafactor(copies, lr=0.01).step()
        for parameter, copy in zip(parameters, copies, strict=True):
            assert torch.equal(parameter, copy)

    @pytest.mark.parametrize(("name", "most"), [("adamw", 2.1), ("lion", 1.0), ("adafactor", 0.5)])
    def test_states_are_as_large_as_promised(self, name: str, most: float) -> None:
        parameter = nn.Parameter(torch.ones(64, 64))
        optimizer = make_optimizer(
            name, [{"params": [parameter]}], learning_rate=0.1,
            **({} if name == "adafactor" else {"beta1": 0.9, "beta2": 0.99}),
        )  # fmt: skip
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kept = sum(value.numel() for value in optimizer.state[parameter].values())
        assert kept <= most * parameter.numel()

    def test_every_name_of_the_config_is_there(self) -> None:
        assert tuple(OPTIMIZERS) == get_args(Optimizer)


class TestClipGradients:
    @given(max_norm=st.floats(min_value=1e-3, max_value=1e3), seed=st.integers(0, 100))
    @settings(max_examples=30, deadline=None)
    def test_equals_torchs_clip_grad_norm(self, max_norm: float, seed: int) -> None:
        ours = parameters_with_gradients(torch.Generator().manual_seed(seed))
        theirs = parameters_with_gradients(torch.Generator().manual_seed(seed))
        norm = clip_gradients(ours, max_norm)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our.grad, their.grad)

    def test_without_a_bound_only_measures(self) -> None:
        """sqrt(3^2 + 4^2) = 5."""
        parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
        assert clip_gradients(parameters, None).item() == 5.0
        assert [p.grad for p in parameters] == [torch.tensor([3.0]), torch.tensor([4.0])]

    def test_norm_of_bfloat16_gradients_is_float32(self, generator: torch.Generator) -> None:
        parameters = parameters_with_gradients(generator, torch.bfloat16)
        gradients = [p.grad.flatten().double() for p in parameters if p.grad is not None]
        norm = clip_gradients(parameters, None)
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), torch.cat(gradients).norm(), rtol=1e-6, atol=0)

    def test_norm_that_is_not_finite_is_returned(self, generator: torch.Generator) -> None:
        parameters = parameters_with_gradients(generator)
        assert isinstance(parameters[1].grad, Tensor)
        parameters[1].grad[0, 0] = math.inf
        assert clip_gradients(parameters, 1.0).item() == math.inf

    def test_nothing_to_clip_has_norm_zero(self) -> None:
        assert clip_gradients([nn.Parameter(torch.ones(2))], 1.0).item() == 0.0

    def test_never_waits_for_the_device(self) -> None:
        """Meta tensors have no values: reading one raises."""
        parameter = nn.Parameter(torch.zeros(3, device="meta"))
        parameter.grad = torch.zeros(3, device="meta")
        assert clip_gradients([parameter], 1.0).is_meta


class TestSchedules:
    @given(steps=steps)
    def test_linear_equals_transformers(self, steps: tuple[int, int]) -> None:
        warmup, total = steps[0], sum(steps)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = optimization.get_linear_schedule_with_warmup(optimizer, warmup, total)
        assert factors("linear", warmup, total) == pytest.approx(
            transformers_factors(schedule, total), abs=1e-12
        )

    @given(steps=steps)
    def test_cosine_equals_transformers(self, steps: tuple[int, int]) -> None:
        warmup, total = steps[0], sum(steps)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = optimization.get_cosine_schedule_with_warmup(optimizer, warmup, total)
        assert factors("cosine", warmup, total) == pytest.approx(
            transformers_factors(schedule, total), abs=1e-12
        )

    @given(steps=steps)
    def test_constant_equals_transformers(self, steps: tuple[int, int]) -> None:
        warmup, total = steps[0], sum(steps)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = optimization.get_constant_schedule_with_warmup(optimizer, warmup)
        assert factors("constant", warmup, total) == pytest.approx(
            transformers_factors(schedule, total), abs=1e-12
        )

    def test_wsd_equals_transformers(self, optimizer: torch.optim.Optimizer) -> None:
        schedule = optimization.get_wsd_schedule(optimizer, 10, 20, 100, decay_type="linear")
        assert factors("wsd", 10, 100) == pytest.approx(
            transformers_factors(schedule, 100), abs=1e-12
        )

    def test_share_that_wsd_decays_over_can_be_chosen(self) -> None:
        schedule = make_schedule("wsd", decay_share=0.4)
        factors = [schedule(step, 0, 5) for step in range(6)]
        assert factors == pytest.approx([1, 1, 1, 1, 0.5, 0])
        assert make_schedule("wsd") is SCHEDULES["wsd"]

    def test_decay_of_wsd_begins_after_the_warm_up(self) -> None:
        """A decay over all 10 updates would begin at 0; the warm-up takes the first 5."""
        factors = [warmup_stable_decay(step, 5, 10, decay_share=1.0) for step in range(11)]
        assert factors == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2, 0])

    @pytest.mark.parametrize("name", SCHEDULES)
    @given(steps=steps)
    def test_factor_rises_to_one_and_stays_within_bounds(
        self, name: str, steps: tuple[int, int]
    ) -> None:
        warmup, total = steps[0], sum(steps)
        values = factors(name, warmup, total)
        assert values[warmup] == 1.0
        assert values[: warmup + 1] == sorted(values[: warmup + 1])
        assert values[warmup:] == sorted(values[warmup:], reverse=True)
        assert all(0 <= value <= 1 for value in values)

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_steps_past_the_end_stay_at_the_last_factor(self, name: str) -> None:
        schedule = SCHEDULES[name]
        assert schedule(1000, 5, 100) == schedule(100, 5, 100)

    def test_constant_without_warm_up_is_always_one(self) -> None:
        assert factors("constant", 0, 20) == [1.0] * 21
