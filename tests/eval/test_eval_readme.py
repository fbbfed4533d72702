"""The examples of eval/README.md run as they stand, in a folder that has what they name."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpo.cli import main

README = (Path(__file__).parents[2] / "eval" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].splitlines()


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


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("folder")
def test_an_example_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert printed.startswith("Policy Evaluation Report\n")
    assert re.search(r"^Winner: (A|B|tie)$", printed, re.MULTILINE)


def test_the_commands_run(folder: Path) -> None:
    wanted = [each for each in COMMANDS if "MODEL" not in each and "scores" not in each]
    for command in wanted[1:4]:  # the store is simulated, smaller, by the fixture
        _run(command)
    assert (folder / "rules.html").is_file()
