"""The examples of data/kinds/README.md run, and the kind of one's own in it is a full one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpo.data.builder import build_dataset
from dpo.data.dataset_files import write_dataset
from dpo.data.export import export_pairs
from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.kinds.base import EntryType
from dpo.data.kinds.extraction import PRIORITIES
from dpo.data.kinds.retrieval import MAX_RESULTS
from dpo.data.pairs import form_pairs
from dpo.data.records import decision_from_json
from dpo.errors import InputError
from tests.pages import blocks

README = Path(__file__).parents[2] / "data" / "kinds" / "README.md"
BLOCKS = [block.text for block in blocks("python", "data/kinds/README.md")]
RECORDS = [block.text for block in blocks("json", "data/kinds/README.md")]


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, README.name, "exec"), names)
    return names


@pytest.fixture
def chat() -> PolicyKind:
    kind: PolicyKind = run(next(block for block in BLOCKS if "ChatKind" in block))["CHAT"]
    return kind


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(block)

    printed = [float(line) for line in capsys.readouterr().out.split()]
    assert printed == sorted(printed, reverse=True)  # the best policy before the rules


def test_the_table_tells_the_actions_of_each_kind() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (.*?) \|", README.read_text("utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == list(KINDS)
    told = {name: [int(number) for number in re.findall(r"\d+", text)] for name, text in rows}
    priorities: tuple[EntryType, ...] = ("tool", "guideline", "project", "knowledge")
    assert PRIORITIES["knowledge"] == PRIORITIES["experience"]
    assert told["extraction"] == [number for name in priorities for number in PRIORITIES[name]]
    assert told["retrieval"] == [number for numbers in MAX_RESULTS.values() for number in numbers]


def test_a_stored_decision_of_an_own_kind_becomes_prompt_response_and_reward(
    chat: PolicyKind,
) -> None:
    decision = decision_from_json(json.loads(RECORDS[0]), "README")

    state = chat.parse_state(decision.state, "state")
    action = chat.parse_action(decision.action, "action")

    assert decision.policy == chat.name
    assert decision.outcome is not None
    assert chat.render_prompt(state) == "What is DPO?"
    assert chat.parse_response(chat.render_action(action)) == action
    assert chat.action_class(action) == "answered"
    assert chat.action_class(chat.baseline(state).action) == "refused"
    assert chat.reward(decision.outcome, action).value == 1
    assert chat.group_key(state) == ("what", "is", "dpo?")


def test_thumbs_become_preference_pairs(chat: PolicyKind, tmp_path: Path) -> None:
    record = json.loads(RECORDS[0])
    rows = [
        {
            **record,
            "id": f"d-{number}-{thumb}",
            "session_id": f"s-{number}",
            "state": {"question": f"What is {number}?"},
            "action": {"text": f"{thumb} {number}"},
            "outcome": {"thumb": thumb},
        }
        for number in range(10)
        for thumb in ("up", "down")
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    dataset = build_dataset(path, chat)
    formed = form_pairs(dataset.train, chat)

    write_dataset(dataset, tmp_path / "dataset", min_pairs=1)
    for format_name in ("huggingface", "chat"):
        out = tmp_path / format_name
        export_pairs(tmp_path / "dataset", out, format_name=format_name, kind=chat)
        assert len((out / "train.jsonl").read_text("utf-8").splitlines()) == 8
    with pytest.raises(InputError, match="a data set of 'chat', not of"):
        export_pairs(tmp_path / "dataset", tmp_path / "no", format_name="chat")

    assert len(formed.pairs) == 8
    assert all(
        (pair.chosen, pair.rejected) == (f"up {number}", f"down {number}")
        for pair in formed.pairs
        for number in re.findall(r"\d", str(pair.prompt))
    )


def test_an_own_kind_refuses_bad_input_by_name(chat: PolicyKind) -> None:
    with pytest.raises(InputError, match="row 1: question must be text, got 3"):
        chat.parse_state({"question": 3}, "row 1")
    with pytest.raises(InputError, match="thumb must be one of up, down, got"):
        chat.reward({"thumb": "sideways"}, chat.parse_response("So."))
