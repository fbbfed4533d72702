from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.filters import Bound, DecisionFilter, parse_moment
from dpo.data.records import (
    Decision,
    DecisionOutcome,
    decision_from_json,
    decision_to_json,
    decode_json,
    encode_json,
    format_time,
    outcome_from_json,
    outcome_to_json,
    parse_time,
)
from dpo.errors import InputError
from dpo.files import JSON

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
RECORD: dict[str, JSON] = {
    "id": "d-1",
    "policy": "extraction",
    "session_id": "s-1",
    "decided_at": "2024-05-01T12:00:00Z",
    "state": {"contextFeatures": {"turnNumber": 3}},
    "action": {"decision": "store"},
}
TIMES = st.datetimes(timezones=st.timezones() | st.none() | st.just(UTC)).filter(
    lambda time: 2 < time.year < 9998
)


class TestDecision:
    def test_minimal_record_has_no_outcome_and_no_numbers(self) -> None:
        decision = decision_from_json(RECORD, "x")
        assert decision == Decision(
            "d-1",
            "extraction",
            "s-1",
            NOON,
            {"contextFeatures": {"turnNumber": 3}},
            {"decision": "store"},
        )
        assert not decision.has_outcome

    def test_full_record_comes_back_as_it_was(self) -> None:
        record = RECORD | {
            "decided_at": "2024-05-01T12:00:00.000000Z",
            "confidence": 0.5,
            "propensity": 0.25,
            "reward": -1.0,
            "outcome": {"retrievalCount": 2},
        }
        assert decision_to_json(decision_from_json(record, "x")) == record

    @pytest.mark.parametrize("known", [{"reward": 0}, {"outcome": {}}])
    def test_a_reward_of_zero_and_an_empty_outcome_are_outcomes(
        self, known: dict[str, JSON]
    ) -> None:
        assert decision_from_json(RECORD | known, "x").has_outcome

    def test_null_means_not_known(self) -> None:
        nulls = {"confidence": None, "propensity": None, "reward": None, "outcome": None}
        assert decision_from_json(RECORD | nulls, "x") == decision_from_json(RECORD, "x")

    def test_whole_numbers_are_numbers(self) -> None:
        decision = decision_from_json(
            RECORD | {"confidence": 1, "propensity": 1, "reward": -1}, "x"
        )
        assert (
            repr((decision.confidence, decision.propensity, decision.reward)) == "(1.0, 1.0, -1.0)"
        )

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({"id": ""}, 'id must be a text of at least one letter, without NUL, got ""'),
            ({"id": "a\0b"}, "id must be a text of at least one letter, without NUL, got "),
            ({"id": "\ud800"}, "id must be a text of at least one letter"),
            ({"policy": 3}, "policy must be a text .*, got 3"),
            ({"session_id": None}, "session_id is missing"),
            (
                {"decided_at": "yesterday"},
                "decided_at: 'yesterday' is not an ISO 8601 time such as",
            ),
            ({"decided_at": "2024-02-30T00:00:00Z"}, "decided_at: .* day is out of range"),
            ({"decided_at": "0001-01-01T00:00:00+10:00"}, "decided_at: .* is not an ISO 8601 time"),
            ({"decided_at": 1714564800}, "decided_at must be an ISO 8601 time .*, got 1714564800"),
            ({"state": [1]}, r"state must be an object, got \[1\]"),
            ({"action": None}, "action is missing"),
            ({"confidence": 1.01}, r"confidence must be a number in \[0, 1\], got 1.01"),
            ({"confidence": True}, r"confidence must be a number in \[0, 1\], got true"),
            ({"confidence": float("nan")}, r"confidence must be a number in \[0, 1\], got NaN"),
            ({"propensity": 0}, r"propensity must be a number in \(0, 1\], got 0"),
            ({"reward": float("nan")}, r"reward must be a number in \[-1, 1\], got NaN"),
            ({"reward": "1"}, r"reward must be a number in \[-1, 1\], got \"1\""),
            ({"reward": 10**400}, r"reward must be a number in \[-1, 1\], got 10000"),
            ({"outcome": 0.5}, "outcome must be an object, got 0.5"),
            ({"sesion_id": "s"}, 'unknown key "sesion_id", expected only id, policy, session_id'),
        ],
    )
    def test_fault_is_named_with_its_place(self, change: dict[str, JSON], fault: str) -> None:
        with pytest.raises(InputError, match=f"^log.jsonl:7: .*{fault}"):
            decision_from_json(RECORD | change, "log.jsonl:7")

    def test_all_faults_of_a_record_are_reported_together(self) -> None:
        changes: dict[str, JSON] = {
            "policy": None,
            "decided_at": "?",
            "confidence": 2,
            "reward": 2,
            "colour": "red",
        }
        with pytest.raises(InputError) as error:
            decision_from_json(RECORD | changes, "x")
        for name in changes:
            assert name in str(error.value)

    @pytest.mark.parametrize("value", [None, [], "text", 3])
    def test_what_is_no_object_is_refused(self, value: JSON) -> None:
        with pytest.raises(InputError, match="x: expected a JSON object, got"):
            decision_from_json(value, "x")

    def test_naive_time_is_refused_in_python(self) -> None:
        with pytest.raises(InputError, match=r"decided_at must be .*aware datetime"):
            Decision("d", "p", "s", NOON.replace(tzinfo=None), {}, {})

    def test_times_are_kept_in_utc(self) -> None:
        zone = timezone(timedelta(hours=-5))
        assert repr(Decision("d", "p", "s", NOON.astimezone(zone), {}, {}).decided_at) == repr(NOON)


class TestOutcome:
    def test_record_comes_back_as_it_was(self) -> None:
        record: dict[str, JSON] = {
            "decision_id": "d-1",
            "at": "2024-05-02T00:00:00.000000Z",
            "reward": 0.0,
            "outcome": {"missedCount": 0},
        }
        assert outcome_to_json(outcome_from_json(record, "x")) == record

    def test_nothing_known_is_refused(self) -> None:
        with pytest.raises(
            InputError, match="x: outcome of decision 'd': it needs a reward, an outc"
        ):
            outcome_from_json({"decision_id": "d", "at": "2024-05-01"}, "x")

    def test_faults_are_reported_together(self) -> None:
        with pytest.raises(
            InputError, match=r"at must be .*; reward must be a number in \[-1, 1\]"
        ):
            DecisionOutcome("d", datetime(2024, 5, 1), reward=3)


class TestTimes:
    @pytest.mark.parametrize(
        "text",
        [
            "2024-05-01T12:00:00Z",
            "2024-05-01 12:00:00",
            "2024-05-01T12:00",
            "2024-05-01T14:00:00+02:00",
            "2024-04-30T23:30:00.000-12:30",
            "20240501T120000Z",
        ],
    )
    def test_offsets_are_honoured_and_naive_times_are_utc(self, text: str) -> None:
        assert parse_time(text) == NOON

    @given(TIMES)
    def test_written_time_is_read_back_exactly(self, time: datetime) -> None:
        aware = time if time.tzinfo else time.replace(tzinfo=UTC)
        assert parse_time(format_time(aware)) == aware.astimezone(UTC)

    @given(TIMES, TIMES)
    def test_texts_sort_as_times_do(self, one: datetime, other: datetime) -> None:
        first, second = (
            time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC) for time in (one, other)
        )
        assert (format_time(first) < format_time(second)) == (first < second)


class TestStrictJson:
    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ('{"a": 1', "malformed JSON: Expecting"),
            ('{"a": 1, "a": 1}', "malformed JSON: key 'a' is there twice"),
            ('{"a": NaN}', "malformed JSON: NaN is not a finite number"),
            ('{"a": -Infinity}', "malformed JSON: -Infinity is not a finite number"),
            ('{"a": 1e999}', "malformed JSON: 1e999 is not a finite number"),
            ('{"a": "\\ud800"}', "malformed JSON: .*surrogates not allowed"),
            (b'{"a": "\xff"}', "malformed JSON: .*invalid start byte"),
            ("[" * 100_000, "malformed JSON: .*recursion"),
            ("1" * 5000, "malformed JSON: Exceeds the limit"),
        ],
    )
    def test_what_cannot_be_kept_is_refused(self, text: str | bytes, fault: str) -> None:
        with pytest.raises(InputError, match=f"^here: {fault}"):
            decode_json(text, "here")

    @pytest.mark.parametrize(
        "value", [float("nan"), {"a": "\ud800"}, {1, 2}, {"a": [float("inf")]}]
    )
    def test_what_json_cannot_say_is_not_written(self, value: object) -> None:
        with pytest.raises(InputError, match=r"^here: cannot be written as JSON"):
            encode_json(value, "here")

    def test_paired_surrogates_are_one_letter(self) -> None:
        assert decode_json('"\\ud83d\\ude00"', "x") == "\N{GRINNING FACE}"


class TestFilter:
    @pytest.mark.parametrize("end", ["2024-05-01", date(2024, 5, 1), "20240501"])
    def test_end_date_includes_the_whole_day(self, end: Bound) -> None:
        wanted = DecisionFilter(end=end)
        assert wanted.last_moment == datetime(2024, 5, 1, 23, 59, 59, 999999, UTC)

    @pytest.mark.parametrize("start", ["2024-05-01", date(2024, 5, 1), datetime(2024, 5, 1)])
    def test_start_date_is_midnight_utc(self, start: Bound) -> None:
        assert DecisionFilter(start=start).first_moment == datetime(2024, 5, 1, tzinfo=UTC)

    def test_offset_of_an_end_with_a_time_is_honoured(self) -> None:
        assert DecisionFilter(end="2024-05-01T14:00:00+02:00").last_moment == NOON

    @pytest.mark.parametrize(
        ("microseconds", "is_accepted"),
        [(-1, False), (0, True), (86_399_999_999, True), (86_400_000_000, False)],
    )
    def test_both_ends_are_included_to_the_microsecond(
        self, microseconds: int, is_accepted: bool
    ) -> None:
        at = datetime(2024, 5, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
        decision = Decision("d", "p", "s", at, {}, {})
        wanted = DecisionFilter(start="2024-05-01", end="2024-05-01")
        assert wanted.accepts(decision) is is_accepted

    def test_one_day_may_be_start_and_end(self) -> None:
        DecisionFilter(start="2024-05-01", end="2024-05-01")

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            (
                {"start": "2024-05-02", "end": "2024-05-01"},
                "start 2024-05-02 is after end 2024-05-01",
            ),
            ({"start": "May"}, "start: 'May' is not an ISO 8601 time"),
            ({"end": "2024-13-01"}, "end: '2024-13-01' is not an ISO 8601 time"),
            ({"min_confidence": 1.5}, r"min_confidence must be in \[0, 1\], got 1.5"),
            ({"min_confidence": float("nan")}, r"min_confidence must be in \[0, 1\], got nan"),
            ({"missing_confidence": "ask"}, "missing_confidence must be keep or drop, got 'ask'"),
            ({"min_confidence": "0.5"}, r"min_confidence must be in \[0, 1\], got '0.5'"),
            ({"missing_confidence": "keep"}, "missing_confidence has no effect without"),
            ({"start": 5}, "start must be a date, a datetime or text, got 5"),
            ({"sessions": [1]}, r"sessions must be several texts, got \[1\]"),
            ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
            ({"sessions": "s-1"}, "sessions must be several texts, got 's-1'"),
        ],
    )
    def test_wrong_condition_is_refused(self, changes: dict[str, object], fault: str) -> None:
        with pytest.raises(InputError, match=f"^{fault}"):
            DecisionFilter(**changes)  # type: ignore[arg-type]  # that is the test

    @pytest.mark.parametrize(
        ("wanted", "refusals"),
        [
            (DecisionFilter(), []),
            (DecisionFilter(policy="retrieval"), ["policy"]),
            (DecisionFilter(start="2024-05-02"), ["start"]),
            (DecisionFilter(end="2024-04-30"), ["end"]),
            (DecisionFilter(sessions=frozenset({"s-2"})), ["sessions"]),
            (DecisionFilter(entry_types=frozenset({"tool"})), ["entry_types"]),
            (DecisionFilter(scope_types=frozenset({"org"})), ["scope_types"]),
            (DecisionFilter(outcome_types=frozenset({"success"})), ["outcome_types"]),
            (DecisionFilter(min_confidence=0.1), ["min_confidence"]),
            (DecisionFilter(min_confidence=0.1, missing_confidence="keep"), []),
            (DecisionFilter(only_with_outcomes=True), ["only_with_outcomes"]),
            (DecisionFilter(policy="x", end="2024-04-30"), ["policy", "end"]),
        ],
    )
    def test_refusals_name_the_conditions(
        self, wanted: DecisionFilter, refusals: list[str]
    ) -> None:
        assert list(wanted.refusals(decision_from_json(RECORD, "x"))) == refusals

    @pytest.mark.parametrize(
        ("changes", "is_accepted"),
        [
            ({"action": {"entryType": "tool"}}, True),
            ({"action": {"types": ["fact", "tool"]}}, True),
            ({"state": {"groupFeatures": {"entryTypes": ["tool"]}}}, True),
            ({"action": {"types": None}}, False),
            (
                {
                    "action": {"entryType": "fact"},
                    "state": {"groupFeatures": {"entryTypes": ["tool"]}},
                },
                False,
            ),
        ],
    )
    def test_entry_types_are_the_actions_or_else_the_groups(
        self, changes: dict[str, JSON], is_accepted: bool
    ) -> None:
        wanted = DecisionFilter(entry_types=frozenset({"tool", "guideline"}))
        assert wanted.accepts(decision_from_json(RECORD | changes, "x")) is is_accepted

    @pytest.mark.parametrize(
        "changes", [{"action": {"scope": "org"}}, {"state": {"scopeStats": {"scopeType": "org"}}}]
    )
    def test_scope_is_the_actions_or_else_the_states(self, changes: dict[str, JSON]) -> None:
        wanted = DecisionFilter(scope_types=frozenset({"org"}))
        assert wanted.accepts(decision_from_json(RECORD | changes, "x"))

    @pytest.mark.parametrize("key", ["taskOutcomeType", "outcomeType"])
    def test_outcome_type_is_read_under_both_names(self, key: str) -> None:
        wanted = DecisionFilter(outcome_types=frozenset({"partial"}))
        assert wanted.accepts(decision_from_json(RECORD | {"outcome": {key: "partial"}}, "x"))

    def test_least_confidence_is_included(self) -> None:
        decision = decision_from_json(RECORD | {"confidence": 0.7}, "x")
        assert DecisionFilter(min_confidence=0.7).accepts(decision)

    def test_a_confidence_of_zero_is_a_confidence(self) -> None:
        decision = decision_from_json(RECORD | {"confidence": 0}, "x")
        wanted = DecisionFilter(min_confidence=0.7, missing_confidence="keep")
        assert list(wanted.refusals(decision)) == ["min_confidence"]


def test_moment_of_a_text_with_a_time_ignores_the_time_of_day() -> None:
    assert parse_moment("at", "2024-05-01T12:00") == NOON
