"""The chaos program finds nothing lost; and would find it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHAOS = Path(__file__).with_name("chaos.py")


def run_chaos(faults: int, seed: int, *, before: str = "", more: str = "") -> dict[str, Any]:
    """Run the program, after some code of our own, and return what it tells."""
    start = "import sys, runpy; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{before}\n{start}",
            CHAOS,
            "--faults",
            str(faults),
            "--seed",
            str(seed),
            f"--more={more}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert bool(told["lost"]) == bool(done.returncode)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--save-in-background"])
def test_nothing_is_lost_to_faults_at_random(more: str) -> None:
    told = run_chaos(60, seed=0, more=more)
    assert told["lost"] == []
    assert told["faults"] >= 60
    assert min(told["places"].values()) > 0


@pytest.mark.slow
def test_defect_is_found() -> None:
    """A run that lets damaged checkpoints pass goes on with a flipped bit, or cannot load it."""
    unchecked = "import dpo.checkpoint; dpo.checkpoint.verify_manifest = lambda folder: []"
    assert run_chaos(200, seed=0, before=unchecked)["lost"]
