"""The examples of eval/README.md run as they stand, in a folder that has what they name."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpo.cli import main

README = (Path(__file__).parents[2] / "eval" / "README.md").read_text(encoding="utf-8")
EVALUATING, TRAINING = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS, TRAINING_COMMANDS = (
    block.splitlines() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
)
PROMISES = [line for line in README.splitlines() if line.startswith("| ") and ".py::" in line]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with a small feedback store."""
    monkeypatch.chdir(tmp_path)
    _run("dpo data simulate extraction --out feedback.db --decisions 2000")
    return tmp_path


def _run(command: str) -> str:
    result = CliRunner().invoke(main, shlex.split(command, comments=True)[1:])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("folder")
def test_the_example_of_evaluating_runs(capsys: pytest.CaptureFixture[str]) -> None:
    _execute(EVALUATING)
    printed = capsys.readouterr().out
    assert printed.startswith("Policy Evaluation Report\n")
    assert re.search(r"^Winner: (A|B|tie)$", printed, re.MULTILINE)


@pytest.mark.slow
def test_the_example_of_training_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _execute(TRAINING)
    assert capsys.readouterr().out.startswith("Model saved to: trained/dpo/model\nAccuracy: 0.")
    assert (folder / "trained" / "dpo" / "report.html").is_file()


def _execute(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_commands_run(folder: Path) -> None:
    wanted = [each for each in COMMANDS if "MODEL" not in each and "scores" not in each]
    for command in wanted[1:4]:  # the store is simulated, smaller, by the fixture
        _run(command)
    assert (folder / "rules.html").is_file()


@pytest.mark.slow
def test_the_commands_of_training_run(folder: Path) -> None:
    commands = "\n".join(TRAINING_COMMANDS).replace("\\\n", "").splitlines()
    assert "--decisions 20000 --situations 2500" in commands[0]
    commands[0] = commands[0].replace("20000", "2000").replace("2500", "250")
    outputs = [_run(command) for command in commands]
    assert "model   policy/dpo/model" in outputs[2]
    assert "decides, held out" in outputs[2]
    assert "policy/sft/model" in outputs[3]
    assert (folder / "policy" / "dpo" / "report.html").is_file()


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_names_tests_that_exist(promise: str) -> None:
    module = ""
    for found, test in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", promise):
        module = found or module
        source = (Path(__file__).parent / module).read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source, test
