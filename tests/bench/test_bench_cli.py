"""``dpo bench`` and ``dpo bench compare``, as they are typed."""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from dpo import cli
from tests.bench.rows import row


def bench(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.main, ["bench", *arguments])
    assert "Traceback" not in result.output
    return result


def write(path: Path, *rows: object) -> str:
    path.write_text(json.dumps({"format": 2, "commit": None, "rows": rows}))
    return str(path)


def test_a_scenario_is_measured_shown_kept_and_drawn(tmp_path: Path) -> None:
    out, picture = tmp_path / "result.json", tmp_path / "result.svg"
    files = ("--out", str(out), "--plot", str(picture))
    result = bench("--scenario", "tiny-chat", "--steps", "1", "--device", "cpu", *files)
    assert result.exit_code == 0, result.output
    assert "| tiny-chat" in result.stdout
    assert "tiny-chat: " in result.stderr  # how long it took
    (kept,) = json.loads(out.read_text())["rows"]
    assert kept["settings"]["batch_size"] == 8
    assert kept["mfu"] > 0
    assert bench("compare", str(out), str(out)).exit_code == 0
    assert "tiny-chat" in texts(picture)


def texts(picture: Path) -> list[str]:
    root = ElementTree.parse(picture).getroot()
    return [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *cases: str) -> None:
    """Let a shell script with these cases of a scenario's name measure in place of Python."""
    script, lines = folder / "python", "\n".join(cases)
    script.write_text(f"#!/bin/sh\ncase $3 in\n{lines}\n*) cat {folder}/row-$3.json ;;\nesac\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_what_the_memory_does_not_hold_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "row-5m-chat.json").write_text(json.dumps(row("5m-chat")))
    lacks = "tiny-chat) echo 'CUDA out of memory' >&2; exit 3 ;;"
    stand_in(tmp_path, monkeypatch, lacks, "5m-agent) kill -9 $$ ;;")
    result = bench("--suite", "quick", "--out", str(tmp_path / "result.json"))
    assert result.exit_code == 0, result.output
    assert "tiny-chat: left out: CUDA out of memory\n" in result.stderr
    assert "5m-agent: left out: it was killed, as a system does" in result.stderr
    kept = json.loads((tmp_path / "result.json").read_text())
    assert [each["scenario"] for each in kept["rows"]] == ["5m-chat"]
    assert set(kept["left_out"]) == {"tiny-chat", "5m-agent"}


def test_what_was_measured_before_a_failure_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "row-tiny-chat.json").write_text(json.dumps(row("tiny-chat")))
    stand_in(tmp_path, monkeypatch, "5m-chat) exit 1 ;;")
    out = tmp_path / "result.json"
    result = bench("--suite", "quick", "--out", str(out))
    assert result.exit_code == 1
    assert "5m-chat ended with exit code 1: it said nothing" in result.output
    assert [each["scenario"] for each in json.loads(out.read_text())["rows"]] == ["tiny-chat"]


def test_time_limit_ends_a_scenario_and_leaves_out_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "tiny-chat) exec sleep 60 ;;")
    result = bench("--suite", "quick", "--minutes", "0.005")
    assert result.exit_code == 1
    for name in ("tiny-chat", "5m-chat", "5m-agent"):
        assert f"{name}: left out: the time was up\n" in result.output
    assert "nothing could be measured" in result.output


def test_notes_of_the_trainer_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = row("5m-chat", notes=["step 1: the memory is full: going on in smaller micro-batches"])
    (tmp_path / "row-5m-chat.json").write_text(json.dumps(noted))
    stand_in(tmp_path, monkeypatch)
    result = bench("--scenario", "5m-chat")
    assert "5m-chat: step 1: the memory is full" in result.stdout


def test_results_are_drawn_with_every_scenario(tmp_path: Path) -> None:
    file = write(tmp_path / "result.json", row("5m-chat"), row("a <new> one", seconds=4.0))
    picture = tmp_path / "result.svg"
    assert bench("plot", file, str(picture)).exit_code == 0
    assert {"5m-chat", "a <new> one", "2.1 s", "4.2 s", "50%", "3,000 MiB"} <= set(texts(picture))


@pytest.mark.parametrize(
    ("seconds", "word", "exit_code"),
    [(2.1, "no change", 0), (2.4, "SLOWER", 1), (1.6, "faster", 0)],
)
def test_a_change_counts_beyond_the_spread_of_the_steps(
    tmp_path: Path, seconds: float, word: str, exit_code: int
) -> None:
    old = write(tmp_path / "old.json", row())
    new = write(tmp_path / "new.json", row(seconds=seconds))
    result = bench("compare", old, new)
    time, memory, *_ = result.output.splitlines()
    assert time.endswith(word)
    assert memory.endswith("no change")
    assert result.exit_code == exit_code


@pytest.mark.parametrize(
    ("factor", "word", "exit_code"),
    [(1.01, "no change", 0), (1.03, "LARGER", 1), (0.97, "smaller", 0)],
)
def test_memory_counts_too(tmp_path: Path, factor: float, word: str, exit_code: int) -> None:
    old = write(tmp_path / "old.json", row())
    new = write(tmp_path / "new.json", row(peak_mib=factor * row()["peak_mib"]))
    result = bench("compare", old, new)
    assert result.output.splitlines()[1].endswith(word)
    assert result.exit_code == exit_code
    assert ("worse beyond noise: 135m-chat (memory)" in result.output) == (exit_code == 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "70b-chat"], "no scenario '70b-chat'; there are tiny-chat, "),
        (["--scenario", "5m-chat", "--suite", "cpu"], "--suite and --scenario: give one, not both"),
        (["--suite", "all"], "'all' is not one of"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--minutes", "0"], "0.0 is not in the range x>0"),
        (["plot", "absent.json", "out.svg"], "absent.json: no such file"),
        (["compare", "absent.json", "absent.json"], "absent.json: no such file"),
    ],
)
def test_wrong_input_is_refused(arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ([row(scenario="1b-chat")], "no scenario in common"),
        ([row(device="another CPU")], "times of two machines say nothing of the code"),
        ([{"scenario": "135m-chat"}], "row 1 is no measurement of dpo bench: missing device"),
        ([], "expected a result of dpo bench --out"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, new: list[dict[str, Any]], message: str
) -> None:
    result = bench(
        "compare", write(tmp_path / "old.json", row()), write(tmp_path / "new.json", *new)
    )
    assert result.exit_code == 2
    assert message in result.output


def test_a_scenario_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = bench("--scenario", "5m-chat", "--device", "cuda")
    assert result.exit_code == 1
    assert "5m-chat ended with exit code 1: " in result.output
    assert "torch sees no GPU" in result.output
