"""Oracles: torch's own AdamW and norms, transformers' schedules."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import optimization

import dpo.optim
from dpo.averaging import Averages
from dpo.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from dpo.errors import InputError
from dpo.models import Decoder
from dpo.optim import (
    OPTIMIZERS,
    SCHEDULES,
    clip_gradients,
    make_optimizer,
    make_schedule,
    parameter_groups,
    rate_scales,
    set_learning_rate,
    trained_names,
)
from dpo.optim.adamw8bit import dequantise, quantise
from dpo.optim.schedules import warmup_stable_decay
from dpo.optim.torchs import adamw
from dpo.train_config import Optimizer, TrainConfig

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
        embedding, exempt, hidden = parameter_groups(model, 0.1)
        assert embedding["params"] == [model.embedding.weight]
        assert hidden["params"] == [model.hidden.weight]
        assert exempt["params"] == [model.norm.weight, model.norm.bias, model.hidden.bias]
        decays = [group["weight_decay"] for group in (embedding, exempt, hidden)]
        assert decays == [0.1, 0.0, 0.1]

    def test_hidden_are_matrices_but_not_embeddings_and_output_head(
        self, make_model: Callable[..., Decoder]
    ) -> None:
        model = make_model(tie_word_embeddings=False)
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, 0.0)
        hidden = {names[p] for group in groups if group["is_hidden"] for p in group["params"]}
        others = {names[p] for group in groups if not group["is_hidden"] for p in group["params"]}
        assert {name.rsplit(".", 2)[1] for name in hidden} == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        }
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= others

    def test_rates_divide_groups_and_the_others_keep_theirs(self) -> None:
        model = TiedModel()
        scales = {"hidden.weight": 16.0, "hidden.bias": 16.0}
        optimizer = adamw(parameter_groups(model, 0.0, scales), learning_rate=1.0)
        set_learning_rate(optimizer, 1e-3)
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[model.hidden.weight] == rates[model.hidden.bias] == 16e-3
        assert {rates[p] for p in (model.embedding.weight, *model.norm.parameters())} == {1e-3}

    def test_frozen_parameters_are_left_out(self) -> None:
        model = TiedModel()
        model.embedding.weight.requires_grad_(False)
        model.norm.requires_grad_(False)
        model.hidden.bias.requires_grad_(False)
        (only,) = parameter_groups(model, 0.1)
        assert only["params"] == [model.hidden.weight]


class TestRateScales:
    def test_pattern_may_match_anywhere_and_the_first_that_does_counts(self) -> None:
        scales = rate_scales(trained_names(TiedModel()), {"^hidden": 0.5, r"\.bias$": 0.25})
        assert scales == {"hidden.weight": 0.5, "hidden.bias": 0.5, "norm.bias": 0.25}

    @pytest.mark.parametrize(
        "rates",
        [{"head": 0.5}, {"hidden": 0.5, "hidden.bias": 0.1}],
        ids=["the tied head", "all found before"],
    )
    def test_pattern_that_finds_nothing_is_refused(self, rates: dict[str, float]) -> None:
        *_, last = rates
        with pytest.raises(
            InputError,
            match=rf"train\.rates: '{last}' finds no trained parameter.*embedding\.weight, norm",
        ):
            rate_scales(trained_names(TiedModel()), rates)

    def test_pattern_that_finds_only_frozen_parameters_is_refused(self) -> None:
        model = TiedModel()
        model.norm.requires_grad_(False)
        with pytest.raises(InputError, match="'norm' finds no trained parameter"):
            rate_scales(trained_names(model), {"norm": 0.5})


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
        ignored = {"params", "fused", "lr_scale", "is_hidden"}
        for group in ours.param_groups:
            theirs = torchs.param_groups[0]
            assert {k: v for k, v in group.items() if k not in ignored} == {
                k: v for k, v in theirs.items() if k not in ignored
            }

    def test_learning_rate_is_set_in_every_group(self) -> None:
        optimizer = adamw(parameter_groups(TiedModel(), 0.1), learning_rate=1e-3)
        set_learning_rate(optimizer, 2e-4)
        assert {group["lr"] for group in optimizer.param_groups} == {2e-4}

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

    def test_muon_is_torchs_and_all_else_is_torchs_adamw(self) -> None:
        """In two pairs of optimizers on two copies of one model."""
        ours, theirs = TiedModel(), TiedModel()
        theirs.load_state_dict(ours.state_dict())
        optimizer = make("muon", parameter_groups(ours, 0.1), learning_rate=0.02, momentum=0.9)
        expected = [
            torch.optim.Muon(
                [theirs.hidden.weight], 0.02, 0.1, 0.9, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW([theirs.embedding.weight], lr=0.02, weight_decay=0.1, fused=True),
            torch.optim.AdamW(
                [*theirs.norm.parameters(), theirs.hidden.bias], 0.02, weight_decay=0.0, fused=True
            ),
        ]
        for seed in range(3):
            give_gradients(ours, seed)
            give_gradients(theirs, seed)
            optimizer.step()
            for part in expected:
                part.step()
        assert_equal(ours, theirs)

    @pytest.mark.parametrize("part", ["hidden", "norm"])
    def test_muon_trains_models_that_have_only_one_kind_of_parameter(self, part: str) -> None:
        model = TiedModel().get_submodule(part)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part == "norm" or name == "weight")
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = make("muon", parameter_groups(model, 0.0), learning_rate=0.1)
        give_gradients(model, 0)
        optimizer.step()
        pairs = zip(before, model.parameters(), strict=True)
        assert all((old != new).any() for old, new in pairs if new.requires_grad)


def make(name: str, groups: Sequence[Any], **changes: float) -> torch.optim.Optimizer:
    """Make an optimizer with the options of a run that gives none but ``changes``."""
    config = config_of(name, **changes)
    options = {key: getattr(config, key) for key in ("beta1", "beta2", "epsilon", "momentum")}
    return make_optimizer(name, groups, learning_rate=config.learning_rate, **options)


def config_of(name: str, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"optimizer": name, "schedule": "constant", **changes}
    return TrainConfig(**options)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    for (name, ours), theirs in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


BYTES = {  # of states for each float32 weight of a matrix, at most
    "adamw": 8.01, "adamw8bit": 2.05, "adafactor": 0.1, "lion": 4, "muon": 4, "schedule-free": 8.01,
}  # fmt: skip


class TestEveryOptimizer:
    def test_every_name_of_the_config_is_there(self) -> None:
        assert tuple(OPTIMIZERS) == get_args(Optimizer)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_page_for_users_has_a_line_with_its_options(self, name: str) -> None:
        page = Path(dpo.optim.__file__).parents[1] / "OPTIMIZERS.md"
        lines = page.read_text(encoding="utf-8").splitlines()
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        for option in ("beta1", "beta2", "epsilon", "momentum"):
            own = getattr(config_of(name), option) is not None
            assert own == (f"`{option}`" in line or ("as `adamw`" in line and option != "momentum"))

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_states_are_as_large_as_promised(self, name: str) -> None:
        model = nn.Linear(128, 128, bias=False)
        optimizer = make(name, parameter_groups(model, 0.0))
        give_gradients(model, 0)
        optimizer.step()
        states = optimizer.state[model.weight].values()
        assert sum(state.nbytes for state in states) <= BYTES[name] * model.weight.numel()

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_loss_falls_and_what_has_no_gradient_stays(self, name: str) -> None:
        """Towards the zero of a quadratic, in few steps of at most 0.02 from weights below 1/8."""
        trained, idle = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        before = idle.weight.detach().clone()
        groups = parameter_groups(nn.ModuleList([trained, idle]), 0.0)
        optimizer = make(name, groups, learning_rate=0.02)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = trained.weight.square().sum()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.9 * losses[0]
        assert torch.equal(idle.weight, before)
        assert idle.weight not in optimizer.state

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_state_goes_through_a_checkpoint_bit_for_bit(self, name: str, tmp_path: Path) -> None:
        models = [nn.Sequential(nn.Linear(96, 64), nn.LayerNorm(64)) for _ in range(2)]
        optimizers = [make(name, parameter_groups(m, 0.1), learning_rate=0.01) for m in models]
        for seed in range(3):
            give_gradients(models[0], seed)
            optimizers[0].step()
        saved = {"optimizer": optimizer_tensors(optimizers[0], models[0])}
        found = load_checkpoint(save_checkpoint(tmp_path, 3, saved, {})).tensors["optimizer"]
        models[1].load_state_dict(models[0].state_dict())
        restore_optimizer(optimizers[1], models[1], found)
        for model, optimizer in zip(models, optimizers, strict=True):
            set_learning_rate(optimizer, 0.02)
            give_gradients(model, 3)
            optimizer.step()
        assert_equal(*models)


byte_dtypes = pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])


class TestAdamW8bit:
    @byte_dtypes
    @given(
        values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300),
        offset=st.floats(0, 1, exclude_max=True, width=32),
    )
    @settings(max_examples=30, deadline=None)
    def test_error_is_within_its_bound(
        self, dtype: torch.dtype, values: list[float], offset: float
    ) -> None:
        """(n / N)^4 rises by less than 4 (n / N)^3 / N from the number n - 1 to n."""
        exact = torch.tensor(values, dtype=torch.float32)
        exact = exact if dtype.is_signed else exact.abs()
        numbers, scales = quantise(exact, dtype, offset=offset)
        found = dequantise(numbers, scales)[: len(exact)]
        blocks = [exact[i : i + 256].abs().max().expand(256) for i in range(0, len(exact), 256)]
        scale = torch.cat(blocks)[: len(exact)].double()
        levels = torch.iinfo(dtype).max
        larger = torch.maximum(exact.abs(), found.abs()).double()
        shares = larger / scale.clamp(min=1e-38)
        room = (4 * shares**0.75 / levels + 1e-5) * max(offset, 1 - offset) * scale
        assert ((found.double() - exact.double()).abs() <= room + 1e-37).all()
        assert ((found == 0) | (found.sign() == exact.sign())).all()
        assert (numbers.dtype, scales.dtype, len(numbers)) == (dtype, torch.float32, len(blocks))

    @byte_dtypes
    def test_numbers_that_a_byte_can_hold_are_exact(self, dtype: torch.dtype) -> None:
        """Zero and the greatest of a block, whatever the offset; all others by the nearest."""
        numbers = torch.arange(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1).clamp(min=-127)
        values = dequantise(numbers.to(dtype).view(1, -1), torch.tensor([0.125]))
        assert torch.equal(quantise(values, dtype)[0].flatten(), numbers.to(dtype))
        for offset in (0.0, 1 - 2.0**-24):
            again = dequantise(*quantise(torch.tensor([0.0, 0.125]), dtype, offset=offset))
            assert again[:2].tolist() == [0.0, 0.125]

    def test_trajectory_stays_near_that_of_adamw(self, generator: torch.Generator) -> None:
        """Within a thirtieth of the way; 0.019 was measured, and more without the offset."""
        start = torch.randn(96, 64, generator=generator) / 8
        scales = torch.logspace(0, -3, 96)[:, None]  # of the gradients, row by row
        ends = []
        for name in ("adamw", "adamw8bit"):
            parameter = nn.Parameter(start.clone())
            optimizer = make(name, [{"params": [parameter], "weight_decay": 0.1}],
                             learning_rate=1e-3)  # fmt: skip
            noise = torch.Generator().manual_seed(1)
            for _ in range(100):
                gradient = parameter.detach() + torch.randn(96, 64, generator=noise)
                parameter.grad = gradient * scales
                optimizer.step()
            ends.append(parameter.detach())
        way, apart = (ends[0] - start).norm(), (ends[1] - ends[0]).norm()
        assert apart < way / 30

    def test_rare_large_gradients_leave_no_endless_step(self, generator: torch.Generator) -> None:
        """Gradients of one block span six powers of ten; no step is 10 times the rate."""
        parameter = nn.Parameter(torch.zeros(4096))
        scales = 10 ** (6 * torch.rand(4096, generator=generator) - 6)
        optimizer = make("adamw8bit", [{"params": [parameter]}], learning_rate=1.0, epsilon=1e-30)
        longest = 0.0
        for _ in range(50):
            before = parameter.detach().clone()
            parameter.grad = torch.randn(4096, generator=generator) * scales
            optimizer.step()
            longest = max(longest, (parameter.detach() - before).abs().max().item())
        assert longest < 10

    def test_update_does_not_depend_on_the_chunks(
        self, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
    ) -> None:
        results = []
        start, gradient = (torch.randn(70, 71, generator=generator) for _ in range(2))
        for chunk in (512, 2**20):
            monkeypatch.setattr("dpo.optim.adamw8bit.CHUNK", chunk)
            parameter = nn.Parameter(start.clone())
            optimizer = make("adamw8bit", [{"params": [parameter]}], learning_rate=0.1)
            for _ in range(3):
                parameter.grad = gradient
                optimizer.step()
            results.append(parameter.detach())
        assert torch.equal(*results)

    @pytest.mark.parametrize("layout", ["small", "transposed"])
    def test_parameters_that_stay_float32_are_updated_as_by_adamw(
        self, layout: str, generator: torch.Generator
    ) -> None:
        start, gradient = (torch.randn(80, 70, generator=generator).T for _ in range(2))
        if layout == "small":
            start, gradient = start[:8].contiguous(), gradient[:8].contiguous()
        ends = []
        for name in ("adamw", "adamw8bit"):
            parameter = nn.Parameter(start.clone())
            optimizer = make(name, [{"params": [parameter], "weight_decay": 0.1}],
                             learning_rate=0.01)  # fmt: skip
            for _ in range(5):
                parameter.grad = gradient
                optimizer.step()
            ends.append(parameter.detach())
        assert parameter.is_contiguous() == (layout == "small")
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)

    def test_bfloat16_weights_are_updated(self) -> None:
        parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        parameter.grad = torch.ones_like(parameter)
        make("adamw8bit", [{"params": [parameter]}], learning_rate=0.5).step()
        assert torch.equal(parameter, torch.full_like(parameter, 0.5))


class TestScheduleFree:
    def test_update_equals_algorithm_1_of_the_paper(self, generator: torch.Generator) -> None:
        """The paper's x, y and z by name, with rates that warm up from 0."""
        decay, beta1, beta2, epsilon = 0.1, 0.8, 0.95, 1e-6
        parameter = nn.Parameter(torch.randn(4, 5, dtype=torch.float64, generator=generator))
        x = z = parameter.detach().clone()
        v, weight_sum = torch.zeros_like(x), 0.0
        optimizer = make("schedule-free", [{"params": [parameter], "weight_decay": decay}],
                         beta1=beta1, beta2=beta2, epsilon=epsilon)  # fmt: skip
        assert isinstance(optimizer, Averages)
        for step, rate in enumerate([0.0, 0.01, 0.02, 0.02, 0.02], start=1):
            gradient = torch.randn(4, 5, dtype=torch.float64, generator=generator)
            parameter.grad = gradient.clone()
            set_learning_rate(optimizer, rate)
            optimizer.step()

            y = (1 - beta1) * z + beta1 * x
            v = beta2 * v + (1 - beta2) * gradient.square()
            rate *= math.sqrt(1 - beta2**step)
            z = z - rate * gradient / (v.sqrt() + epsilon) - rate * decay * y
            weight_sum += rate**2
            share = rate**2 / weight_sum if weight_sum else 1.0
            x = (1 - share) * x + share * z

        ((_, average),) = optimizer.averages()
        torch.testing.assert_close(average, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            parameter.detach(), (1 - beta1) * z + beta1 * x, rtol=1e-12, atol=1e-12
        )

    def test_average_of_equal_rates_is_the_mean_of_the_bases(self) -> None:
        """beta2 = 0 makes each step the rate itself: bases 1, 2, 3 and 4 have the mean 2.5."""
        parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = make("schedule-free", [{"params": [parameter]}], learning_rate=1.0, beta2=0.0)
        assert isinstance(optimizer, Averages)
        for _ in range(4):
            parameter.grad = torch.full_like(parameter, -3.0)
            optimizer.step()
        ((_, average),) = optimizer.averages()
        assert average.item() == pytest.approx(2.5, abs=1e-6)


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
