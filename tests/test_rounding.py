"""Stochastic rounding: right on average, the same again, and enough to train bfloat16 weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo.config import RunConfig
from dpo.errors import InputError
from dpo.memory_tracker import GRADIENTS, OPTIMIZER, WEIGHTS
from dpo.models import Decoder
from dpo.optim import ELEMENTWISE, StochasticRounding, make_optimizer
from dpo.optim.rounding import round_stochastically
from dpo.rehearsal import Rows, rehearse_step
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    "lion": {"beta1": 0.9, "beta2": 0.99},
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("value", [1.0017, -1.0017, 3e-5, 1e30])
def test_each_number_becomes_a_neighbour_and_their_mean_is_right(value: float) -> None:
    values = torch.full((200_000,), value)
    found = round_stochastically(values, torch.bfloat16, generator())
    below, above = sorted(set(found.float().tolist()))
    assert below < values[0] < above
    assert torch.nextafter(torch.tensor(below).bfloat16(), torch.tensor(9e37).bfloat16()) == above
    # the standard error of the mean is at most half a gap / sqrt(200,000); five of them
    error = abs(found.double().mean().item() - values[0].item())
    assert error < 5 * 0.5 * (above - below) / 200_000**0.5


def test_numbers_that_bfloat16_has_stay() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-120, float("inf")])
    for seed in range(20):
        found = round_stochastically(
            values, torch.bfloat16, torch.Generator().manual_seed(seed)
        ).float()
        assert torch.equal(found, values)


def test_wider_numbers_are_not_rounded() -> None:
    values = torch.tensor([1.0017])
    assert torch.equal(round_stochastically(values, torch.float32, generator()), values)


def train(name: str, weight: Tensor, steps: int, *, seed: int | None, **options: Any) -> Tensor:
    """Take steps along gradients that are the same in each."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = make_optimizer(
        name,
        [{"params": [parameter]}],
        rounding=None if seed is None else StochasticRounding(seed),
        **{"learning_rate": 1e-6, **OPTIONS[name], **options},
    )
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_weights_move_on_average_where_the_nearest_leaves_them(name: str) -> None:
    """At DPO's learning rate, a thousandth of the gap between neighbours: 40 steps of 1e-6."""
    start = torch.full((100_000,), 0.04, dtype=torch.bfloat16)
    assert torch.equal(train(name, start, 40, seed=None), start)
    moved = (train(name, start, 40, seed=0).double() - start.double()).mean().item()
    assert moved == pytest.approx(-40e-6, rel=0.1)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_result_follows_from_the_seed(name: str) -> None:
    start = torch.full((1000,), 0.04, dtype=torch.bfloat16)
    one, again, other = (train(name, start, 9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_no_two_parameters_or_steps_have_the_same_draws() -> None:
    weights = [torch.nn.Parameter(torch.full((4096,), 0.04).bfloat16()) for _ in range(2)]
    optimizer = make_optimizer(
        "lion", [{"params": weights}], learning_rate=1e-5, rounding=StochasticRounding(0),
        **OPTIONS["lion"],
    )  # fmt: skip
    moved = []
    for _ in range(2):
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved += [weight != was for weight, was in zip(weights, before, strict=True)]
    assert all(not torch.equal(moved[0], each) for each in moved[1:])


@pytest.mark.parametrize("chunk", [7, 2**20])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_update_is_that_of_the_usual_optimizer(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of numbers that need no rounding; of the other weight the states are compared on average."""
    monkeypatch.setattr("dpo.optim.rounding.CHUNK", chunk)
    usual, rounded = ([torch.nn.Parameter(torch.randn(5, 4, generator=generator()))] for _ in "ab")
    narrow = torch.nn.Parameter(torch.ones(1).bfloat16())
    options = {"learning_rate": 1e-2, **OPTIONS[name]}
    groups: list[list[dict[str, Any]]] = [
        [{"params": weights, "weight_decay": 0.1}] for weights in (usual, [*rounded, narrow])
    ]
    optimizers = [
        make_optimizer(name, groups[0], **options),
        make_optimizer(name, groups[1], rounding=StochasticRounding(0), **options),
    ]
    draws = generator()
    for _ in range(5):
        gradient = torch.randn(5, 4, generator=draws)
        for weight, optimizer in zip((*usual, *rounded), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(rounded[0], usual[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_resumed_run_equals_unbroken_run_bit_for_bit(
    make_model: MakeModel, make_pairs: MakePairs, name: Any
) -> None:
    config = TrainConfig(
        batch_size=4, steps=4, learning_rate=1e-3, optimizer=name, dtype="bfloat16",
        stochastic_rounding=True,
    )  # fmt: skip
    whole, first, second = (
        Trainer(make_model(dtype=torch.bfloat16), make_pairs(), config) for _ in range(3)
    )
    whole.train()
    for step in first:
        if step.number == 2:
            break
    second.restore(first.tensors(), first.state())
    second.train()
    for found, expected in zip(second.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"train\.stochastic_rounding is for train\.dtype = bfloat16, which is float32"),
        (
            {"dtype": "bfloat16", "optimizer": "muon"},
            r"train\.stochastic_rounding is for train\.optimizer = adamw or lion, which is muon",
        ),
        (
            {"dtype": "bfloat16", "parallel": "shard"},
            r"train\.stochastic_rounding is for train\.parallel = data, which is shard",
        ),
        (
            {"dtype": "bfloat16", "tensor_ranks": 2},
            r"train\.stochastic_rounding is for train\.tensor_ranks = 1, which is 2",
        ),
    ],
)
def test_it_is_refused_where_it_would_be_ignored(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(stochastic_rounding=True, **options)


def test_weights_of_another_dtype_are_refused() -> None:
    with pytest.raises(InputError, match=r"no weight that is trained is bfloat16"):
        train("lion", torch.ones(2), 1, seed=0)


@pytest.mark.parametrize(("name", "states"), [("adamw", 2), ("lion", 1)])
def test_planner_knows_that_all_of_it_is_of_two_bytes(
    make_model: MakeModel, make_pairs: MakePairs, name: Any, states: int
) -> None:
    model = make_model()
    train = TrainConfig(optimizer=name, dtype="bfloat16", stochastic_rounding=True)
    config = RunConfig(model="M", data="D", out="O", train=train)
    found = rehearse_step(config, model.config, Rows(make_pairs(2), range(2), is_alone=False))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    steps = 4 * len([*model.parameters()])
    assert found["update"][WEIGHTS] == found["update"][GRADIENTS] == 2 * numbers
    assert found["update"][OPTIMIZER] == 2 * states * numbers + steps
