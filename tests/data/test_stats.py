import statistics
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.records import Decision
from dpo.data.simulate import simulate
from dpo.data.stats import NumberSummary, PolicyStats, feedback_stats
from dpo.errors import InputError

DAY = datetime(2024, 5, 1, tzinfo=UTC)


def decision(
    number: int, *, action: str = "store", policy: str = "extraction", reward: float | None = None
) -> Decision:
    at = DAY + timedelta(days=number)
    session = f"s-{number // 2}"
    return Decision(
        f"d-{number}", policy, session, at, {}, {"decision": action}, confidence=0.5, reward=reward
    )


def test_counts_of_a_small_log_are_right() -> None:
    log = [
        decision(2, reward=0),
        decision(0, reward=1),
        decision(1, action="skip"),
        decision(3, policy="own"),
    ]
    extraction, own = feedback_stats(log)
    assert extraction == PolicyStats(
        policy="extraction",
        decisions=3,
        sessions=2,
        simulated=0,
        first=DAY,
        last=DAY + timedelta(days=2),
        classes={"store": 2, "skip": 1, "defer": 0},
        with_outcome=2,
        rewards=NumberSummary(2, 0.5, 0.5, 0.0, 1.0),
        zero_rewards=1,
        confidences=NumberSummary(3, 0.5, 0.0, 0.5, 0.5),
        propensities=None,
    )
    assert (own.policy, own.decisions, own.classes) == ("own", 1, {})


def test_simulated_decisions_are_called_so() -> None:
    (stats,) = feedback_stats([*simulate("extraction", 4, seed=0), decision(1)])
    assert stats.simulated == 4
    assert "  SIMULATION: 4 (80.0%) were simulated, not observed" in stats.lines()


def test_nothing_gives_nothing() -> None:
    assert feedback_stats([]) == ()


@given(st.lists(st.floats(-1, 1), min_size=1))
def test_reward_summary_equals_the_textbook(rewards: list[float]) -> None:
    (stats,) = feedback_stats(decision(n, reward=reward) for n, reward in enumerate(rewards))
    assert stats.rewards
    assert stats.rewards.mean == pytest.approx(statistics.fmean(rewards), abs=1e-12)
    assert stats.rewards.deviation == pytest.approx(statistics.pstdev(rewards), abs=1e-9)
    assert (stats.rewards.smallest, stats.rewards.largest) == (min(rewards), max(rewards))


def test_an_unknown_action_is_named() -> None:
    with pytest.raises(InputError, match="decision 'd-7': action: decision must be one of store"):
        feedback_stats([decision(7, action="forget")])


def test_decisions_are_read_once() -> None:
    def stream() -> Iterator[Decision]:
        yield from map(decision, range(3))

    assert feedback_stats(stream())[0].decisions == 3


def test_text_says_what_was_counted() -> None:
    (stats,) = feedback_stats([decision(0, reward=0), decision(1, reward=-1), decision(2)])
    assert list(stats.lines()) == [
        "extraction: 3 decisions in 2 sessions",
        "  from 2024-05-01T00:00:00.000000Z to 2024-05-03T00:00:00.000000Z",
        "  with an outcome: 2 (66.7%)",
        "  with a reward: 2 (66.7%), mean -0.5000 (deviation 0.5000), from -1.0000 to 0.0000",
        "  with a confidence: 3 (100.0%), mean 0.5000 (deviation 0.0000), from 0.5000 to 0.5000",
        "  with a propensity: none",
        "  rewards of exactly 0: 1",
        "  action store: 3 (100.0%)",
        "  action skip: 0 (0.0%)",
        "  action defer: 0 (0.0%)",
    ]
