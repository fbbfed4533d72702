"""Examples to evaluate on: every accepted form, and every refusal."""

import gzip
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dpo.data.examples import Example, ExampleMetadata
from dpo.data.kinds import KINDS
from dpo.data.simulate import simulate
from dpo.data.stores import open_store
from dpo.errors import InputError
from dpo.eval.examples import EvaluationExample, as_examples, read_examples

EXTRACTION = KINDS["extraction"]


def _row(**changes: Any) -> dict[str, Any]:
    decision = next(simulate("extraction", 1, 0))
    row: dict[str, Any] = {
        "state": decision.state,
        "action": decision.action,
        "reward": 0.5,
        "metadata": {
            "id": "d1",
            "sessionId": "s1",
            "decidedAt": "2024-05-01T09:30:00Z",
            "confidence": 0.8,
            "propensity": 0.25,
        },
    }
    return row | changes


def _write(path: Path, rows: list[Any]) -> Path:
    """Write rows; those that all have the id of `_row` get ids of their own: d1, d2, ..."""
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict) and row.get("metadata", {}).get("id") == "d1":
            rows[number - 1] = row | {"metadata": row["metadata"] | {"id": f"d{number}"}}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SKIP: dict[str, Any] = {"decision": "skip"}
STORE: dict[str, Any] = {"decision": "store", "entryType": "tool", "priority": 50}


def test_a_file_of_examples_is_read_with_its_kind(tmp_path: Path) -> None:
    path = _write(tmp_path / "e.jsonl", [_row(action=SKIP), _row(action=STORE)])
    found = read_examples(path)
    assert found.kind is EXTRACTION
    first = found.examples[0]
    assert EXTRACTION.action_to_json(first.expected_action) == SKIP
    assert (first.reward, first.id, first.session_id, first.propensity) == (0.5, "d1", "s1", 0.25)
    assert first.decided_at == datetime(2024, 5, 1, 9, 30, tzinfo=UTC)


def test_examples_of_the_builder_are_taken_as_they_are() -> None:
    state = EXTRACTION.parse_state(_row()["state"], "state")
    action = EXTRACTION.parse_action(STORE, "action")
    time = datetime(2024, 5, 1, tzinfo=UTC)
    example = Example(state, action, -0.5, ExampleMetadata("d", "s", time, 0.9, 0.1))
    assert as_examples([example], EXTRACTION) == [
        EvaluationExample(state, action, -0.5, "d", "s", time, 0.1)
    ]


def test_decisions_of_a_store_are_taken() -> None:
    decision = next(simulate("extraction", 1, 0))
    (example,) = as_examples([decision], EXTRACTION)
    assert EXTRACTION.state_to_json(example.state) == decision.state
    assert EXTRACTION.action_to_json(example.expected_action) == decision.action
    assert (example.reward, example.propensity) == (decision.reward, decision.propensity)


def test_lines_of_a_feedback_log_keep_their_session_and_propensity(tmp_path: Path) -> None:
    with open_store(tmp_path / "log.jsonl", create=True) as store:
        decisions = list(simulate("extraction", 40, 0))
        store.record_decisions(decisions)
    read = read_examples(tmp_path / "log.jsonl").examples
    assert read == as_examples(decisions, EXTRACTION)


def test_a_decision_without_a_reward_is_refused() -> None:
    decision = replace(next(simulate("extraction", 1, 0)), reward=None)
    with pytest.raises(InputError, match=r"test_data\[0\]: decision .* has no reward yet"):
        as_examples([decision], EXTRACTION)


def test_states_that_another_kind_has_parsed_are_refused() -> None:
    examples = as_examples([_row()], EXTRACTION)
    with pytest.raises(InputError, match=r"not examples of retrieval: .*queryFeatures is missing"):
        as_examples(examples, KINDS["retrieval"])
    with pytest.raises(InputError, match="not examples of extraction"):
        as_examples([{"state": 3, "action": SKIP, "reward": 0.0}], EXTRACTION)


@pytest.mark.parametrize("name", ["expected_action", "expectedAction", "action"])
def test_the_documents_mappings_are_taken(name: str) -> None:
    row = _row()
    items = [{"state": row["state"], name: STORE, "reward": 1}]
    (example,) = as_examples(items, EXTRACTION)
    assert example.expected_action.decision == "store"
    assert (example.reward, example.id, example.session_id) == (1, "0", "example 0")


def test_mappings_without_a_session_are_independent() -> None:
    items = [{"state": _row()["state"], "action": SKIP, "reward": 0.0}] * 2
    assert len({each.session_id for each in as_examples(items, EXTRACTION)}) == 2


def test_empty_test_data_is_refused() -> None:
    with pytest.raises(InputError, match="test_data is empty"):
        as_examples([], EXTRACTION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": float("nan")}, r"reward must be a number in \[-1, 1\], got nan"),
        ({"reward": None}, r"reward must be a number in \[-1, 1\], got None"),
        ({"reward": 1.5}, r"reward must be a number in \[-1, 1\], got 1\.5"),
        ({"reward": True}, r"reward must be a number in \[-1, 1\], got True"),
        ({"metadata": {"propensity": 0}}, r"propensity must be a number in \(0, 1\], got 0"),
        ({"metadata": {"propensity": 1.2}}, r"propensity must be a number in \(0, 1\], got 1\.2"),
        ({"metadata": {"decidedAt": "soon"}}, "decidedAt must be an ISO 8601 time, got 'soon'"),
        ({"metadata": [1]}, r"metadata must be an object, got \[1\]"),
        ({"action": {"decision": "burn"}}, "action: decision must be one of store, skip, defer"),
        ({"state": {}}, "state: contextFeatures is missing"),
    ],
)
def test_a_row_that_is_no_example_is_refused_with_its_place(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"test_data\[1\].*{message}"):
        as_examples([_row(), _row(**changes)], EXTRACTION)


@pytest.mark.parametrize("name", ["state", "action", "reward"])
def test_a_missing_field_is_named(name: str) -> None:
    row = _row()
    del row[name]
    with pytest.raises(InputError, match=rf"not an example: missing (expected_)?{name}"):
        as_examples([row], EXTRACTION)


def test_an_object_of_another_type_is_refused() -> None:
    with pytest.raises(InputError, match=r"test_data\[0\]: expected an example or a .* got int"):
        as_examples([3], EXTRACTION)


def test_all_nan_rewards_are_refused_together(tmp_path: Path) -> None:
    rows = [_row(action=SKIP, reward=float("nan"))] * 7
    path = _write(tmp_path / "e.jsonl", rows)
    with pytest.raises(InputError) as caught:
        read_examples(path)
    text = str(caught.value)
    assert text.startswith("7 of 7 lines are no extraction examples:")
    assert f"{path}:1: reward must be a number in [-1, 1], got nan" in text
    assert text.endswith("and 2 more")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; expected examples, one JSON object a line"):
        read_examples(tmp_path / "none.jsonl")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no examples: there is nothing to evaluate on"):
        read_examples(_write(tmp_path / "e.jsonl", []))


def test_a_line_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text("{")
    with pytest.raises(InputError, match=r"e\.jsonl:1: malformed JSON"):
        read_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", b"\xff\xfe", r"e\.jsonl:1: not UTF-8"),
        ("e.db", b"SQLite format 3", "is a feedback store: dpo data build makes examples of it"),
        ("e.txt", b"{}", "unknown type of file"),
        ("e.jsonl.gz", b"{}", "damaged gzip file"),
    ],
)
def test_other_bytes_are_refused_by_name(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_examples(tmp_path / name)


def test_a_folder_is_refused_with_the_file_to_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder, expected a file of examples"):
        read_examples(tmp_path)
    (tmp_path / "extraction_examples_eval.jsonl").touch()
    with pytest.raises(InputError, match=r"is a folder: name .*extraction_examples_eval\.jsonl"):
        read_examples(tmp_path)


def test_gzip_and_separators_within_texts_are_read(tmp_path: Path) -> None:
    rows = [_row(action=SKIP, metadata={"id": "a\u2028b"}), _row(metadata={"id": "c"})]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert [each.id for each in read_examples(tmp_path / "e.jsonl.gz").examples] == [
        "a\u2028b",
        "c",
    ]


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "e.jsonl", [_row(action=SKIP, metadata={"id": "a"}), _row(metadata={"id": "a"})]
    )
    with pytest.raises(InputError, match=r"e\.jsonl:2: the id 'a' is already that of .*e\.jsonl:1"):
        read_examples(path)


def test_a_reward_of_many_digits_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "e.jsonl", [_row(action=SKIP, reward=10**400), _row()])
    with pytest.raises(InputError, match=r"e\.jsonl:1: reward must be a number in \[-1, 1\]"):
        read_examples(path)


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "e.jsonl", [_row(action=SKIP)] * 3)
    with pytest.raises(InputError, match="all 3 examples have the action class 'skip'"):
        read_examples(path)


def test_rows_of_no_kind_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "e.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    message = "expected an example with a state of one of the kinds extraction, retrieval, cons"
    with pytest.raises(InputError, match=message):
        read_examples(path)


def test_a_row_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = next(simulate("retrieval", 1, 0))
    row = {"state": other.state, "action": other.action, "reward": 0.0}
    path = _write(tmp_path / "e.jsonl", [_row(), row])
    with pytest.raises(InputError, match=r"1 of 2 lines are no extraction examples:\n.*e\.jsonl:2"):
        read_examples(path)
