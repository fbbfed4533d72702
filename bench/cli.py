"""``dpo bench``: how fast training is on this machine, and whether it has become slower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click

from dpo.bench.comparing import changes
from dpo.bench.machine import commit
from dpo.bench.results import FORMAT, Measurement, read_results, table
from dpo.bench.scenarios import SCENARIOS, SUITES
from dpo.errors import InputError, RunError
from dpo.files import JSON, write_json
from dpo.progress import Console
from dpo.train_config import Device


@click.group("bench", invoke_without_command=True)
@click.option(
    "--suite",
    type=click.Choice(list(SUITES)),
    help="Which scenarios.  [default: gpu where there is one, else cpu]",
)
@click.option(
    "--scenario", "names", multiple=True, metavar="NAME", help="One scenario; may be repeated."
)
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Timed.")
@click.option("--device", type=click.Choice(get_args(Device)), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1, max=1024), help="CPU threads.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write all of it as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def bench(
    context: click.Context,
    suite: str | None,
    names: tuple[str, ...],
    steps: int,
    device: str,
    threads: int | None,
    out: Path | None,
    quiet: bool,
) -> None:
    """Time optimizer steps of real model shapes on this machine.

    Weights and tokens are random, so nothing is downloaded. MFU is the arithmetic that a step
    cannot do without, by its time and the best rate of plain matrix products in the same process.
    """
    if context.invoked_subcommand is not None:
        return
    chosen = _chosen(suite, names)
    flags = ["--steps", str(steps), "--device", device]
    flags += [] if threads is None else ["--threads", str(threads)]
    load, rows = os.getloadavg()[0], []
    with Console(quiet=quiet).bar("bench", len(chosen), unit="scenarios") as bar:
        for done, name in enumerate(chosen, start=1):
            rows.append(_run(name, flags))
            bar.update(done, status=name)
    result: dict[str, JSON] = {
        "format": FORMAT,
        "commit": commit(),
        "load_before": load,
        "rows": rows,
    }
    if out is not None:
        write_json(out, result)
    click.echo(table([Measurement.parse(row, "a measurement") for row in rows]))


def _chosen(suite: str | None, names: Sequence[str]) -> Sequence[str]:
    if suite is not None and names:
        raise InputError("--suite and --scenario: give one, not both")
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise InputError(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    if names:
        return names
    if suite is None:
        import torch

        suite = "gpu" if torch.cuda.is_available() else "cpu"
    return SUITES[suite]


def _run(name: str, flags: Sequence[str]) -> dict[str, Any]:
    """Measure one scenario in a process of its own."""
    command = [sys.executable, "-m", "dpo.bench.training", name, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{name} ended with exit code {done.returncode}: {last}")
    measured = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(measured, dict)
    return measured


@bench.command("compare")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
def compare(old: Path, new: Path) -> None:
    """Compare two files of --out; exit code 1 if a scenario has become slower beyond noise.

    Noise is the spread of the steps on both sides. Times move with the machine: compare files of
    one machine, made one after the other.
    """
    found = changes(read_results(old), read_results(new))
    click.echo("\n".join(change.line for change in found))
    slower = [change.scenario for change in found if change.is_regression]
    if slower:
        raise RunError(f"slower beyond noise: {', '.join(slower)}")
