"""What the runs of contenders come to, whether they did the same, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo.bench.peers.contenders import TRL
from dpo.bench.results import markdown
from dpo.errors import RunError


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
    """What the runs of one contender come to; steps that warm up are not counted.

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


def summarise(runs: Sequence[Run], work: Work, *, warm_up: int = 1) -> Summary:
    """Turn the runs of one contender into its line of the table, without their first steps."""
    means = [statistics.mean(run.step_seconds[warm_up:]) for run in runs]
    step_seconds = statistics.median(means)
    passes = [run.reference_seconds for run in runs if run.reference_seconds is not None]
    return Summary(
        step_seconds=step_seconds,
        spread=(max(means) - min(means)) / step_seconds,
        pairs_per_s=statistics.mean(work.pairs[warm_up:]) / step_seconds,
        useful_tokens_per_s=statistics.mean(work.useful_tokens[warm_up:]) / step_seconds,
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
    return markdown([_cells(name, line, best) for name, line in summaries.items()])


def _cells(name: str, line: Summary, best: Summary | None) -> dict[str, str]:
    reference = line.reference_seconds
    return {
        "": name,
        "s/step": f"{line.step_seconds:.3g}",
        "spread": f"{line.spread:.0%}",
        "pairs/s": f"{line.pairs_per_s:.3g}",
        "useful tokens/s": f"{line.useful_tokens_per_s:.0f}",
        "peak MiB": f"{line.peak_mib:.0f}",
        "reference pass s": "in the step" if reference is None else f"{reference:.3g}",
        "speed by TRL's best": "" if best is None else f"{line.pairs_per_s / best.pairs_per_s:.2f}",
        "memory by TRL's best": "" if best is None else f"{line.peak_mib / best.peak_mib:.2f}",
    }


def best_peer(summaries: Mapping[str, Summary]) -> Summary | None:
    """Return the fastest of TRL's contenders."""
    peers = [summary for name, summary in summaries.items() if name.startswith(TRL)]
    return max(peers, key=lambda summary: summary.pairs_per_s, default=None)
