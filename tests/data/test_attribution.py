from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.attribution import (
    ATTRIBUTIONS,
    Attribution,
    Outcome,
    OutcomeType,
    Retrieval,
    infer_outcome,
    last_touch,
    linear,
    normalize_scores,
    outcome_value,
    rank_weighted,
    time_decay,
    weighted,
)
from dpo.errors import InputError

NOON = datetime(2024, 6, 1, 12, tzinfo=UTC)
SUCCESS = Outcome("success", NOON)


def before(minutes: float, rank: int | None = None) -> Retrieval:
    return Retrieval(NOON - timedelta(minutes=minutes), rank)


@pytest.mark.parametrize(
    ("outcome_type", "value"),
    [("success", 0.8), ("partial", 0.4), ("failure", -0.4), ("unknown", 0.0)],
)
def test_an_outcome_is_worth_its_type_times_its_confidence(
    outcome_type: OutcomeType, value: float
) -> None:
    assert outcome_value(Outcome(outcome_type, NOON, 0.8)) == pytest.approx(value)


def test_linear_gives_equal_shares() -> None:
    assert linear(Outcome("failure", NOON), [before(3), before(2)]) == [-0.25, -0.25]


def test_last_touch_gives_all_to_the_latest() -> None:
    assert last_touch(SUCCESS, [before(3), before(1), before(2)]) == [0.0, 1.0, 0.0]


def test_ranks_share_by_their_inverse_and_an_unknown_rank_counts_as_the_first() -> None:
    # weights 1, 1/2, 1/2, 1 of 3
    retrievals = [before(1, 1), before(1, 2), before(1, 2), before(1)]

    assert rank_weighted(SUCCESS, retrievals) == pytest.approx([1 / 3, 1 / 6, 1 / 6, 1 / 3])


def test_time_halves_the_share_every_half_life() -> None:
    assert time_decay(SUCCESS, [before(120), before(60), before(0)]) == pytest.approx(
        [1 / 7, 2 / 7, 4 / 7]
    )
    assert time_decay(
        SUCCESS, [before(10), before(0)], half_life=timedelta(minutes=10)
    ) == pytest.approx([1 / 3, 2 / 3])


def test_retrievals_of_years_ago_still_share_the_whole_outcome() -> None:
    years = 60 * 24 * 365 * 5

    assert time_decay(SUCCESS, [before(years), before(years)]) == [0.5, 0.5]


def test_given_weights_share_in_proportion() -> None:
    assert weighted(SUCCESS, [1, 3]) == [0.25, 0.75]


@pytest.mark.parametrize("attribution", ATTRIBUTIONS.values(), ids=ATTRIBUTIONS)
@settings(max_examples=40, deadline=None)
@given(
    data=st.lists(
        st.builds(before, st.floats(0, 1e7), st.none() | st.integers(1, 99)), min_size=1, max_size=8
    )
)
def test_the_shares_add_up_to_the_outcome(attribution: Attribution, data: list[Retrieval]) -> None:
    shares = attribution(Outcome("partial", NOON, 0.5), data)

    assert len(shares) == len(data)
    assert sum(shares) == pytest.approx(0.25)


@pytest.mark.parametrize("attribution", ATTRIBUTIONS.values(), ids=ATTRIBUTIONS)
def test_without_retrievals_there_is_nothing_to_share(attribution: Attribution) -> None:
    assert attribution(SUCCESS, []) == []


def test_scores_are_rescaled_to_their_absolute_sum() -> None:
    assert normalize_scores([1, -3], target=2.0) == [0.5, -1.5]
    assert normalize_scores([1, -3]) == [0.25, -0.75]
    assert normalize_scores([0, 0]) == [0, 0]


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"outcome must be one of success, .*, got won"):
        Outcome("won", NOON)  # type: ignore[arg-type]  # as it may come from a file
    with pytest.raises(InputError, match=r"confidence must be in \[0, 1\], got 1.5"):
        Outcome("success", NOON, 1.5)
    with pytest.raises(InputError, match="rank must be at least 1, or None, got 0"):
        before(1, 0)
    with pytest.raises(InputError, match="weights must be finite and not negative, got"):
        weighted(SUCCESS, [1, -1])
    with pytest.raises(InputError, match="at least one weight must be above 0"):
        weighted(SUCCESS, [0, 0])
    with pytest.raises(InputError, match="half_life must be positive, got 0:00:00"):
        time_decay(SUCCESS, [before(1)], half_life=timedelta(0))
    with pytest.raises(InputError, match="a retrieval lies after the outcome at 2024-06-01"):
        time_decay(SUCCESS, [before(-1)])


@pytest.mark.parametrize(
    ("status", "outcome_type"),
    [
        ("Task completed", "success"),
        ("SUCCESSFUL", "success"),
        ("completed without errors", "success"),
        ("done: success, 0 failures", "success"),
        ("0 failed, 12 succeeded", "success"),
        ("paused", "partial"),
        ("discarded", "failure"),
        ("incomplete", "partial"),  # holds "complete"
        ("not yet completed", "partial"),
        ("partial success", "partial"),
        ("unsuccessful", "failure"),  # holds "success"
        ("without success", "failure"),
        ("completed with errors", "failure"),
        ("Build FAILED", "failure"),
        ("still running", "unknown"),
    ],
)
def test_words_tell_how_a_task_ended(status: str, outcome_type: str) -> None:
    inferred = infer_outcome(status)

    assert inferred.type == outcome_type
    assert inferred.confidence == (0.5 if outcome_type == "unknown" else 0.8)
