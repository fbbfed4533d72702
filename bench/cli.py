"""``dpo bench``: how fast training is on this machine, and whether it has become slower."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import click

from dpo.bench.comparing import changes
from dpo.bench.machine import commit
from dpo.bench.plot import plot
from dpo.bench.results import (
    FORMAT,
    LACK_OF_MEMORY,
    Measurement,
    read_results,
    scaling_table,
    table,
)
from dpo.bench.scenarios import FAMILIES, MINUTES, SCENARIOS, SUITES
from dpo.errors import InputError, RunError
from dpo.files import atomic_write, write_json
from dpo.progress import Console
from dpo.train_config import Device

START_SECONDS: Final = 10.0  # of a process, before it begins with its scenario


@click.group("bench", invoke_without_command=True)
@click.option(
    "--suite",
    type=click.Choice(list(SUITES)),
    help="Which scenarios.  [default: gpu where there is one, else cpu]",
)
@click.option(
    "--scenario", "names", multiple=True, metavar="NAME", help="One scenario; may be repeated."
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Timed, at most."
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Of all together: takes fewer steps where they would take longer, and leaves out what "
    "does not fit.  [default: 7.5 for the suite gpu, else no limit]",
)
@click.option("--device", type=click.Choice(get_args(Device)), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1, max=1024), help="CPU threads.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write all of it as JSON.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Also draw it, as SVG.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def bench(
    context: click.Context,
    suite: str | None,
    names: tuple[str, ...],
    steps: int,
    minutes: float | None,
    device: str,
    threads: int | None,
    out: Path | None,
    picture: Path | None,
    quiet: bool,
) -> None:
    """Time optimizer steps of real model shapes on this machine.

    Weights and tokens are random, so nothing is downloaded. MFU is the arithmetic that a step
    cannot do without, by its time and the best rate of plain matrix products in the same process.
    """
    if context.invoked_subcommand is not None:
        return
    suite = suite or _suite_of_machine(names)
    minutes = minutes or MINUTES.get(suite or "")
    flags = ["--steps", str(steps), "--device", device]
    flags += [] if threads is None else ["--threads", str(threads)]
    result: dict[str, Any] = {"format": FORMAT, "commit": commit()}
    result |= {"load_before": os.getloadavg()[0], "flags": flags, "minutes": minutes}
    result |= {"rows": [], "left_out": {}}
    for name, outcome in _outcomes(_chosen(suite, names), flags, minutes, Console(quiet=quiet)):
        if isinstance(outcome, _LeftOut):
            result["left_out"][name] = outcome.reason
        else:
            result["rows"].append(outcome)
        if out is not None:  # after each, so that what is measured is kept whatever comes
            write_json(out, result)
    rows = [Measurement.parse(row, "a measurement") for row in result["rows"]]
    for name, reason in result["left_out"].items():
        click.echo(f"{name}: left out: {reason}", err=True)
    if not rows:
        raise RunError("nothing could be measured")
    _show(rows)
    if picture is not None:
        _draw(rows, picture)


@dataclass(frozen=True)
class _LeftOut:
    """A scenario that was not measured, and why."""

    reason: str


def _outcomes(
    names: Sequence[str], flags: Sequence[str], minutes: float | None, console: Console
) -> Iterator[tuple[str, Mapping[str, Any] | _LeftOut]]:
    """Measure scenarios one after the other, each in its share of the time that is left."""
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with console.bar("bench", len(names), unit="scenarios") as bar:
        for done, name in enumerate(names):
            bar.update(done, status=name)
            started = time.monotonic()
            yield name, _run(name, flags, left=end - started, scenarios_left=len(names) - done)
            console.say(f"{name}: {time.monotonic() - started:.0f} s")
        bar.update(len(names))


def _run(
    name: str, flags: Sequence[str], *, left: float, scenarios_left: int
) -> Mapping[str, Any] | _LeftOut:
    """Measure one scenario in a process of its own, in at most ``left`` seconds."""
    command = [sys.executable, "-m", "dpo.bench.training", name, *flags]
    limit = None if math.isinf(left) else max(left, 0.0)
    if limit is not None:
        command += ["--seconds", str(max(limit / scenarios_left - START_SECONDS, 0.0))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return _LeftOut("the time was up")
    if done.returncode == -signal.SIGKILL:
        return _LeftOut("it was killed, as a system does whose memory is full")
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == LACK_OF_MEMORY:
        return _LeftOut(last)
    if done.returncode:
        raise RunError(f"{name} ended with exit code {done.returncode}: {last}")
    measured = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(measured, dict)
    return measured


def _show(rows: Sequence[Measurement]) -> None:
    """Print the tables, and what the trainers said."""
    click.echo(table(rows))
    if scaling := scaling_table({row.scenario: row for row in rows}, FAMILIES.values()):
        click.echo(f"\n{scaling}")
    for row in rows:
        for note in row.notes:
            click.echo(f"{row.scenario}: {note}")


def _draw(rows: Sequence[Measurement], path: Path) -> None:
    first = rows[0]
    title = f"dpo bench: {first.device}, threads: {first.threads}, torch {first.torch}"
    atomic_write(path, plot(rows, title=title))


def _suite_of_machine(names: Sequence[str]) -> str | None:
    """Return the suite of a call that names none; none if it names scenarios."""
    if names:
        return None
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _chosen(suite: str | None, names: Sequence[str]) -> Sequence[str]:
    if suite is not None and names:
        raise InputError("--suite and --scenario: give one, not both")
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise InputError(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    return names if suite is None else SUITES[suite]


@bench.command("plot")
@click.argument("result", type=click.Path(path_type=Path))
@click.argument("picture", type=click.Path(path_type=Path))
def plot_result(result: Path, picture: Path) -> None:
    """Draw a file of --out as a picture, SVG."""
    _draw(list(read_results(result).values()), picture)


@bench.command("compare")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
def compare(old: Path, new: Path) -> None:
    """Compare two files of --out; exit code 1 if time or memory has grown beyond noise.

    Noise of time is the spread of the steps on both sides. Times move with the machine: compare
    files of one machine, made one after the other.
    """
    found = changes(read_results(old), read_results(new))
    click.echo("\n".join(change.line for change in found))
    worse = [f"{change.scenario} ({change.quantity})" for change in found if change.is_regression]
    if worse:
        raise RunError(f"worse beyond noise: {', '.join(worse)}")
