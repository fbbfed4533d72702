"""The table of promises in the package's README names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "data" / "README.md"
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def test_every_promise_names_tests_that_exist() -> None:
    _, table = README.read_text("utf-8").split("## What was promised")
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    promises = [row for row in rows if not row.endswith("| test |")]
    assert len(promises) > 40
    assert [row for row in promises if not TEST.search(row.split("|")[2])] == []
    missing = [
        f"{file}::{name}"
        for file, name in TEST.findall(table)
        if not (HERE / file).is_file()
        or not re.search(rf"^ *def {name}\(", (HERE / file).read_text("utf-8"), re.MULTILINE)
    ]
    assert missing == []
