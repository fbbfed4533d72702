"""The alarm on sequences made by hand, in a trainer that goes on, and on the console."""

from collections.abc import Callable, Sequence

import pytest
from torch import Tensor

from dpo.displacement import NATS, WINDOWS, DisplacementAlarm
from dpo.losses import PairLogProbs
from dpo.models import Decoder
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

LOW = -NATS - 0.1


def alarms(displacements: Sequence[float], margins: Sequence[float]) -> list[bool]:
    alarm = DisplacementAlarm()
    return [
        alarm.hears({"displacement/chosen": displacement, "rewards/margin": margin})
        for displacement, margin in zip(displacements, margins, strict=True)
    ]


RISING = [float(window) for window in range(WINDOWS + 2)]


def test_rising_margin_over_displaced_answers_gives_the_alarm() -> None:
    expected = [False] * (WINDOWS - 1) + [True] * 3
    assert alarms([LOW] * len(RISING), RISING) == expected


def test_count_begins_again_after_a_window_above_the_bound() -> None:
    displacements = [LOW] * (WINDOWS - 1) + [-NATS] + [LOW] * 2
    assert not any(alarms(displacements, RISING))


@pytest.mark.parametrize("margin", [0.0, -1.0])
def test_margin_that_does_not_rise_gives_no_alarm(margin: float) -> None:
    margins = [margin * window for window in range(WINDOWS)]
    assert not any(alarms([LOW] * WINDOWS, margins))


def test_margin_is_compared_with_that_of_the_first_displaced_window() -> None:
    """Before it the margin was lower."""
    margins = [-5.0, *([1.0] * WINDOWS)]
    assert not any(alarms([0.0, *([LOW] * WINDOWS)], margins))


def displaced(
    make_model: Callable[..., Decoder], make_pairs: Callable[..., TokenizedPairs]
) -> Trainer:
    """A loss that asks for what the alarm is about."""

    def both_down(pairs: PairLogProbs) -> Tensor:
        return pairs.chosen + 3 * pairs.rejected

    config = TrainConfig(batch_size=8, steps=WINDOWS + 4, learning_rate=0.02, schedule="constant")
    return Trainer(make_model(), make_pairs(8), config, loss=both_down)


def test_resumed_run_gives_the_alarm_where_the_unbroken_one_does(
    make_model: Callable[..., Decoder], make_pairs: Callable[..., TokenizedPairs]
) -> None:
    whole = displaced(make_model, make_pairs)
    expected = [step.metrics["displacement/alarm"] for step in whole if step.metrics]
    assert 0 < sum(expected) < len(expected)
    first, second = (displaced(make_model, make_pairs) for _ in range(2))
    found = []
    for trainer in (first, second):
        if trainer is second:
            tensors = first.tensors()
            second.restore(tensors, first.state())
        for step in trainer:
            assert step.metrics is not None
            found.append(step.metrics["displacement/alarm"])
            if trainer is first and step.number == WINDOWS // 2:
                break
    assert found == expected
