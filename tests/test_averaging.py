"""The average of the weights, by its definition, and what stands in the model when."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo.averaging import averaged_weights, keep_moving_average
from dpo.optim import OPTIMIZERS, make_optimizer, parameter_groups
from dpo.train_config import TrainConfig


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {"optimizer": name, "schedule": "constant"}
    config = TrainConfig(**arguments)
    options = {key: getattr(config, key) for key in ("beta1", "beta2", "epsilon", "momentum")}
    return make_optimizer(name, parameter_groups(model, 0.0), learning_rate=0.1, **options)


def step(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int) -> list[Tensor]:
    """Do a step with random gradients and return the weights after it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


AVERAGING = [name for name in OPTIMIZERS if name != "schedule-free"]


@pytest.mark.parametrize("name", AVERAGING)
def test_moving_average_equals_its_definition_whatever_the_optimizer(name: str) -> None:
    """a_1 = w_1, then a_t = 0.75 a_(t-1) + 0.25 w_t."""
    model = nn.Linear(4, 3)
    optimizer = make(name, model)
    keep_moving_average(optimizer, 0.75)
    expected = step(optimizer, model, 0)
    for seed in range(1, 5):
        weights = step(optimizer, model, seed)
        expected = [0.75 * a + 0.25 * w for a, w in zip(expected, weights, strict=True)]
    with averaged_weights(optimizer):
        for parameter, average in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", AVERAGING)
def test_keeping_an_average_leaves_training_as_it_is(name: str) -> None:
    plain, averaging = nn.Linear(4, 3), nn.Linear(4, 3)
    averaging.load_state_dict(plain.state_dict())
    first, second = make(name, plain), make(name, averaging)
    keep_moving_average(second, 0.9)
    for seed in range(3):
        weights, others = step(first, plain, seed), step(second, averaging, seed)
        assert all(map(torch.equal, weights, others))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_back_bit_for_bit_after_the_block(name: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = make(name, model)
    if name in AVERAGING:
        keep_moving_average(optimizer, 0.9)
    step(optimizer, model, 0)
    weights = step(optimizer, model, 1)
    with averaged_weights(optimizer):
        assert not any(map(torch.equal, model.parameters(), weights))
    assert all(map(torch.equal, model.parameters(), weights))
    with pytest.raises(KeyError), averaged_weights(optimizer):
        raise KeyError
    assert all(map(torch.equal, model.parameters(), weights))


def test_without_an_average_the_weights_stay() -> None:
    model = nn.Linear(4, 3)
    optimizer = make("adamw", model)
    weights = step(optimizer, model, 0)
    with averaged_weights(optimizer):
        assert all(map(torch.equal, model.parameters(), weights))


@pytest.mark.parametrize("name", ["adamw", "schedule-free"])
def test_before_the_first_step_the_weights_are_their_average(name: str) -> None:
    model = nn.Linear(4, 3)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make(name, model)
    with averaged_weights(optimizer):
        assert all(map(torch.equal, model.parameters(), weights))


def test_average_of_bfloat16_weights_is_float32_and_shown_as_bfloat16() -> None:
    model = nn.Linear(4, 3).bfloat16()
    optimizer = make("adamw", model)
    keep_moving_average(optimizer, 0.999)
    step(optimizer, model, 0)
    step(optimizer, model, 1)
    average = optimizer.state[model.weight]["moving_average"]
    assert average.dtype == torch.float32
    assert not torch.equal(average, average.bfloat16().float())
    with averaged_weights(optimizer):
        assert torch.equal(model.weight, average.bfloat16())
