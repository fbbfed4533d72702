"""The page of capabilities: every yes has a test that there is."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "dpo/CAPABILITIES.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| capability", "| ---"))
]
TESTS = sorted({test for row in ROWS for test in re.findall(r"`([\w/]+\.py::\w+)`", row[4])})
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket"}
TRACKERS = {"mlflow", "tensorboard", "wandb"}  # which are asked for by name


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("test", TESTS)
def test_named_test_is_there(test: str) -> None:
    file, _, function = test.partition("::")
    assert function in functions_of(ROOT / "tests" / file)


def test_every_yes_names_its_test_and_every_no_its_reason() -> None:
    for capability, mark, _trl, _others, by in ROWS:
        assert by.strip(" |"), capability
        assert mark == "N" or "::" in by, capability


def test_marks_are_counted() -> None:
    marks = [row[1] for row in ROWS]
    counts = {mark: marks.count(mark) for mark in "Y~N"}
    assert f"Here: {counts['Y']} Y, {counts['~']} ~, {counts['N']} N" in " ".join(PAGE.split())
    assert len(marks) == 150


def test_there_are_no_more_than_eight_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(project["dependencies"]) <= 8


def test_one_module_alone_reaches_a_network() -> None:
    """Of the engine, the data and the evaluator: what the Hub has is fetched when it is named."""
    reaching, tracking = set(), set()
    for folder in ("dpo", "data", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names = [node.module]
                tops = {name.partition(".")[0] for name in names}
                if tops & NETWORK:
                    reaching.add(path.relative_to(ROOT).as_posix())
                if tops & TRACKERS:
                    tracking.add(path.relative_to(ROOT).as_posix())
    assert reaching == {"dpo/hub.py", "dpo/files.py"}  # the latter for the name of the host
    assert tracking == {"dpo/tracking.py"}
