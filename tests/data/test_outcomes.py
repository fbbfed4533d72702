"""Outcomes counted from retrievals: the window holds, and nothing before the decision counts."""

from datetime import UTC, datetime, timedelta

import pytest

from dpo.data.attribution import OutcomeType
from dpo.data.kinds.consolidation import CONSOLIDATION
from dpo.data.kinds.extraction import EXTRACTION
from dpo.data.outcomes import Use, consolidation_outcome, stored_outcome
from dpo.errors import InputError

START = datetime(2024, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def use(days: float, ended: OutcomeType | None = None) -> Use:
    return Use(START + days * DAY, ended)


USES = [
    use(-1, "success"),
    use(0, "success"),
    use(3, "failure"),
    use(4, "partial"),
    use(9),
    use(40),
]


def test_retrievals_in_the_window_are_counted() -> None:
    outcome = stored_outcome(START, USES, evaluated_at=START + 45.5 * DAY, window=30 * DAY)
    assert outcome == {
        "retrievalCount": 4,
        "successCount": 1,
        "failureCount": 1,
        "daysSinceCreation": 45,
    }
    action = EXTRACTION.parse_action({"decision": "store"}, "action")
    assert -1 <= EXTRACTION.reward(outcome, action).value <= 1


def test_without_a_window_all_until_the_evaluation_count() -> None:
    assert stored_outcome(START, USES, evaluated_at=START + 40 * DAY)["retrievalCount"] == 5
    assert stored_outcome(START, USES, evaluated_at=START + 5 * DAY)["retrievalCount"] == 3


def test_rates_before_and_after_a_consolidation() -> None:
    uses = [use(-11), use(-10, "failure"), use(-1, "success"), *USES[1:]]
    outcome = consolidation_outcome(
        START,
        uses,
        evaluated_at=START + 10 * DAY,
        window=10 * DAY,
        entries_before=5,
        entries_after=2,
    )
    assert outcome == {
        "preRetrievalRate": 0.2,
        "postRetrievalRate": 0.4,
        "preSuccessRate": 0.5,
        "postSuccessRate": 0.5,
        "preStorageCount": 5,
        "postStorageCount": 2,
    }
    action = CONSOLIDATION.parse_action({"action": "merge"}, "action")
    assert -1 <= CONSOLIDATION.reward(outcome, action).value <= 1


def test_no_retrievals_are_rates_of_zero() -> None:
    outcome = consolidation_outcome(
        START, [], evaluated_at=START + DAY, window=DAY, entries_before=1, entries_after=1
    )
    assert (outcome["postRetrievalRate"], outcome["postSuccessRate"]) == (0, 0)


def test_windows_that_are_not_over_or_not_positive_are_refused() -> None:
    with pytest.raises(InputError, match="before the decision"):
        stored_outcome(START, [], evaluated_at=START - DAY)
    with pytest.raises(InputError, match="window must be positive"):
        stored_outcome(START, [], evaluated_at=START, window=0 * DAY)
    with pytest.raises(InputError, match="wait, or choose a shorter one"):
        consolidation_outcome(
            START, [], evaluated_at=START + DAY, window=2 * DAY, entries_before=1, entries_after=1
        )
