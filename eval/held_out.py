"""How held-out pairs stand under a policy, before DPO and after it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo.eval.bootstrap import ConfidenceInterval, compute_confidence_interval
from dpo.eval.resampling import Floats
from dpo.files import JSON


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out pairs under a policy, with intervals; pairs of one prompt are drawn together."""

    loss: ConfidenceInterval
    """DPO loss; ln 2 before DPO, by definition."""
    accuracy: ConfidenceInterval
    """Share whose chosen answer has the higher implicit reward; a tie is half right, so before DPO
    this is one half, by definition."""
    reward_margin: ConfidenceInterval
    """Implicit reward of the chosen answer less that of the other; 0 before DPO."""
    likelier: ConfidenceInterval
    """Share whose chosen answer is the likelier one; a tie is half right."""


HELD_OUT = {
    "loss": "loss",
    "accuracy": "reward accuracy",
    "reward_margin": "reward margin",
    "likelier": "chosen is likelier",
}
"""Each figure of ``HeldOut`` in words."""


def measure_held_out(scores: str | Path, prompts: Sequence[str]) -> tuple[HeldOut, HeldOut]:
    """Measure P pairs before and after DPO from the file that ``dpo score`` wrote of them.

    Args:
        scores: one line for each pair, its reference being the policy before DPO.
        prompts: of the P pairs, in the order of the file.

    Returns:
        Under the reference, and under the policy.
    """
    rows = [json.loads(line) for line in Path(scores).read_text(encoding="utf-8").splitlines()]
    start = _column(rows, "reference_chosen_log_prob", "reference_rejected_log_prob")
    now = _column(rows, "chosen_log_prob", "rejected_log_prob")
    margins = np.array([row["margin"] for row in rows])
    return (
        _held_out(np.zeros(len(rows)), start, prompts),
        _held_out(margins, now, prompts),
    )


def summarize(before: HeldOut, after: HeldOut) -> dict[str, JSON]:
    """Return both in the layout that ``dpo.report`` reads as ``summary.json``."""
    return {
        f"held out: {label}": {
            "before": _estimate(getattr(before, name)),
            "after": _estimate(getattr(after, name)),
        }
        for name, label in HELD_OUT.items()
    }


def _column(rows: Sequence[Mapping[str, float]], name: str, less: str) -> Floats:
    """Return a column of the P rows, less another one: (P,)."""
    return np.array([row[name] - row[less] for row in rows])


def _held_out(margins: Floats, log_odds: Floats, prompts: Sequence[str]) -> HeldOut:
    """Measure P pairs by their reward margins and the log-odds of chosen against rejected."""
    columns = (
        np.logaddexp(0.0, -margins),  # -log sigmoid(margin): Rafailov et al. 2023, eq. 7
        (np.sign(margins) + 1) / 2,
        margins,
        (np.sign(log_odds) + 1) / 2,
    )
    return HeldOut(*(compute_confidence_interval(values, groups=prompts) for values in columns))


def _estimate(interval: ConfidenceInterval) -> dict[str, JSON]:
    ends = {"low": interval.lower, "high": interval.upper} if interval.is_defined else {}
    return {"value": interval.mean, **ends}
