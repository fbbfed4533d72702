"""The two commands with which the README begins, one of which the check runs."""

import re

from tests.pages import ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [block.text.removesuffix("\n") for block in blocks("sh", "README.md")]


def test_the_first_two_commands_are_one_line_each_and_need_only_python_and_git() -> None:
    make = "python3 -m venv .venv && .venv/bin/pip install "
    assert COMMANDS[0] == f"{make}. && .venv/bin/dpo demo"
    assert COMMANDS[1] == f"{make}-e '.[test]' && .venv/bin/python -m pytest -n auto"


def test_check_runs_the_second_command_as_it_stands() -> None:
    """The pattern by which ``.ci/run`` finds the line in the README finds just that line."""
    check = (ROOT / ".ci/run").read_text(encoding="utf-8")
    found = re.search(r"test_command=\$\(grep -m 1 '(.*)' README\.md\)", check)
    assert found is not None
    assert re.findall(found[1], README, flags=re.MULTILINE) == [COMMANDS[1]]
    assert 'bash -c "$test_command"' in check
