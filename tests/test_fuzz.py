"""A share of the fuzzing program's inputs: nothing escapes or hangs, and it would be seen."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")
START = "import sys, runpy; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


def run_fuzz(*arguments: str, before: str = "") -> dict[str, Any]:
    """Run the program, after some code of our own, and return what it tells."""
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{START}", FUZZ, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert bool(told["escaped"]) == bool(done.returncode), told
    return told


@pytest.mark.parametrize("inputs", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_every_reader_reads_or_refuses_whatever_it_is_given(inputs: int) -> None:
    told = run_fuzz("--inputs", str(inputs), "--seed", str(inputs))
    assert told["inputs"] >= 0.9 * inputs
    assert [tally["escaped"] for tally in told["readers"].values() if tally["escaped"]] == []
    assert all(tally["refused"] + tally["read"] > 0 for tally in told["readers"].values())


@pytest.mark.slow
def test_what_escapes_is_seen() -> None:
    """A reader of metrics that answers for no damage but that of lines cut short."""
    defect = "import dpo.run_folder as folder, json; folder.OTHER_SHAPE = json.JSONDecodeError"
    told = run_fuzz("--reader", "metrics.jsonl", "--inputs", "300", before=defect)
    assert told["escaped"]
