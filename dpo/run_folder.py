"""What a run keeps in its folder while it trains, and what resuming makes of it.

``metrics.jsonl`` holds one object per optimizer step and per evaluation, ``checkpoints`` a folder
for each checkpoint. The holder of the folder's ``FolderLock`` writes them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from dpo.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    set_aside_later,
)
from dpo.errors import InputError, RunError
from dpo.files import OTHER_SHAPE, append_jsonl, atomic_write, read_json
from dpo.progress import Console
from dpo.ranks import Ranks
from dpo.report.record import EVAL_PAIRS, METRICS
from dpo.trainer import NonFiniteError, Trainer

CHECKPOINTS = "checkpoints"


def find_checkpoint(
    folder: Path, resume: str | None, console: Console, ranks: Ranks
) -> Checkpoint | None:
    """Find what ``--resume`` asks for; nothing is changed. All ranks find the same.

    Returns:
        The checkpoint; None to begin at the first step.

    Raises:
        InputError: there is no such checkpoint, or the folder holds a run that is not resumed.
        RunError: the checkpoint is damaged, or none is sound.
    """
    if resume == "auto":
        checkpoint = _newest(folder / CHECKPOINTS, console, ranks)
    else:
        checkpoint = None if resume is None else load_checkpoint(Path(resume), ranks)
        has_run = (folder / METRICS).exists() or (folder / CHECKPOINTS).exists()
        if ranks.any(has_run) and not (checkpoint and _is_in(folder, checkpoint)):
            raise InputError(
                f"{folder} holds a run: go on with --resume auto, or choose another --out"
            )
    if checkpoint is not None:
        console.say(f"resuming from {checkpoint.path}")
    return checkpoint


def run_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, sound or not, by rising step.

    Raises:
        InputError: there is none.
    """
    found = checkpoint_folders(run / CHECKPOINTS)
    if not found:
        raise InputError(f"{run / CHECKPOINTS}: there is no checkpoint")
    return found


def describe_checkpoint(path: Path) -> str:
    """Say in a line how large a checkpoint is, and what it knows of its run."""
    size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
    try:
        state = read_json(path / "state.json")["state"]
        known = f"of {state['total_steps']} steps, {state['tokens_seen']:,} tokens"
        if state["best_step"] is not None:
            known += f", held-out loss {state['best_loss']:.4f} at step {state['best_step']}"
    except OTHER_SHAPE as error:
        known = f"damaged: {error}"
    return f"{path.name}  {size:8.1f} MiB  {known}"


def go_on_from(checkpoint: Checkpoint, folder: Path) -> None:
    """Make ``folder`` that of a run at ``checkpoint``: what came later is set aside.

    A folder without a run gets what it needs of the run that it goes on from: the metrics, the
    checkpoint and the best one.
    """
    if not _is_in(folder, checkpoint):
        for name in (METRICS, EVAL_PAIRS):
            if (known := checkpoint.path.parent.parent / name).exists():
                atomic_write(folder / name, known.read_bytes())
        for step in {checkpoint.step, checkpoint.state["best_step"]} - {None}:
            source = checkpoint_path(checkpoint.path.parent, step)
            if source.exists():
                shutil.copytree(source, checkpoint_path(folder / CHECKPOINTS, step))
    set_aside_later(folder / CHECKPOINTS, checkpoint.step)


def _is_in(folder: Path, checkpoint: Checkpoint) -> bool:
    return checkpoint.path.resolve().parent == (folder / CHECKPOINTS).resolve()


def _newest(checkpoints: Path, console: Console, ranks: Ranks) -> Checkpoint | None:
    newest = latest_checkpoint(checkpoints, ranks)
    for fault in newest.damaged:
        console.warn(f"passed over: {fault}")
    if newest.checkpoint is None and newest.damaged:
        raise RunError(
            f"{checkpoints}: no checkpoint is sound; remove {checkpoints.parent} to start again"
        )
    return newest.checkpoint


class RunLog:
    """Writes each line of metrics to ``metrics.jsonl``; forgets the lines after a resumed step."""

    def __init__(self, folder: Path, *, step: int, console: Console) -> None:
        self._path = folder / METRICS
        lines, damaged = _read_lines(self._path) if step else ([], 0)
        if damaged:
            console.warn(f"{self._path}: {damaged} damaged lines left out")
        kept = [line for line in lines if line["step"] <= step]
        atomic_write(self._path, "".join(json.dumps(_plain(line)) + "\n" for line in kept))

    def __call__(self, _trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        append_jsonl(self._path, _plain(metrics))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the lines of metrics of a run's folder, all but those that a kill cut short."""
    return _read_lines(folder / METRICS)[0]


def _read_lines(path: Path) -> tuple[list[dict[str, float]], int]:
    """Read what lines of metrics there are, and count those that are none."""
    lines, damaged = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            items = json.loads(line).items()
            values = {key: math.nan if value is None else value + 0 for key, value in items}
            int(values["step"])
            lines.append(values)
        except OTHER_SHAPE:
            damaged += 1
    return lines, damaged


def read_evaluations(folder: Path, *, up_to: int) -> list[dict[str, float]]:
    """Read the lines of metrics that are evaluations, those of later steps left out."""
    lines = read_metrics(folder)
    return [line for line in lines if "eval/loss" in line and line["step"] <= up_to]


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Replace by null the numbers that are not finite, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def write_reproduction(folder: Path, trainer: Trainer, error: NonFiniteError) -> Path:
    """Write the guilty rows as the loss saw them, one JSON object a line."""
    path = folder / f"nonfinite-step-{error.step:06d}.jsonl"
    batches = trainer.batches
    lines = []
    for row in error.rows:
        pair = batches.pairs[row]
        fields = {
            "row": row,
            "id": pair.id,
            "prompt_ids": pair.prompt_ids.tolist(),
            "chosen_ids": pair.chosen_ids.tolist(),
            "rejected_ids": pair.rejected_ids.tolist(),
            "weight": pair.weight,
            "margin": pair.margin,
            "label_prob": pair.label_prob,
        }
        if batches.reference is not None:
            chosen, rejected = batches.reference[row]
            fields |= {
                "reference_chosen": chosen.tolist(),
                "reference_rejected": rejected.tolist(),
            }
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    atomic_write(path, "".join(lines))
    return path
