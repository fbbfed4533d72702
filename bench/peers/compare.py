"""Measure training steps of this engine and of TRL side by side, in one interleaved run.

    python -m dpo.bench.peers.compare --peers PEERS/bin/python --out comparison.json
    python -m dpo.bench.peers.compare --peers PEERS/bin/python --model 135m --profile agent

Each contender runs in a process of its own; every repeat runs all of them, and every second one in
the opposite order. The first steps of a process warm up and are not counted. That all do the same
mathematics is checked by their losses. Variables of the environment reach all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dpo.bench.machine import ROOT, commit, cpu_model
from dpo.bench.peers.contenders import CONTENDERS, OURS, Contender
from dpo.bench.peers.record_trl_losses import PAIRS
from dpo.bench.peers.summary import Run, Work, check_losses, summarise, table
from dpo.bench.peers.work import check_profile, model_folder, write_pairs
from dpo.bench.scenarios import PROFILES, SHAPES
from dpo.errors import InputError, RunError
from dpo.files import write_json

TOLERANCE: Final = {"float32": 1e-3, "bf16-mixed": 0.05, "bfloat16": 0.05}  # of a loss


def schedule(names: Sequence[str], repeats: int) -> list[str]:
    """Order the runs: all contenders in each repeat, every second repeat backwards."""
    return [name for i in range(repeats) for name in (names if i % 2 == 0 else reversed(names))]


@dataclass(frozen=True)
class Files:
    """What every contender reads, and where compiled code is kept, apart from that of others."""

    model: Path
    data: Path
    compiled: Path


def run_all(options: argparse.Namespace, dtype: str, files: Files) -> dict[str, Any]:
    """Run every contender in one dtype and return the result, which is also what is kept.

    Raises:
        RunError: a process fails, or the losses differ.
    """
    runs: dict[str, list[Run]] = {name: [] for name in options.only}
    work: Work | None = None
    load = os.getloadavg()[0]
    for name in schedule(options.only, options.repeats):
        sys.stderr.write(f"{dtype}: {name}\n")
        command = _command(name, options, dtype, files)
        printed = run_contender(command, CONTENDERS[name], compiled=files.compiled)
        if work is None and "useful_tokens" in printed:
            work = Work(printed["pairs"], printed["useful_tokens"])
        runs[name].append(_parsed(printed))
    assert work is not None  # one of ours is always run
    summaries = {
        name: summarise(each, work, warm_up=options.warm_up) for name, each in runs.items()
    }
    check_losses(summaries, tolerance=TOLERANCE[dtype])
    return {
        "dtype": dtype,
        "table": table(summaries),
        "summaries": {name: asdict(summary) for name, summary in summaries.items()},
        "runs": {name: [asdict(run) for run in each] for name, each in runs.items()},
        "work": asdict(work),
        "load_before": load,
    }


def _parsed(printed: Mapping[str, Any]) -> Run:
    return Run(
        losses=printed["losses"],
        step_seconds=printed["step_seconds"],
        peak_mib=printed["peak_mib"],
        reference_seconds=printed["reference_seconds"],
        versions={key: printed[key] for key in ("torch", "trl") if key in printed},
    )


def _command(name: str, options: argparse.Namespace, dtype: str, files: Files) -> list[str]:
    ours = [sys.executable, "-m", "dpo.bench.step"]
    theirs = [options.peers, str(ROOT / "bench/peers/trl_steps.py")]
    settings = {
        "model": files.model,
        "data": files.data,
        "steps": options.steps,
        "batch-size": options.batch_size,
        "threads": options.threads,
        "device": options.device,
        "dtype": dtype,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    is_ours = name.startswith(OURS)
    if options.activation_checkpointing:
        words += ["--recompute", "layer"] if is_ours else ["--activation-checkpointing"]
    return [*(ours if is_ours else theirs), *words, *CONTENDERS[name].flags]


def run_contender(
    command: Sequence[str], contender: Contender, *, compiled: Path
) -> dict[str, Any]:
    """Run a command with the variables of a contender and return what it printed last.

    Raises:
        RunError: it fails.
    """
    threads = command[command.index("--threads") + 1]
    everybody = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    everybody["TORCHINDUCTOR_CACHE_DIR"] = str(compiled)
    environment = os.environ | everybody | dict(contender.environment)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RunError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    printed = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(printed, dict)
    return printed


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: a contender is unknown, none of ours is among them, a number is too small, a
            profile does not fit the model, or there is no such python or file.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True, help="python of the peers' environment")
    parser.add_argument("--model", help=f"{', '.join(SHAPES)}; a folder; if none: SmolLM2-135M")
    pairs = parser.add_mutually_exclusive_group()
    pairs.add_argument("--data", type=Path, default=PAIRS, help="16 pairs of HH if not given")
    pairs.add_argument("--profile", choices=list(PROFILES), help="random pairs of such lengths")
    parser.add_argument("--dtype", action="append", choices=list(TOLERANCE), dest="dtypes")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of each process")
    parser.add_argument("--warm-up", type=int, default=1, help="steps of these, not counted")
    parser.add_argument("--activation-checkpointing", action="store_true", help="for all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write all of it as JSON")
    options = parser.parse_args(words)
    if unknown := [name for name in options.only if name not in CONTENDERS]:
        raise InputError(f"--only: no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    if not any(name.startswith(OURS) for name in options.only):
        raise InputError("--only: one of ours must run, it counts the useful tokens")
    if not 1 <= options.warm_up < options.steps:
        raise InputError("--warm-up must be at least 1, and --steps more than that")
    if options.repeats < 1:
        raise InputError("--repeats must be at least 1")
    if shutil.which(options.peers) is None:
        raise InputError(f"--peers: no program {options.peers}: README.md says how to make one")
    check_profile(options.profile, options.model)
    if options.profile is None and not options.data.is_file():
        raise InputError(f"--data: no file {options.data}")
    options.data = None if options.profile else options.data.resolve()
    return options


def main() -> None:
    """Compare and print; what is wrong is told in a line."""
    try:
        _compare(parse())
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except RunError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


def _compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), options.data
        if options.profile is not None:
            data = write_pairs(options.profile, options.batch_size * options.steps, folder)
        files = Files(model_folder(options.model, folder), data, compiled=folder / "compiled")
        results = [run_all(options, dtype, files) for dtype in options.dtypes or ["float32"]]
    versions: dict[str, str] = {}
    for runs in results[0]["runs"].values():
        versions |= runs[0]["versions"]
    facts = {
        "commit": commit(),
        "cpu": cpu_model(),
        "threads": options.threads,
        "versions": versions,
        "contenders": {name: asdict(CONTENDERS[name]) for name in options.only},
        "settings": {key: str(v) for key, v in vars(options).items() if key not in ("peers",)},
    }
    for result in results:
        sys.stdout.write(f"{result['dtype']}\n\n{result['table']}\n\n")
    sys.stdout.write(json.dumps(facts) + "\n")
    if options.out is not None:
        write_json(options.out, facts | {"results": results})


if __name__ == "__main__":
    main()
