"""A whole run, from a config to a run folder: ``dpo train`` and ``dpo reference``.

What is composed here is defined elsewhere; this module reads and writes the files, heeds signals
and speaks to the console. README.md describes the folder of a run.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dpo.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_checkpoint,
    set_aside_later,
)
from dpo.config import RunConfig
from dpo.device import choose_device
from dpo.errors import InputError, RunError
from dpo.files import FolderLock, append_jsonl, atomic_directory, atomic_write
from dpo.hub import fetch_model
from dpo.inputs import Inputs, load_inputs
from dpo.model_card import write_model_card
from dpo.models import Decoder, load_model, save_model
from dpo.models.transforms import checkpoint_activations, compile_blocks
from dpo.precision import PRECISIONS
from dpo.progress import Console
from dpo.reference_pass import References, obtain_references
from dpo.report import write_report
from dpo.tokenizer import Tokenizer, load_tokenizer
from dpo.trainer import Metrics, NonFiniteError, Trainer

CHECKPOINTS = "checkpoints"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: the run folder.
        model: the folder of the trained model.
        report: the page about the run.
        steps: optimizer steps done.
        first: the evaluation before the first step; None without held-out pairs.
        last: the evaluation after the last step; None without held-out pairs.
    """

    folder: Path
    model: Path
    report: Path
    steps: int
    first: Metrics | None
    last: Metrics | None


def train(config: RunConfig, *, console: Console) -> RunResult:
    """Train a model on preference pairs and write the run folder ``config.out``.

    Raises:
        InputError: the model, the data or the folder cannot be used.
        RunError: training cannot go on.
        SystemExit: a signal stopped the run after a checkpoint; the code is 128 + its number.
    """
    folder = Path(config.out)
    with FolderLock(folder):
        checkpoint = _find_checkpoint(config, folder, console)
        device = choose_device(config.train)
        source = fetch_model(config.model, config.revision)
        tokenizer = load_tokenizer(source)
        inputs = load_inputs(config, tokenizer, console)
        policy = load_model(source, dtype=PRECISIONS[config.train.dtype].parameters, device=device)
        trainer = _make_trainer(config, source, policy, inputs, console)
        if checkpoint is not None:
            trainer.restore(checkpoint.tensors, checkpoint.state)
            set_aside_later(folder / CHECKPOINTS, checkpoint.step)
        log = RunLog(folder / "metrics.jsonl", step=trainer.step)
        trainer.callbacks.append(log)
        atomic_write(folder / "config.toml", config.to_toml())
        _run(trainer, config, folder, console)
        return _finish(trainer, policy, tokenizer, config, source, log)


def compute_reference_only(config: RunConfig, *, console: Console) -> None:
    """Fill the reference cache for the pairs of ``config`` and train nothing."""
    choose_device(config.train)
    source = fetch_model(config.model, config.revision)
    inputs = load_inputs(config, load_tokenizer(source), console)
    obtain_references(config, source, None, inputs, console)


def _make_trainer(
    config: RunConfig, source: Path, policy: Decoder, inputs: Inputs, console: Console
) -> Trainer:
    loss = config.loss.build()
    references = References(None, None)
    if loss.needs_reference:
        references = obtain_references(config, source, policy, inputs, console)
    if config.train.activation_checkpointing:
        checkpoint_activations(policy)
    if config.train.compile:
        compile_blocks(policy)
    if config.train.dtype == "bfloat16":
        console.warn(
            "bfloat16 weights do not move at the learning rates of DPO, which lie below their "
            "resolution: bf16-mixed keeps float32 weights"
        )
    return Trainer(
        policy,
        inputs.pairs,
        config.train,
        loss=loss,
        reference=references.pairs,
        eval_pairs=inputs.eval_pairs,
        eval_reference=references.eval_pairs,
        starts_at_reference=config.reference is None,
    )


# While it runs


def _run(trainer: Trainer, config: RunConfig, folder: Path, console: Console) -> None:
    """Train to the end, leaving checkpoints; a signal ends the process after one."""
    steps = trainer.total_steps
    with (
        _stopping_on_signals(trainer, console) as received,
        console.bar("train", steps, unit="steps", start=trainer.step) as bar,
    ):
        try:
            for step in trainer:
                bar.update(step.number, status=_status(step.metrics))
                every = config.train.save_every
                is_last = step.number == steps or trainer.should_stop
                is_best = config.train.keep_best and trainer.best_step == step.number
                if is_last or is_best or (every and step.number % every == 0):
                    _save(trainer, config, folder)
        except NonFiniteError as error:
            path = _write_reproduction(trainer, error, folder)
            raise RunError(f"{error}. The rows as the model saw them are in {path}") from error
    if received:
        console.warn(f"stopped at step {trainer.step}; go on with --resume auto")
        raise SystemExit(128 + received[0])


def _save(trainer: Trainer, config: RunConfig, folder: Path) -> None:
    checkpoints = folder / CHECKPOINTS
    save_checkpoint(checkpoints, trainer.step, trainer.tensors(), trainer.state())
    best = trainer.best_step if config.train.keep_best else None
    prune(checkpoints, keep=config.train.keep, best=best)


def _status(metrics: Metrics | None) -> str | None:
    if metrics is None:
        return None
    return (
        f"loss {metrics['loss']:.4f}  acc {metrics['rewards/accuracy']:.3f}  "
        f"margin {metrics['rewards/margin']:+.4f}  {metrics['perf/pairs_per_s']:.1f} pairs/s  "
        f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"
    )


@contextmanager
def _stopping_on_signals(trainer: Trainer, console: Console) -> Iterator[list[int]]:
    """Let SIGTERM and SIGINT end the run after the current step; a second one ends it at once."""
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        trainer.should_stop = True
        signal.signal(number, previous[signal.Signals(number)])
        console.warn(f"{signal.Signals(number).name}: stopping after this step")

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _write_reproduction(trainer: Trainer, error: NonFiniteError, folder: Path) -> Path:
    """Write the guilty rows as token ids, one JSON object a line."""
    path = folder / f"nonfinite-step-{error.step:06d}.jsonl"
    lines = []
    for row in error.rows:
        pair = trainer.batches.pairs[row]
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
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    atomic_write(path, "".join(lines))
    return path


class RunLog:
    """Writes each line of metrics to ``metrics.jsonl``; forgets the lines after a resumed step."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = [line for line in self.lines() if line["step"] <= step] if step else []
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))

    def __call__(self, _trainer: Trainer, metrics: Metrics) -> None:
        """Append a line; JSON has no number that is not finite, so that becomes null."""
        append_jsonl(self.path, {k: v if math.isfinite(v) else None for k, v in metrics.items()})

    def lines(self) -> list[dict[str, float]]:
        """Read back all lines but one that a kill cut short."""
        lines = []
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines

    def evaluations(self) -> list[dict[str, float]]:
        """Return the lines that are evaluations."""
        return [line for line in self.lines() if "eval/loss" in line]


# Before and after


def _find_checkpoint(config: RunConfig, folder: Path, console: Console) -> Checkpoint | None:
    """Find what ``--resume`` asks for; refuse to write over a run that is not resumed.

    Raises:
        InputError: there is nothing to resume, or there is a run and nothing was said of resuming.
        RunError: the named checkpoint is damaged.
    """
    resume, checkpoints = config.train.resume, folder / CHECKPOINTS
    if resume is None:
        if (folder / "metrics.jsonl").exists() or checkpoints.exists():
            raise InputError(
                f"{folder} holds a run: go on with --resume auto, or choose another --out"
            )
        return None
    if resume != "auto":
        return load_checkpoint(Path(resume))
    newest = latest_checkpoint(checkpoints)
    for fault in newest.damaged:
        console.warn(f"passed over: {fault}")
    if newest.checkpoint is None and newest.damaged:
        raise RunError(f"{checkpoints}: no checkpoint is sound; remove {folder} to start again")
    if newest.checkpoint is not None:
        console.say(f"resuming from {newest.checkpoint.path}")
    return newest.checkpoint


def _finish(
    trainer: Trainer,
    policy: Decoder,
    tokenizer: Tokenizer,
    config: RunConfig,
    source: Path,
    log: RunLog,
) -> RunResult:
    """Write the model folder and the report."""
    folder = Path(config.out)
    if config.train.keep_best and trainer.best_step not in (None, trainer.step):
        best = load_checkpoint(folder / CHECKPOINTS / f"step-{trainer.best_step:06d}")
        policy.load_state_dict(best.tensors["model"], strict=False)
    with atomic_directory(folder / "model", replace=True) as model_folder:
        save_model(policy, model_folder)
        tokenizer.save(model_folder)
        if (source / GENERATION_CONFIG).exists():
            shutil.copyfile(source / GENERATION_CONFIG, model_folder / GENERATION_CONFIG)
        evaluations = log.evaluations()
        write_model_card(model_folder, config, evaluations)
    return RunResult(
        folder=folder,
        model=folder / "model",
        report=write_report(folder),
        steps=trainer.step,
        first=evaluations[0] if evaluations else None,
        last=evaluations[-1] if evaluations else None,
    )
