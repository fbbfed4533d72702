"""Measure training steps of this engine and of TRL side by side, in one interleaved run.

    python -m dpo.bench.peers.compare --peers PEERS/bin/python --out comparison.json

Each contender runs in a process of its own; every repeat runs all of them, and every second one in
the opposite order. The first step of a process warms up and is not counted. That all do the same
mathematics is checked by their losses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dpo.bench.machine import ROOT, commit, cpu_model
from dpo.bench.peers.record_trl_losses import PAIRS, make_model
from dpo.bench.smollm2 import smollm2
from dpo.errors import InputError, RunError
from dpo.files import write_json

OURS: Final = "ours"
TRL: Final = "trl"
CONTENDERS: Final[dict[str, tuple[str, ...]]] = {  # flags of step.py and of trl_steps.py
    "ours": (),
    "ours, 512-token micro-batches": ("--tokens-per-micro-batch", "512"),
    "ours, no sharing": ("--no-prefix-sharing",),
    "ours, live reference": ("--live-reference",),
    "trl, precomputed": ("--precompute",),
    "trl, precomputed, micro-batch 1/4": ("--precompute", "--accumulation", "4"),
    "trl, precomputed, micro-batch 1/8": ("--precompute", "--accumulation", "8"),
    "trl, live reference": (),
}
TOLERANCE: Final = {"float32": 1e-3, "bf16-mixed": 0.05, "bfloat16": 0.05}  # of a loss


@dataclass(frozen=True)
class Run:
    """One process of one contender.

    Attributes:
        losses: of all steps.
        step_seconds: of all steps.
        peak_mib: most resident memory of the process.
        reference_seconds: of the pass before training; None if the reference runs in each step.
        versions: of the packages that were measured.
    """

    losses: list[float]
    step_seconds: list[float]
    peak_mib: float
    reference_seconds: float | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Work:
    """What each step of a run does, the same for every contender: pairs and useful tokens."""

    pairs: list[int]
    useful_tokens: list[int]


@dataclass(frozen=True)
class Summary:
    """What the runs of one contender come to; the first step of each is not counted.

    Attributes:
        step_seconds: median over runs of the mean step.
        spread: (slowest - fastest run) / median.
        pairs_per_s: pairs of the counted steps by their time.
        useful_tokens_per_s: a prompt counts once and each answer once, padding never.
        peak_mib: median over runs.
        reference_seconds: median over runs, or None.
        losses: of the first run.
    """

    step_seconds: float
    spread: float
    pairs_per_s: float
    useful_tokens_per_s: float
    peak_mib: float
    reference_seconds: float | None
    losses: list[float]


def summarise(runs: Sequence[Run], work: Work) -> Summary:
    """Turn the runs of one contender into its line of the table."""
    means = [statistics.mean(run.step_seconds[1:]) for run in runs]
    step_seconds = statistics.median(means)
    passes = [run.reference_seconds for run in runs if run.reference_seconds is not None]
    return Summary(
        step_seconds=step_seconds,
        spread=(max(means) - min(means)) / step_seconds,
        pairs_per_s=statistics.mean(work.pairs[1:]) / step_seconds,
        useful_tokens_per_s=statistics.mean(work.useful_tokens[1:]) / step_seconds,
        peak_mib=statistics.median(run.peak_mib for run in runs),
        reference_seconds=statistics.median(passes) if passes else None,
        losses=runs[0].losses,
    )


def check_losses(summaries: Mapping[str, Summary], *, tolerance: float) -> None:
    """Refuse a comparison of contenders that compute different things.

    Raises:
        RunError: the losses of two contenders differ by more than ``tolerance`` at some step.
    """
    (first, expected), *others = summaries.items()
    for name, summary in others:
        pairs = zip(expected.losses, summary.losses, strict=True)
        for step, (one, other) in enumerate(pairs, start=1):
            if not abs(one - other) <= tolerance:
                raise RunError(
                    f"the loss of step {step} is {one:.6f} with '{first}' and {other:.6f} with "
                    f"'{name}': they may differ by {tolerance:g}"
                )


def table(summaries: Mapping[str, Summary]) -> str:
    """Write the summaries as a Markdown table, with ratios to the fastest TRL if one was run."""
    best = best_peer(summaries)
    lines = [
        "| | s/step | spread | pairs/s | useful tokens/s | peak MiB | reference pass s "
        "| speed by TRL's best | memory by TRL's best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, line in summaries.items():
        reference = "in the step" if line.reference_seconds is None else _3(line.reference_seconds)
        ratios = ["", ""]
        if best is not None:
            ratios = [
                f"{line.pairs_per_s / best.pairs_per_s:.2f}",
                f"{line.peak_mib / best.peak_mib:.2f}",
            ]
        cells = [
            name,
            _3(line.step_seconds),
            f"{line.spread:.0%}",
            _3(line.pairs_per_s),
            f"{line.useful_tokens_per_s:.0f}",
            f"{line.peak_mib:.0f}",
            reference,
            *ratios,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best_peer(summaries: Mapping[str, Summary]) -> Summary | None:
    """Return the fastest of TRL's contenders."""
    peers = [summary for name, summary in summaries.items() if name.startswith(TRL)]
    return max(peers, key=lambda summary: summary.pairs_per_s, default=None)


def _3(number: float) -> str:
    return f"{number:.3g}"


def schedule(names: Sequence[str], repeats: int) -> list[str]:
    """Order the runs: all contenders in each repeat, every second repeat backwards."""
    return [name for i in range(repeats) for name in (names if i % 2 == 0 else reversed(names))]


def run_all(options: argparse.Namespace, dtype: str, model: Path) -> dict[str, Any]:
    """Run every contender in one dtype and return the result, which is also what is kept.

    Raises:
        RunError: a process fails, or the losses differ.
    """
    runs: dict[str, list[Run]] = {name: [] for name in options.only}
    work: Work | None = None
    load = os.getloadavg()[0]
    for name in schedule(options.only, options.repeats):
        sys.stderr.write(f"{dtype}: {name}\n")
        printed = _run(_command(name, options, dtype, model))
        if work is None and "useful_tokens" in printed:
            work = Work(printed["pairs"], printed["useful_tokens"])
        runs[name].append(_parsed(printed))
    assert work is not None  # one of ours is always run
    summaries = {name: summarise(each, work) for name, each in runs.items()}
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


def _command(name: str, options: argparse.Namespace, dtype: str, model: Path) -> list[str]:
    ours = [sys.executable, "-m", "dpo.bench.step"]
    theirs = [options.peers, str(ROOT / "bench/peers/trl_steps.py")]
    settings = {
        "model": model,
        "data": options.data,
        "steps": options.steps,
        "batch-size": options.batch_size,
        "threads": options.threads,
        "dtype": dtype,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [*(ours if name.startswith(OURS) else theirs), *words, *CONTENDERS[name]]


def _run(command: Sequence[str]) -> dict[str, Any]:
    threads = command[command.index("--threads") + 1]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RunError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    printed = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(printed, dict)
    return printed


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: a contender is unknown, none of ours is among them, or a number is too small.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True, help="python of the peers' environment")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M if not given; or: tiny")
    parser.add_argument("--data", type=Path, default=PAIRS)
    parser.add_argument("--dtype", action="append", choices=list(TOLERANCE), dest="dtypes")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of each process; one warms up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write all of it as JSON")
    options = parser.parse_args(words)
    if unknown := [name for name in options.only if name not in CONTENDERS]:
        raise InputError(f"--only: no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    if not any(name.startswith(OURS) for name in options.only):
        raise InputError("--only: one of ours must run, it counts the useful tokens")
    if options.steps < 2 or options.repeats < 1:
        raise InputError("--steps must be at least 2 (the first warms up), --repeats at least 1")
    options.data = options.data.resolve()
    return options


def main() -> None:
    """Compare and print."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        if options.model == Path("tiny"):
            make_model(Path(folder))
            model = Path(folder)
        else:
            model = smollm2() if options.model is None else options.model.resolve()
        results = [run_all(options, d, model) for d in options.dtypes or ["float32"]]
    versions: dict[str, str] = {}
    for runs in results[0]["runs"].values():
        versions |= runs[0]["versions"]
    facts = {
        "commit": commit(),
        "cpu": cpu_model(),
        "threads": options.threads,
        "versions": versions,
        "settings": {key: str(v) for key, v in vars(options).items() if key not in ("peers",)},
    }
    for result in results:
        sys.stdout.write(f"{result['dtype']}\n\n{result['table']}\n\n")
    sys.stdout.write(json.dumps(facts) + "\n")
    if options.out is not None:
        write_json(options.out, facts | {"results": results})


if __name__ == "__main__":
    main()
