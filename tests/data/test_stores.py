"""What every store must do, one test for all of them; then what only one of them can get wrong."""

import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo.data.filters import DecisionFilter
from dpo.data.records import Decision, DecisionOutcome
from dpo.data.stores import FeedbackStore, open_store
from dpo.errors import InputError

DAY = datetime(2024, 5, 1, tzinfo=UTC)
FOREVER = "9999-12-31"

# a few days around midnight, so that filters and ties are met
TIMES = st.builds(
    lambda days, microseconds: DAY + timedelta(days=days, microseconds=microseconds),
    st.integers(-2, 2),
    st.sampled_from([-1, 0, 1, 43_200_000_000]),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
SHARES = st.sampled_from([None, 0.1, 0.7, 1.0])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text("ab\0é"), inner, max_size=2)
    ),
    max_leaves=4,
)
ACTIONS = st.fixed_dictionaries(
    {"decision": VALUES},
    optional={
        "entryType": st.sampled_from(["tool", "guideline"]),
        "types": st.lists(st.sampled_from(["tool", "knowledge"]), max_size=2),
        "scope": st.sampled_from(["org", "project"]),
    },
)
OUTCOMES = st.none() | st.fixed_dictionaries(
    {}, optional={"taskOutcomeType": st.sampled_from(["success", "failure"]), "count": VALUES}
)
DECISIONS = st.builds(
    Decision,
    id=TEXTS,
    policy=st.sampled_from(["extraction", "retrieval"]),
    session_id=st.sampled_from(["s-1", "s-2", "\N{GRINNING FACE}"]),
    decided_at=TIMES,
    state=st.dictionaries(st.text("ab"), VALUES, max_size=2),
    action=ACTIONS,
    confidence=SHARES,
    propensity=SHARES,
    reward=st.sampled_from([None, -1.0, 0.0, 1 / 3]),
    outcome=OUTCOMES,
)
LOGS = st.lists(DECISIONS, max_size=8, unique_by=lambda decision: decision.id)
DATES = st.sampled_from(["2024-04-30", "2024-05-01", "2024-05-02T12:00:00Z"])
SOME = {"min_size": 1, "max_size": 2}
FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "policy": st.sampled_from(["extraction", "retrieval"]),
        "start": DATES,
        "end": st.sampled_from([date(2024, 5, 2), "2024-05-03", "2024-05-02T12:00:00Z"]),
        "sessions": st.frozensets(st.sampled_from(["s-1", "s-2"])),
        "entry_types": st.frozensets(st.sampled_from(["tool", "knowledge"])),
        "scope_types": st.frozensets(st.sampled_from(["org", "project"])),
        "outcome_types": st.frozensets(st.sampled_from(["success", "failure"])),
        "min_confidence": st.sampled_from([0.0, 0.7]),
        "missing_confidence": st.sampled_from(["keep", "drop"]),
        "only_with_outcomes": st.booleans(),
        "limit": st.integers(1, 3),
    },
)
on_every_store = settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def decision(identity: str = "d-1", **changes: object) -> Decision:
    values: dict[str, object] = {
        "id": identity,
        "policy": "extraction",
        "session_id": "s-1",
        "decided_at": DAY,
        "state": {"contextFeatures": {"turnNumber": 3}},
        "action": {"decision": "store"},
    }
    return Decision(**(values | changes))  # type: ignore[arg-type]  # the tests know the fields


def in_order(decisions: Sequence[Decision]) -> list[Decision]:
    return sorted(decisions, key=lambda item: (item.decided_at, item.id))


def run_python(script: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class TestRecording:
    @on_every_store
    @given(log=LOGS)
    def test_what_was_recorded_is_read_back_the_oldest_first(
        self, store: FeedbackStore, log: list[Decision]
    ) -> None:
        store.delete_before(FOREVER)
        assert store.record_decisions(log) == len(log) == store.count()
        assert list(store.decisions()) == in_order(log)

    @on_every_store
    @given(log=LOGS, again=st.data())
    def test_recording_again_changes_nothing(
        self, store: FeedbackStore, log: list[Decision], again: st.DataObject
    ) -> None:
        store.delete_before(FOREVER)
        store.record_decisions(log)
        repeated = again.draw(st.lists(st.sampled_from(log), max_size=5) if log else st.just([]))
        assert store.record_decisions(repeated) == 0
        assert list(store.decisions()) == in_order(log)

    def test_recording_says_whether_it_was_there(self, store: FeedbackStore) -> None:
        assert store.record_decision(decision())
        assert not store.record_decision(decision())

    def test_one_batch_may_repeat_a_decision(self, store: FeedbackStore) -> None:
        assert store.record_decisions([decision(), decision(reward=1), decision()]) == 1
        assert [item.reward for item in store.decisions()] == [1.0]

    def test_tuples_and_mappings_are_the_lists_and_objects_they_become(
        self, store: FeedbackStore
    ) -> None:
        assert store.record_decision(decision(state={"types": ("a", "b")}))
        assert not store.record_decision(decision(state={"types": ["a", "b"]}))

    @pytest.mark.parametrize("earlier", [True, False], ids=["stored", "in the same batch"])
    def test_another_decision_under_a_known_id_is_refused(
        self, store: FeedbackStore, earlier: bool
    ) -> None:
        batch = [decision("new"), decision(action={"decision": "skip"})]
        if earlier:
            store.record_decision(decision())
        else:
            batch.insert(0, decision())
        with pytest.raises(InputError, match="decision 'd-1' is recorded with other content"):
            store.record_decisions(batch)
        assert [item.id for item in store.decisions()] == (["d-1"] if earlier else [])

    @pytest.mark.parametrize("bad", [float("nan"), "\ud800", object()])
    def test_what_json_cannot_say_is_refused_and_nothing_written(
        self, store: FeedbackStore, bad: object
    ) -> None:
        with pytest.raises(InputError, match=r"decision 'bad'.*: cannot be written as JSON"):
            store.record_decisions([decision("good"), decision("bad", state={"a": bad})])
        assert store.count() == 0
        assert store.record_decision(decision("good"))

    def test_a_batch_of_several_transactions_is_recorded_whole(self, store: FeedbackStore) -> None:
        many = [decision(f"d-{number:04}") for number in range(5001)]
        assert store.record_decisions(iter(many)) == 5001
        assert [item.id for item in store.decisions()] == [item.id for item in many]

    def test_no_decisions_are_no_fault(self, store: FeedbackStore) -> None:
        assert store.record_decisions([]) == 0
        assert list(store.decisions()) == []


class TestOutcomes:
    def test_an_outcome_may_arrive_later(self, store: FeedbackStore) -> None:
        store.record_decision(decision())
        assert store.record_outcome("d-1", {"retrievalCount": 2}, 0.5, DAY + timedelta(days=1))
        assert list(store.decisions()) == [decision(reward=0.5, outcome={"retrievalCount": 2})]

    @pytest.mark.parametrize("known", [{"reward": 0.0}, {"outcome": {"n": 1}}])
    def test_a_reward_or_an_outcome_is_enough(
        self, store: FeedbackStore, known: dict[str, object]
    ) -> None:
        store.record_decision(decision())
        assert store.record_outcome("d-1", **known)  # type: ignore[arg-type]  # two fields
        assert list(store.decisions(DecisionFilter(only_with_outcomes=True))) == [
            decision("d-1", **known)
        ]

    @on_every_store
    @given(
        order=st.integers(1, 4).flatmap(lambda days: st.permutations(range(days))),
        inline=st.booleans(),
    )
    def test_the_latest_outcome_counts_whatever_order_they_arrive_in(
        self, store: FeedbackStore, order: list[int], inline: bool
    ) -> None:
        store.delete_before(FOREVER)
        store.record_decision(decision(reward=-0.5 if inline else None))
        for day in order:
            store.record_outcome("d-1", {"day": day}, day / 4, DAY + timedelta(days=day + 1))
        last = len(order) - 1
        assert list(store.decisions()) == [decision(reward=last / 4, outcome={"day": last})]

    def test_the_same_again_and_older_news_change_nothing(self, store: FeedbackStore) -> None:
        store.record_decision(decision(reward=0.25))
        noon = DAY + timedelta(hours=12)
        assert store.record_outcome("d-1", reward=1, at=noon)
        assert not store.record_outcome("d-1", reward=1.0, at=noon)
        assert not store.record_outcome("d-1", reward=0.5, at=noon - timedelta(microseconds=1))
        assert not store.record_decision(decision(reward=0.25))
        assert not store.record_decision(decision())
        assert [item.reward for item in store.decisions()] == [1.0]

    def test_two_outcomes_of_one_time_contradict_each_other(self, store: FeedbackStore) -> None:
        store.record_decision(decision(reward=0.25))
        with pytest.raises(
            InputError, match=r"'d-1' has another outcome as of 2024-05-01T00:00:00"
        ):
            store.record_outcome("d-1", reward=0.5, at=DAY)
        with pytest.raises(InputError, match="give a correction a later time"):
            store.record_decisions([decision("new"), decision(reward=0.5)])
        assert [item.reward for item in store.decisions()] == [0.25]

    def test_an_outcome_without_a_time_is_as_of_now(self, store: FeedbackStore) -> None:
        store.record_decision(decision())
        store.record_outcome("d-1", reward=1)
        assert not store.record_outcome("d-1", reward=0, at=datetime.now(UTC) - timedelta(hours=1))
        assert store.record_outcome("d-1", reward=0, at=datetime.now(UTC) + timedelta(hours=1))

    def test_many_outcomes_are_recorded_at_once_and_news_are_counted(
        self, store: FeedbackStore
    ) -> None:
        store.record_decisions(decision(f"d-{number:04}") for number in range(1000))
        first = [
            DecisionOutcome(f"d-{number:04}", DAY + timedelta(days=1), reward=0.25)
            for number in range(1000)
        ]
        corrected = DecisionOutcome("d-0007", DAY + timedelta(days=2), reward=1)
        assert store.record_outcomes([*first, corrected, corrected, first[7]]) == 1001
        assert store.record_outcomes(first) == 0
        found = {item.id: item.reward for item in store.decisions()}
        assert found == {item.decision_id: item.reward for item in first} | {"d-0007": 1.0}

    def test_one_wrong_outcome_undoes_its_batch(self, store: FeedbackStore) -> None:
        store.record_decision(decision())
        batch = [DecisionOutcome(name, DAY, reward=1) for name in ("d-1", "d-9")]
        with pytest.raises(InputError, match="no decision 'd-9'"):
            store.record_outcomes(batch)
        assert list(store.decisions()) == [decision()]

    def test_outcome_of_an_unknown_decision_is_refused(self, store: FeedbackStore) -> None:
        with pytest.raises(InputError, match="no decision 'd-9': record the decision first"):
            store.record_outcome("d-9", reward=1)

    def test_an_outcome_must_say_something(self, store: FeedbackStore) -> None:
        with pytest.raises(InputError, match="it needs a reward, an outcome or both"):
            store.record_outcome("d-1")

    def test_outcomes_can_be_recorded_while_reading(self, store: FeedbackStore) -> None:
        store.record_decisions(decision(f"d-{number:04}") for number in range(1500))
        for number, item in enumerate(store.decisions()):
            if number % 300 == 0:
                store.record_outcome(item.id, reward=0.5, at=DAY + timedelta(days=1))
        assert [item.reward for item in store.decisions()].count(0.5) == 5


class TestReading:
    @on_every_store
    @given(log=LOGS, conditions=FILTERS)
    def test_filters_equal_their_definition(
        self, store: FeedbackStore, log: list[Decision], conditions: dict[str, object]
    ) -> None:
        store.delete_before(FOREVER)
        store.record_decisions(log)
        wanted = DecisionFilter(**conditions)  # type: ignore[arg-type]  # drawn by name
        accepted = [item for item in in_order(log) if is_wanted(item, conditions)]
        limit = conditions.get("limit", len(accepted))
        assert isinstance(limit, int)
        assert list(store.decisions(wanted)) == accepted[:limit]

    def test_limit_counts_what_the_other_conditions_leave(self, store: FeedbackStore) -> None:
        confidences = [0.1, None, 0.9, 0.2, 0.7, 1.0]
        store.record_decisions(
            decision(f"d-{number}", confidence=confidence)
            for number, confidence in enumerate(confidences)
        )
        wanted = DecisionFilter(min_confidence=0.7, limit=2)
        assert [item.id for item in store.decisions(wanted)] == ["d-2", "d-4"]

    def test_reading_takes_memory_for_few_decisions_only(self, store: FeedbackStore) -> None:
        store.record_decisions(
            decision(f"d-{number}", state={"text": f"{number:010}" * 100}) for number in range(3000)
        )
        tracemalloc.start()
        try:
            assert sum(1 for _ in store.decisions()) == 3000
            assert tracemalloc.get_traced_memory()[1] < 2_000_000  # the texts are 3 MB
        finally:
            tracemalloc.stop()

    def test_what_is_recorded_meanwhile_is_not_seen(self, store: FeedbackStore) -> None:
        store.record_decisions([decision("a"), decision("b")])
        reading = store.decisions()
        first = next(reading)
        store.record_decision(decision("c"))
        assert [first.id, *(item.id for item in reading)] == ["a", "b"]

    def test_another_process_sees_what_was_recorded(
        self, store: FeedbackStore, source: str
    ) -> None:
        store.record_decision(decision())
        with open_store(source) as other:
            assert list(other.decisions()) == [decision()]
            other.record_outcome("d-1", reward=1)
        assert list(store.decisions()) == [decision(reward=1)]


class TestRetention:
    def test_what_is_older_goes_with_its_outcomes(self, store: FeedbackStore) -> None:
        hours = [DAY + timedelta(hours=hour) for hour in (-1, 0, 1)]
        log = [decision(f"d-{at:%H}", decided_at=at, reward=0.5) for at in hours]
        store.record_decisions(log)
        store.record_outcome("d-23", reward=1)
        store.record_outcome("d-00", reward=1, at=DAY + timedelta(days=1))
        assert store.delete_before(DAY) == 1
        kept = [replace(log[1], reward=1), log[2]]
        assert list(store.decisions()) == kept
        assert store.count() == 2
        again = replace(log[0], reward=None)
        assert store.record_decision(again)
        assert list(store.decisions()) == [again, *kept]  # its outcome did not outlive it

    def test_nothing_older_is_nothing_deleted(self, store: FeedbackStore) -> None:
        store.record_decision(decision())
        assert store.delete_before("2024-05-01") == 0

    def test_reading_goes_on_over_what_is_deleted_meanwhile(self, store: FeedbackStore) -> None:
        store.record_decisions(decision(f"d-{number:04}") for number in range(1500))
        reading = store.decisions()
        next(reading)
        store.delete_before(FOREVER)
        assert sum(1 for _ in reading) == 1499

    def test_wrong_date_is_refused(self, store: FeedbackStore) -> None:
        with pytest.raises(InputError, match="delete_before: 'May' is not an ISO 8601 time"):
            store.delete_before("May")

    def test_another_writer_goes_on_after_a_deletion(
        self, store: FeedbackStore, source: str
    ) -> None:
        store.record_decisions([decision("old"), decision("new", decided_at=DAY + timedelta(1))])
        with open_store(source) as other:
            assert other.count() == 2
            store.delete_before("2024-05-02")
            assert other.record_decision(decision("newer", decided_at=DAY + timedelta(2)))
            assert other.record_decision(decision("old"))
        assert [item.id for item in store.decisions()] == ["old", "new", "newer"]


_WRITE_FOREVER = """
import sys
from dpo.data.records import decision_from_json
from dpo.data.stores import open_store
record = {"policy": "p", "session_id": "s", "decided_at": "2024-05-01", "state": {}, "action": {}}
with open_store(sys.argv[1], create=True) as store:
    for number in range(1_000_000):
        name = f"d-{number:06}"
        store.record_decisions(
            decision_from_json(record | {"id": f"{name}-{part}"}, "") for part in range(20)
        )
        store.record_outcome(f"{name}-0", reward=1)
        print(name, flush=True)
"""
_WRITE_A_SHARE = """
import sys
from dpo.data.records import decision_from_json
from dpo.data.stores import open_store
record = {"policy": "p", "session_id": "s", "decided_at": "2024-05-01", "state": {}, "action": {}}
with open_store(sys.argv[1], create=True) as store:
    for number in range(10):
        for name in (f"own-{sys.argv[2]}-{number}", f"shared-{number}"):
            store.record_decision(decision_from_json(record | {"id": name}, ""))
            store.record_outcome(name, reward=number / 10)
"""


class TestProcesses:
    @pytest.mark.parametrize("acknowledged", [1, 7])
    def test_what_was_acknowledged_survives_sigkill(self, source: str, acknowledged: int) -> None:
        with run_python(_WRITE_FOREVER, source) as writer:
            assert writer.stdout
            last = [writer.stdout.readline().strip() for _ in range(acknowledged)][-1]
            writer.send_signal(signal.SIGKILL)
        with open_store(source) as store:
            found = {item.id: item.reward for item in store.decisions()}
            names = sorted({identity.rpartition("-")[0] for identity in found})
            assert set(names) >= {f"d-{number:06}" for number in range(acknowledged)}
            assert found[f"{last}-0"] == 1
            assert len(found) == 20 * len(names)  # batches are whole or absent
            assert store.record_decision(decision())
            assert store.count() == len(found) + 1

    def test_four_processes_write_at_once(self, source: str) -> None:
        writers = [run_python(_WRITE_A_SHARE, source, str(number)) for number in range(4)]
        assert [writer.wait() for writer in writers] == [0] * 4
        for writer in writers:
            writer.communicate()
        with open_store(source) as store:
            found = list(store.decisions())
        assert len(found) == 4 * 10 + 10
        assert all(item.reward is not None for item in found)


class TestOpening:
    def test_a_store_that_is_not_there_is_refused_and_not_made(self, source: str) -> None:
        for _ in range(2):
            with pytest.raises(InputError, match=r"no such file|no feedback store"):
                open_store(source)

    def test_making_a_store_that_is_there_opens_it(self, store: FeedbackStore, source: str) -> None:
        store.record_decision(decision())
        with open_store(source, create=True) as again:
            assert again.count() == 1

    def test_closing_twice_is_harmless(self, store: FeedbackStore) -> None:
        store.close()
        store.close()

    @pytest.mark.parametrize("name", ["feedback.txt", "feedback", "feedback.json.gz"])
    def test_an_unknown_ending_is_refused(self, name: str) -> None:
        with pytest.raises(
            InputError, match=rf"^{name}: cannot tell what store this is: .*\.jsonl"
        ):
            open_store(name)

    def test_an_unknown_url_is_refused_without_its_password(self) -> None:
        with pytest.raises(InputError, match=r"^mysql://host/db: the only kind of URL known is"):
            open_store("mysql://me:secret@host/db")


def is_wanted(item: Decision, conditions: dict[str, object]) -> bool:
    """The filter's definition, told a second time."""
    moments = {"start": time.min, "end": time.max}
    low, high = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    for name, value in conditions.items():
        if name in moments:
            text = str(value)
            moment = datetime.fromisoformat(text)
            if "T" not in text:
                moment = datetime.combine(moment, moments[name], UTC)
            low, high = (moment, high) if name == "start" else (low, moment)
    named = item.action.get("types")
    types: set[object] = {str(item.action.get("entryType"))}
    types.update(named if isinstance(named, list) else [])
    outcome = item.outcome or {}
    found: dict[str, set[object]] = {
        "sessions": {item.session_id},
        "entry_types": types,
        "scope_types": {str(item.action.get("scope"))},
        "outcome_types": {str(outcome.get("taskOutcomeType"))},
    }
    if any(name in conditions and not found[name] & conditions[name] for name in found):  # type: ignore[operator]
        return False
    least = conditions.get("min_confidence")
    if isinstance(least, float):
        missing = conditions.get("missing_confidence", "drop")
        if item.confidence is None and missing == "drop":
            return False
        if item.confidence is not None and item.confidence < least:
            return False
    if conditions.get("only_with_outcomes") and item.reward is None and item.outcome is None:
        return False
    return low <= item.decided_at <= high and conditions.get("policy", item.policy) == item.policy
