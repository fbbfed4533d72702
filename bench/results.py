"""The results of ``dpo bench``: as a file and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dpo.errors import InputError
from dpo.files import read_json

FORMAT: Final = 1


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
        peak_mib: most memory used: allocated on a GPU, resident of the process on a CPU.
        state_mib: weights, gradients and optimizer state, which the peak holds in any case.
        reference_tokens_per_s: useful tokens of the pass before training.
        split: mean seconds of the parts of these steps, as training logs them under ``time/``.
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
    peak_mib: float
    state_mib: float
    reference_tokens_per_s: float
    split: Mapping[str, float]

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
    def median_seconds(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.step_seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest step) / median."""
        return (max(self.step_seconds) - min(self.step_seconds)) / self.median_seconds


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
    """Lay out rows as a Markdown table; the parts of a step are shares of their sum."""
    parts = ("data", "forward", "backward", "optimizer")
    heads = ["scenario", "s/step", "spread", "pairs/s", "useful tokens/s", "useful", "MFU"]
    heads += ["peak MiB", "of it state", *parts]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        whole = sum(row.split.values())
        lines.append(
            [
                row.scenario,
                f"{row.median_seconds:.3g}",
                f"{row.spread:.0%}",
                f"{row.pairs_per_s:.3g}",
                f"{row.useful_tokens_per_s:,.0f}",
                f"{row.useful_share:.0%}",
                f"{row.mfu:.0%}",
                f"{row.peak_mib:,.0f}",
                f"{row.state_mib:,.0f}",
                *(f"{row.split.get(part, 0.0) / whole:.1%}" for part in parts),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )
