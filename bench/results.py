"""The results of ``dpo bench``: as a file and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dpo.errors import InputError
from dpo.files import read_json

FORMAT: Final = 2
LACK_OF_MEMORY: Final = 3  # exit code of a scenario that the memory does not hold
PARTS: Final = ("data", "reference", "forward", "backward", "optimizer")  # of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What the steps of one scenario came to; a row of a file.

    Attributes:
        scenario: its name.
        device: the processor, in words.
        threads: of the CPU.
        torch: version.
        settings: the scenario itself.
        step_seconds: of each timed step; the warm-up is not among them.
        pairs_per_s: by the median step.
        useful_tokens_per_s: a prompt counts once and each answer once, padding never.
        useful_share: useful tokens by tokens that were computed.
        useful_flops: of one step, see ``dpo.bench.training.useful_flops``.
        matrix_flops_per_s: best rate of plain matrix products in the same numerics and process.
        mfu: useful_flops by the time and that rate.
        datasheet_flops_per_s: what the maker says of the device; None if it is not known.
        peak_mib: most memory used: allocated on a GPU, resident of the process on a CPU.
        state_mib: weights, gradients and optimizer state, which the peak holds in any case.
        reference_seconds: of the pass before training over the pairs of a step; None if the loss
            needs none beforehand.
        split: mean seconds of the parts of these steps, as training logs them under ``time/``.
        notes: what the trainer said, such as that it went on in smaller micro-batches.
        wall_seconds: of the measurement, from the making of the model on.
    """

    scenario: str
    device: str
    threads: int
    torch: str
    settings: Mapping[str, Any]
    step_seconds: Sequence[float]
    pairs_per_s: float
    useful_tokens_per_s: float
    useful_share: float
    useful_flops: float
    matrix_flops_per_s: float
    mfu: float
    datasheet_flops_per_s: float | None
    peak_mib: float
    state_mib: float
    reference_seconds: float | None
    split: Mapping[str, float]
    notes: Sequence[str]
    wall_seconds: float

    @classmethod
    def parse(cls, data: object, where: str) -> Measurement:
        """Take a row of a file.

        Raises:
            InputError: it lacks something.
        """
        names = cls.__dataclass_fields__
        if not isinstance(data, Mapping):
            raise InputError(f"{where} is no measurement of dpo bench")
        if missing := [name for name in names if name not in data]:
            raise InputError(f"{where} is no measurement of dpo bench: missing {missing[0]}")
        values: dict[str, Any] = {name: data[name] for name in names}
        return cls(**values)

    @property
    def useful_tokens(self) -> float:
        """Useful tokens of a step."""
        return self.useful_tokens_per_s * self.median_seconds

    @property
    def median_seconds(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.step_seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest step) / median."""
        return (max(self.step_seconds) - min(self.step_seconds)) / self.median_seconds

    @property
    def datasheet_share(self) -> float | None:
        """useful_flops by the time and the datasheet's rate."""
        rate = self.datasheet_flops_per_s
        return None if rate is None else self.useful_flops / (self.median_seconds * rate)


def read_results(path: Path) -> dict[str, Measurement]:
    """Read what ``dpo bench --out`` wrote, by scenario.

    Raises:
        InputError: no such file, or it is no such result.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    data = read_json(path)
    if not isinstance(data, Mapping) or data.get("format") != FORMAT or not data.get("rows"):
        raise InputError(f"{path}: expected a result of dpo bench --out, of format {FORMAT}")
    rows = [
        Measurement.parse(row, f"{path}: row {n}") for n, row in enumerate(data["rows"], start=1)
    ]
    return {row.scenario: row for row in rows}


def table(rows: Sequence[Measurement]) -> str:
    """Lay out rows as a Markdown table; the parts of a step are shares of their sum.

    The pass before training over the pairs of a step is told as a share of a step: it is done once.
    """
    return markdown([_cells(row) for row in rows])


def scaling_table(rows: Mapping[str, Measurement], families: Iterable[Iterable[str]]) -> str:
    """Lay out what time does as the work of a step grows, for each family that is measured whole.

    All numbers are by those of the family's first scenario. Where cost is linear, the last column
    stays at 1 or falls; time by tokens grows a little with length, because attention does.

    Args:
        rows: results by scenario.
        families: scenarios of growing work.
    """
    lines = []
    for names in map(list, families):
        if not all(name in rows for name in names):
            continue
        first = rows[names[0]]
        for row in (rows[name] for name in names):
            time = row.median_seconds / first.median_seconds
            tokens = row.useful_tokens / first.useful_tokens
            flops = row.useful_flops / first.useful_flops
            cells = {"useful tokens": tokens, "arithmetic": flops, "time": time}
            cells |= {"time by tokens": time / tokens, "time by arithmetic": time / flops}
            lines.append(
                {"scenario": row.scenario} | {name: f"{x:.2f}" for name, x in cells.items()}
            )
    return markdown(lines)


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """Lay out lines, cells by heading, as a Markdown table; empty of none."""
    if not lines:
        return ""
    cells = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in cells
    )


def _cells(row: Measurement) -> dict[str, str]:
    whole = sum(row.split.values())
    reference = row.reference_seconds
    cells = {
        "scenario": row.scenario,
        "s/step": f"{row.median_seconds:.3g}",
        "spread": f"{row.spread:.0%}",
        "pairs/s": f"{row.pairs_per_s:.3g}",
        "useful tokens/s": f"{row.useful_tokens_per_s:,.0f}",
        "useful": f"{row.useful_share:.0%}",
        "MFU": f"{row.mfu:.0%}",
        "of datasheet": "" if row.datasheet_share is None else f"{row.datasheet_share:.0%}",
        "peak MiB": f"{row.peak_mib:,.0f}",
        "of it state": f"{row.state_mib:,.0f}",
        "before": "" if reference is None else f"{reference / row.median_seconds:.0%}",
    }
    return cells | {part: f"{row.split.get(part, 0.0) / whole:.1%}" for part in PARTS}
