"""The ratio of update to weights, and the means of steps."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo.health import StepMeans, WeightSample, relative_change
from dpo.losses import PairLogProbs
from dpo.models import Decoder
from dpo.optim import OPTIMIZERS
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

OPTIONS: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-2, "schedule": "constant"}
PLAIN = TrainConfig(**OPTIONS, steps=4, log_every=2)


def trained(model: nn.Module) -> Tensor:
    """All trained weights, one after another."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_update_ratio_is_that_of_the_last_step_whatever_the_optimizer(
    optimizer: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    model = make_model()
    model.model.embed_tokens.requires_grad_(False)
    config = TrainConfig(**OPTIONS, steps=4, log_every=2, optimizer=optimizer)  # type: ignore[arg-type]
    seen, lines = [], []
    for step in Trainer(model, make_pairs(), config):
        seen.append(trained(model))
        lines.append(step.metrics)
    ratios = [
        float((after - before).norm() / before.norm())
        for before, after in ((seen[0], seen[1]), (seen[2], seen[3]))
    ]
    assert lines[0] is lines[2] is None
    found = [line["health/update_ratio"] for line in lines if line is not None]
    assert found == pytest.approx(ratios, rel=1e-5)


def test_weights_that_do_not_move_have_a_ratio_of_zero(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    """Norms' gains of 1 in bfloat16 do not feel steps of 1e-6."""
    model = make_model(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    config = replace(PLAIN, steps=1, learning_rate=1e-6, dtype="bfloat16")
    (step,) = Trainer(model, make_pairs(), config)
    assert step.metrics is not None
    assert step.metrics["grad_norm"] > 0
    assert step.metrics["health/update_ratio"] == 0


def test_skipped_step_has_no_update_ratio(make_model: MakeModel, make_pairs: MakePairs) -> None:
    def poisoned(pairs: PairLogProbs) -> Tensor:
        return pairs.chosen * math.nan

    config = replace(PLAIN, steps=1, on_nonfinite="skip")
    trainer = Trainer(make_model(), make_pairs(), config, loss=poisoned, starts_at_reference=False)
    (step,) = trainer
    assert step.metrics is not None
    assert "health/update_ratio" not in step.metrics


def test_weights_are_looked_at_on_steps_that_log_alone(
    make_model: MakeModel, make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, reads, read = Trainer(make_model(), make_pairs(), PLAIN), [], WeightSample.read

    def counted(sample: WeightSample) -> Tensor:
        reads.append(trainer.step + 1)
        return read(sample)

    monkeypatch.setattr(WeightSample, "read", counted)
    trainer.train()
    assert reads == [2, 2, 4, 4]


def test_sample_of_many_weights_has_their_ratio() -> None:
    """Columns of very different sizes, as in real models; 1 of 100 weights is looked at."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 0, 600)
    weight = nn.Parameter(torch.randn(2000, 600, generator=generator) * sizes)
    sample = WeightSample([weight], most=12_000)
    before, all_before = sample.read(), weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn(2000, 600, generator=generator).sign() * sizes.sqrt(), alpha=1e-3)
    expected = relative_change(all_before, weight.detach())
    assert len(before) <= 12_000
    assert float(relative_change(before, sample.read())) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("most", [7, 40, 50, 300])
def test_sample_looks_at_every_column(most: int) -> None:
    weight = nn.Parameter(torch.arange(60).repeat(60, 1).float())
    columns = set(WeightSample([weight], most=most * 60).read().tolist())
    assert len(columns) == 60


def test_sample_passes_over_weights_that_are_frozen_or_do_not_lie_in_one_piece() -> None:
    whole, frozen, turned = (nn.Parameter(torch.full((2, 3), float(n))) for n in range(3))
    frozen.requires_grad_(False)
    sample = WeightSample([whole, frozen, nn.Parameter(turned.detach().T)])
    assert sample.read().tolist() == [0.0] * 6


def test_means_are_over_the_steps_that_have_a_value_and_are_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    means, reads, tolist = StepMeans(), [], Tensor.tolist
    for value in (1.0, 2.0, 6.0):
        means.add("norm", torch.tensor(value))
    means.add("balance", torch.tensor(5.0, dtype=torch.float64))

    def counted(tensor: Tensor) -> object:
        reads.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    assert means.result() == {"norm": 3.0, "balance": 5.0}
    assert len(reads) == 1


def test_no_steps_have_no_means() -> None:
    assert StepMeans().result() == {}
