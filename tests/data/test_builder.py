"""Building: filters, splits without leakage, and the same bytes from the same decisions."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo.data.builder import (
    build_consolidation_dataset,
    build_dataset,
    build_extraction_dataset,
    build_retrieval_dataset,
)
from dpo.data.dataset import BuildOptions, crossing_note
from dpo.data.dataset_files import load_dataset, write_dataset
from dpo.data.kinds import KINDS
from dpo.data.kinds.extraction import EXTRACTION
from dpo.data.pairs import PairOptions
from dpo.data.records import Decision
from dpo.data.simulate import simulate
from dpo.data.stores import open_store
from dpo.errors import InputError
from dpo.preferences import read_pairs

START = datetime(2024, 1, 1, tzinfo=UTC)


def decision(number: int, **changes: Any) -> Decision:
    """A decision of its own session, prompt and grouping key: ``number`` is the turn."""
    values: dict[str, Any] = {
        "id": f"d{number:03}",
        "policy": "extraction",
        "session_id": f"s{number}",
        "decided_at": START + timedelta(days=number),
        "state": state(number),
        "action": {"decision": "skip"},
        "confidence": 0.8,
        "reward": 0.5,
    }
    return Decision(**values | changes)


def state(turn: int, tokens: int = 250) -> dict[str, Any]:
    return {
        "contextFeatures": {
            "turnNumber": turn,
            "tokenCount": tokens,
            "toolCallCount": 0,
            "hasError": False,
            "userTurnCount": 1,
            "assistantTurnCount": 1,
        },
        "memoryState": {
            "totalEntries": 0,
            "recentExtractions": 0,
            "similarEntryExists": False,
            "sessionCaptureCount": 0,
        },
        "contentFeatures": {
            "hasDecision": False,
            "hasRule": False,
            "hasFact": True,
            "hasCommand": False,
            "noveltyScore": 0.5,
            "complexity": 0.25,
        },
    }


def store_of(folder: Path, decisions: Iterable[Decision], name: str = "feedback.jsonl") -> Path:
    with open_store(folder / name, create=True) as store:
        store.record_decisions(decisions)
    return folder / name


def ids(examples: Iterable[Any]) -> list[str]:
    return [example.metadata.id for example in examples]


# --- leakage -------------------------------------------------------------------------------------

SESSIONS_TURNS_TOKENS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3)), min_size=2, max_size=40
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=SESSIONS_TURNS_TOKENS,
    split_by=st.sampled_from(["session", "group", "time"]),
    remove_crossing=st.sampled_from(["both", "prompt", "none"]),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 3),
)
def test_neither_unit_nor_prompt_nor_group_is_on_both_sides(
    rows: list[tuple[int, int, int]],
    split_by: Any,
    remove_crossing: Any,
    share: float,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    decisions = [
        decision(index, session_id=f"s{session}", state=state(turn, tokens))
        for index, (session, turn, tokens) in enumerate(rows)
    ]
    source = store_of(tmp_path_factory.mktemp("store"), decisions)
    try:
        built = build_extraction_dataset(
            source, split_by=split_by, remove_crossing=remove_crossing, eval_split=share, seed=seed
        )
    except InputError:
        return  # too few units, or too much to remove: see the refusals below
    units: dict[str, Callable[[Any], object]] = {
        "session": lambda each: each.metadata.session_id,
        "group": lambda each: EXTRACTION.group_key(each.state),
        "time": lambda each: each.metadata.decided_at,
        "prompt": lambda each: EXTRACTION.render_prompt(each.state),
    }
    apart = {
        split_by,
        *{"both": ("prompt", "group"), "prompt": ("prompt",), "none": ()}[remove_crossing],
    }
    for name in apart:
        sides = [{units[name](each) for each in side} for side in (built.train, built.eval)]
        assert not sides[0] & sides[1]
    assert len(built.train) + len(built.eval) + built.stats.split.removed_examples == len(rows)
    assert built.train
    assert built.eval


# --- reproducibility -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["again.jsonl", "other.db"])
def test_same_decisions_and_seed_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    decisions = list(simulate("extraction", 400, 0, situations=20))
    shuffled = random.Random(1).sample(decisions, len(decisions))
    for folder, rows, store in (("a", decisions, "feedback.jsonl"), ("b", shuffled, name)):
        (tmp_path / folder).mkdir()
        source = store_of(tmp_path / folder, rows, store)
        built = build_extraction_dataset(source, split_by="group", max_examples=300, seed=3)
        options = PairOptions(strategy="all", weight="margin-confidence")
        write_dataset(built, tmp_path / folder / "out", min_pairs=1, pair_options=options)
    files = sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    assert len(files) == 11
    for file in files:
        assert (tmp_path / "a/out" / file).read_bytes() == (tmp_path / "b/out" / file).read_bytes()


def test_seed_changes_the_split(tmp_path: Path) -> None:
    source = store_of(tmp_path, map(decision, range(30)))
    sides = [ids(build_extraction_dataset(source, seed=seed).eval) for seed in (0, 1)]
    assert sides[0] != sides[1]


def test_written_data_set_reads_back(tmp_path: Path) -> None:
    decisions = simulate("consolidation", 300, 0, situations=20)
    built = build_consolidation_dataset(store_of(tmp_path, decisions), split_by="group")
    write_dataset(built, tmp_path / "out", min_pairs=1)
    loaded = load_dataset(tmp_path / "out")
    assert list(loaded.train) == list(built.train)
    assert list(loaded.eval) == list(built.eval)
    assert (loaded.kind.name, loaded.stats, loaded.options) == (
        "consolidation",
        built.stats,
        built.options,
    )


# --- filters -------------------------------------------------------------------------------------


def test_date_range_includes_the_whole_last_day(tmp_path: Path) -> None:
    times = [
        "2023-12-31T23:59:59.9Z",
        "2024-01-01T00:00:00Z",
        "2024-12-31T23:59:59Z",
        "2025-01-01T00:00:00Z",
    ]
    rows = [decision(i, decided_at=datetime.fromisoformat(time)) for i, time in enumerate(times)]
    built = build_extraction_dataset(
        store_of(tmp_path, rows), start_date="2024-01-01", end_date="2024-12-31", eval_split=0.5
    )
    assert sorted(ids([*built.train, *built.eval])) == ["d001", "d002"]
    assert built.stats.filters.policy == 4
    assert (built.stats.filters.start, built.stats.filters.end) == (3, 2)
    assert built.stats.date_range.end == "2024-12-31T23:59:59.000000Z"


def test_date_range_of_the_stats_is_that_of_the_data(tmp_path: Path) -> None:
    built = build_extraction_dataset(
        store_of(tmp_path, map(decision, range(4))), start_date="2000-01-01", eval_split=0.5
    )
    assert built.stats.date_range.start == "2024-01-01T00:00:00.000000Z"
    assert built.stats.date_range.end == "2024-01-04T00:00:00.000000Z"


@pytest.mark.parametrize(("missing", "expected"), [("drop", 2), ("keep", 3)])
@pytest.mark.parametrize("policy", KINDS)
def test_min_confidence_holds_for_every_policy(
    policy: str, missing: Any, expected: int, tmp_path: Path
) -> None:
    first, *_ = simulate(policy, 1, 0)
    rows = [
        dataclasses.replace(
            first,
            id=f"d{i}",
            session_id=f"s{i}",
            confidence=confidence,
            decided_at=START + timedelta(i),
        )
        for i, confidence in enumerate([0.9, 0.7, 0.69, None])
    ]
    built = build_dataset(
        store_of(tmp_path, rows),
        KINDS[policy],
        BuildOptions(min_confidence=0.7, missing_confidence=missing, remove_crossing="none"),
    )
    assert built.stats.total_examples == built.stats.filters.min_confidence == expected


def test_reward_of_zero_is_kept_and_no_outcome_is_not(tmp_path: Path) -> None:
    rows = [decision(0, reward=0.0), decision(1, reward=-0.0), decision(2, reward=None)]
    built = build_extraction_dataset(store_of(tmp_path, rows), eval_split=0.5)
    assert sorted(ids([*built.train, *built.eval])) == ["d000", "d001"]


def test_reward_is_made_from_the_outcome_where_none_is_recorded(tmp_path: Path) -> None:
    outcome = {"missedCount": 3}
    rows = [decision(i, reward=None, outcome=outcome) for i in range(2)]
    built = build_extraction_dataset(store_of(tmp_path, rows), eval_split=0.5)
    action = EXTRACTION.parse_action({"decision": "skip"}, "action")
    assert built.train[0].reward == EXTRACTION.reward(outcome, action).value


def test_max_examples_draws_evenly_and_after_the_filters(tmp_path: Path) -> None:
    rows = [decision(i, confidence=0.9 if i % 2 else 0.1) for i in range(200)]
    built = build_extraction_dataset(store_of(tmp_path, rows), min_confidence=0.5, max_examples=50)
    numbers = [int(name[1:]) for name in ids([*built.train, *built.eval])]
    assert len(numbers) == 50
    assert all(number % 2 for number in numbers)
    # 50 of the 100 odd numbers below 200: the mean is 100 with sd 57.7 / sqrt(50) * sqrt(.5) = 5.8
    assert abs(sum(numbers) / 50 - 100) < 25
    assert (built.stats.filters.only_with_outcomes, built.stats.filters.max_examples) == (100, 50)


def test_other_filters_reach_the_store(tmp_path: Path) -> None:
    store_action = {"decision": "store", "entryType": "tool", "priority": 50}
    rows = [decision(i, action=store_action if i < 3 else {"decision": "skip"}) for i in range(6)]
    built = build_extraction_dataset(
        store_of(tmp_path, rows), entry_types=("tool",), sessions=("s0", "s1", "s4"), eval_split=0.5
    )
    assert sorted(ids([*built.train, *built.eval])) == ["d000", "d001"]


# --- splits --------------------------------------------------------------------------------------


def test_split_by_time_evaluates_on_the_latest(tmp_path: Path) -> None:
    source = store_of(tmp_path, map(decision, range(10)))
    built = build_extraction_dataset(source, split_by="time", eval_split=0.3)
    assert ids(built.eval) == ["d007", "d008", "d009"]


def test_hundred_sessions_split_at_the_share(tmp_path: Path) -> None:
    built = build_extraction_dataset(store_of(tmp_path, map(decision, range(100))), eval_split=0.2)
    assert (built.stats.train_examples, built.stats.eval_examples) == (80, 20)


def test_crossing_prompts_and_groups_are_counted_and_removed(tmp_path: Path) -> None:
    # Ten sessions with a turn of their own; three of them also meet turn 100.
    rows = [decision(i) for i in range(10)]
    same_group = [
        decision(10 + i, session_id=f"s{i}", state=state(100, tokens=i)) for i in range(3)
    ]
    built = build_extraction_dataset(
        store_of(tmp_path, [*rows, *same_group]), eval_split=0.5, remove_crossing="both"
    )
    split = built.stats.split
    assert split.crossing_groups == split.removed_examples
    assert split.crossing_prompts == split.crossing_sessions == 0
    assert built.stats.total_examples + split.removed_examples == 13


def test_nothing_left_names_the_unit_to_choose(tmp_path: Path) -> None:
    rows = [decision(i, state=state(1)) for i in range(10)]
    with pytest.raises(InputError, match=r"none would be left\. Choose split_by 'group'"):
        build_extraction_dataset(store_of(tmp_path, rows))


def test_groups_alone_crossing_offers_to_let_them_cross(tmp_path: Path) -> None:
    rows = [decision(i, state=state(1, tokens=i)) for i in range(10)]
    source = store_of(tmp_path, rows)
    with pytest.raises(
        InputError, match="remove_crossing 'prompt', which lets grouping keys cross"
    ):
        build_extraction_dataset(source)
    assert (
        build_extraction_dataset(source, remove_crossing="prompt").stats.split.crossing_groups == 2
    )


def test_a_small_part_that_is_left_is_kept_and_said_aloud(tmp_path: Path) -> None:
    own = [decision(i, state=state(i)) for i in range(40)]
    shared = [decision(100 + i, state=state(99)) for i in range(200)]
    dataset = build_extraction_dataset(store_of(tmp_path, own + shared))
    note = crossing_note(dataset.stats, dataset.options)
    assert 0 < dataset.stats.eval_examples < dataset.stats.split.removed_examples
    assert note is not None
    assert note.startswith(f"{dataset.stats.split.removed_examples} of ")
    assert "--split-by group" in note
    by_group = build_extraction_dataset(store_of(tmp_path, own + shared), split_by="group")
    assert crossing_note(by_group.stats, by_group.options) is None


def test_dates_may_be_given_as_dates(tmp_path: Path) -> None:
    rows = [decision(i, state=state(i)) for i in range(10)]
    by_date = build_extraction_dataset(store_of(tmp_path, rows), start_date=date(2024, 1, 1))
    assert by_date.options.start_date == "2024-01-01"
    assert BuildOptions(max_examples=cast("int", 100.0)).max_examples == 100


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_split": 0.0}, r"eval_split must be a number in \(0, 1\), got 0.0"),
        ({"eval_split": 1.5}, r"eval_split must be a number in \(0, 1\), got 1.5"),
        ({"eval_split": "0.2"}, "eval_split must be a number"),
        ({"max_examples": 1}, "max_examples must be a whole number >= 2, got 1"),
        ({"max_examples": 10.5}, "max_examples must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": 1, "split_by": "time"}, "seed has no effect"),
        ({"missing_confidence": "keep"}, "missing_confidence has no effect without"),
        ({"entry_types": "tool"}, 'entry_types must be a list, each text, got "tool"'),
        ({"start_date": 5}, "start_date must be text, got 5"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"split_by": "row"}, 'split_by must be one of session, group, time, got "row"'),
        (
            {"remove_crossing": "all"},
            'remove_crossing must be one of both, prompt, none, got "all"',
        ),
        ({"min_confidence": 1.1}, r"min_confidence must be a number in \[0, 1\], got 1.1"),
        ({"start_date": "2024-02-01", "end_date": "2024-01-01"}, "is after end"),
        ({"start_date": "yesterday"}, "ISO 8601"),
    ],
)
def test_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"state": state(1) | {"memoryState": {}}},
            "decision 'd000': state: .*totalEntries is missing",
        ),
        ({"action": {"decision": "destroy"}}, "decision 'd000': action: decision must be one of"),
        ({"reward": None, "outcome": {"missedCount": -1}}, "decision 'd000': outcome: "),
    ],
)
def test_bad_record_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = store_of(tmp_path, [decision(0, **changes), decision(1)])
    with pytest.raises(InputError, match=message):
        build_extraction_dataset(source)


def test_empty_selection_names_the_filter(tmp_path: Path) -> None:
    source = store_of(tmp_path, map(decision, range(4)))
    with pytest.raises(InputError, match="no decisions of the policy 'retrieval'"):
        build_retrieval_dataset(source)
    with pytest.raises(InputError, match=r"of 4 .* the filter min_confidence refused the last 4"):
        build_extraction_dataset(source, min_confidence=0.9)


def test_given_store_stays_open(tmp_path: Path) -> None:
    with open_store(store_of(tmp_path, map(decision, range(10)))) as store:
        build_extraction_dataset(store)
        assert store.count() == 10


# --- files ---------------------------------------------------------------------------------------


def test_too_few_pairs_give_both_counts_and_write_nothing(tmp_path: Path) -> None:
    built = build_extraction_dataset(store_of(tmp_path, map(decision, range(10))))
    with pytest.raises(
        InputError, match=r"Insufficient training pairs: 0 formed, 0 of them unique \(minimum 100"
    ):
        write_dataset(built, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pairs_file_holds_the_three_texts_alone(tmp_path: Path) -> None:
    decisions = simulate("retrieval", 300, 0, situations=10)
    built = build_retrieval_dataset(store_of(tmp_path, decisions), split_by="group")
    written = write_dataset(built, tmp_path / "out", min_pairs=1)
    lines = (tmp_path / "out/retrieval_dpo_train.jsonl").read_text("utf-8").splitlines()
    assert {tuple(json.loads(line)) for line in lines} == {("prompt", "chosen", "rejected")}
    assert (
        len(lines)
        == written.train.unique
        == len(read_pairs(tmp_path / "out/retrieval_dpo_train.jsonl"))
    )
    evidence = (tmp_path / "out/retrieval_evidence_train.jsonl").read_text("utf-8").splitlines()
    assert len(evidence) == len(lines)


def test_created_at_comes_from_the_data_or_the_caller(tmp_path: Path) -> None:
    decisions = list(simulate("retrieval", 300, 0, situations=10))
    built = build_retrieval_dataset(store_of(tmp_path, decisions), split_by="group")
    for name, created_at, expected in (
        ("a", None, built.stats.date_range.end),
        ("b", "2030-01-01", "2030-01-01T00:00:00.000000Z"),
    ):
        write_dataset(built, tmp_path / name, min_pairs=1, created_at=created_at)
        metadata = json.loads((tmp_path / name / "retrieval_metadata.json").read_text("utf-8"))
        assert metadata["createdAt"] == expected
        assert metadata["trainPairs"] > metadata["evalPairs"] > 0
        assert metadata["config"]["splitBy"] == "group"
        assert metadata["dataset"]["trainExamples"] == built.stats.train_examples


def test_simulated_examples_are_called_so(tmp_path: Path) -> None:
    simulated = build_retrieval_dataset(
        store_of(tmp_path, simulate("retrieval", 300, 0, situations=10)), split_by="group"
    )
    assert simulated.stats.simulated_examples == simulated.stats.total_examples == 300
    write_dataset(simulated, tmp_path / "out", min_pairs=1)
    assert "300 of 300 examples were simulated" in (tmp_path / "out/README.md").read_text("utf-8")


def test_folder_without_metadata_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"expected a data set with one <policy>_metadata.json, found 0"
    ):
        load_dataset(tmp_path)
    (tmp_path / "x_metadata.json").write_text('{"policy": "chess"}', "utf-8")
    with pytest.raises(
        InputError, match="expected an object with the policy of its name, got 'chess'"
    ):
        load_dataset(tmp_path)
