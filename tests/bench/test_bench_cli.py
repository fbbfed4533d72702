"""``dpo bench`` and ``dpo bench compare``, as they are typed."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dpo import cli


def bench(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.main, ["bench", *arguments])
    assert "Traceback" not in result.output
    return result


def row(scenario: str = "135m-chat", seconds: float = 2.0, **changes: Any) -> dict[str, Any]:
    return {
        "scenario": scenario,
        "device": "a CPU",
        "threads": 2,
        "torch": "2.13.0",
        "settings": {},
        "step_seconds": [seconds, seconds * 1.05, seconds * 1.1],
        "pairs_per_s": 4.0,
        "useful_tokens_per_s": 800.0,
        "useful_share": 1.0,
        "useful_flops": 1e12,
        "matrix_flops_per_s": 1e12,
        "mfu": 0.5,
        "peak_mib": 3000.0,
        "state_mib": 2000.0,
        "reference_tokens_per_s": 1600.0,
        "split": {"data": 0.0, "forward": 1.0, "backward": 2.0, "optimizer": 0.1},
    } | changes


def write(path: Path, *rows: object) -> str:
    path.write_text(json.dumps({"format": 1, "commit": None, "rows": rows}))
    return str(path)


def test_a_scenario_is_measured_shown_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = bench("--scenario", "5m-chat", "--steps", "1", "--device", "cpu", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "| 5m-chat" in result.stdout
    (kept,) = json.loads(out.read_text())["rows"]
    assert kept["settings"]["batch_size"] == 8
    assert kept["mfu"] > 0
    assert bench("compare", str(out), str(out)).exit_code == 0


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
    assert word in result.output
    assert result.exit_code == exit_code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "70b-chat"], "no scenario '70b-chat'; there are 5m-chat, "),
        (["--scenario", "5m-chat", "--suite", "cpu"], "--suite and --scenario: give one, not both"),
        (["--suite", "all"], "'all' is not one of"),
        (["--steps", "0"], "0 is not in the range x>=1"),
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
