"""The steps that are timed are the engine's own mathematics."""

from collections.abc import Callable

import pytest

from dpo.bench.peers.record_trl_losses import PAIRS, make_model
from dpo.bench.step import FileOrder, make_trainer, measure, parse
from dpo.models import Decoder
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

ModelMaker = Callable[..., Decoder]
PairMaker = Callable[..., TokenizedPairs]


def test_rows_come_in_the_order_of_the_file() -> None:
    order = FileOrder(pairs=5, batch_size=2, seed=0)
    assert [order.rows(step) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def losses(trainer: Trainer) -> list[float]:
    return [step.metrics["loss"] for step in trainer if step.metrics is not None]


def test_live_reference_gives_the_losses_of_a_cached_one(
    make_model: ModelMaker, make_pairs: PairMaker
) -> None:
    config = TrainConfig(
        batch_size=4, steps=4, learning_rate=1e-2, schedule="constant", max_grad_norm=None
    )
    cached, live = (
        losses(make_trainer(make_model(), make_pairs(), config, live_reference=is_live))
        for is_live in (False, True)
    )
    assert live == pytest.approx(cached, abs=1e-5)
    assert len(set(live)) == 4


@pytest.mark.parametrize("flags", [[], ["--no-prefix-sharing"], ["--live-reference"]])
def test_measure_says_what_was_done(
    tmp_path_factory: pytest.TempPathFactory, flags: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    words = ["--model", str(folder), "--data", str(PAIRS), "--steps", "2", "--batch-size", "12"]
    result = measure(parse([*words, "--threads", "1", *flags]))
    assert result["pairs"] == [12, 4]
    assert len(result["losses"]) == len(result["step_seconds"]) == 2
    assert result["losses"][0] == pytest.approx(0.693147, abs=1e-5)
    assert (result["reference_seconds"] is None) == (flags == ["--live-reference"])
