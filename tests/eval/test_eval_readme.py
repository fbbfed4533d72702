"""The examples of eval/README.md run as they stand, in a folder that has what they name."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpo.cli import main
from tests.pages import Block, blocks

README = (Path(__file__).parents[2] / "eval" / "README.md").read_text(encoding="utf-8")
EVALUATING, TRAINING = blocks("python", "eval/README.md")
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


def _execute(block: Block) -> None:
    exec(compile(block.text, str(block), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_names_tests_that_exist(promise: str) -> None:
    module = ""
    for found, test in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", promise):
        module = found or module
        source = (Path(__file__).parent / module).read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source, test
