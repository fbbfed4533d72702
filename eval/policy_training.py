"""From a data set to a policy that decides: an SFT warm start, DPO, and what it brought.

Two runs of ``dpo train`` with all that a run has: checkpoints, metrics, a report. ``output_path``
then holds, for the policy ``extraction``::

    extraction_sft_train.jsonl     what the warm start imitated, if there was one
    extraction_dpo_train.jsonl     the pairs that were trained on
    extraction_dpo_eval.jsonl      the pairs that were held out
    extraction_metadata.json       config, data set, counts and what was measured
    start/                         the untrained model, if it is a tiny one from scratch
    sft/                           the run of the warm start, if there was one; sft/model decides
    dpo/                           the run of DPO; dpo/model is the policy, dpo/report.html its page
    scores.jsonl                   the held-out pairs under the policy, as dpo score writes them
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo.config import RunConfig
from dpo.data.dataset import Dataset
from dpo.data.dataset_files import MIN_PAIRS
from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.kinds.consolidation import ConsolidationAction, ConsolidationState
from dpo.data.kinds.extraction import ExtractionAction, ExtractionState
from dpo.data.kinds.retrieval import RetrievalAction, RetrievalState
from dpo.data.kinds.schema import to_json
from dpo.errors import InputError, RunError
from dpo.eval.held_out import HeldOut, measure_held_out, summarize
from dpo.eval.policy_pairs import PolicyPairs, pairs_of_dataset, read_side
from dpo.eval.tiny import make_tiny_model, make_tiny_tokenizer
from dpo.files import JSON, atomic_directory, write_json
from dpo.models import save_model
from dpo.preferences import PreferencePair, write_pairs
from dpo.progress import Console
from dpo.report import write_report
from dpo.run import RunResult
from dpo.run import train as train_run
from dpo.run_folder import read_metrics
from dpo.score import score_file
from dpo.settings import Setting, parse_assignment, resolve
from dpo.tokenizer import load_tokenizer

TINY = "tiny"
TINY_SFT_EPOCHS = 2
SLOW_FOR_TINY = 1e-4  # learning rate below which a model from scratch hardly moves


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTrainingConfig:
    """How a policy is trained.

    Raises:
        InputError: values are out of range; names all of them.
    """

    output_path: str
    """Folder for everything; must not exist or be empty, unless ``resume``."""
    model_name: str = TINY
    """What to start from: "tiny", a small Llama from scratch; a model folder; an id of the Hub."""
    epochs: int = 10
    """Passes of DPO over the training pairs, at least 1."""
    batch_size: int = 32
    """Pairs per optimizer step, at least 1."""
    learning_rate: float = 1e-5
    """Peak learning rate of DPO, above 0; a tiny model wants more, such as 1e-3."""
    beta: float = 0.1
    """How strongly DPO is held to its start, above 0."""
    sft_epochs: int | None = None
    """Passes of the warm start over the demonstrations; None: 2 for a tiny model, else 0."""
    sft_learning_rate: float = 3e-3
    """Peak learning rate of the warm start, above 0."""
    min_pairs: int = MIN_PAIRS
    """Least number of training pairs, at least 1."""
    seed: int = 0
    """Of the weights from scratch and of the order of the pairs, at least 0."""
    resume: bool = False
    """Go on in ``output_path`` where a training with the same config was stopped."""
    settings: tuple[str, ...] = ()
    """Further options of both runs, as for ``dpo train --set``: "train.dtype=bf16-mixed"."""

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "min_pairs": 1, "seed": 0, "sft_epochs": 0}
        faults = [
            f"{name} must be at least {bound}, got {value}"
            for name, bound in least.items()
            if (value := getattr(self, name)) is not None and value < bound
        ]
        faults += [
            f"{name} must be above 0 and finite, got {value}"
            for name in ("learning_rate", "beta", "sft_learning_rate")
            if not 0 < (value := getattr(self, name)) < math.inf
        ]
        faults += [
            f"{name} must not be empty"
            for name in ("model_name", "output_path")
            if not getattr(self, name)
        ]
        if faults:
            raise InputError("\n".join(faults))

    @property
    def warm_start_epochs(self) -> int:
        """Epochs of the warm start, the default filled in."""
        if self.sft_epochs is not None:
            return self.sft_epochs
        return TINY_SFT_EPOCHS if self.model_name == TINY else 0


@dataclass(frozen=True, slots=True)
class PolicyTrainingMetrics:
    """What training brought. None is what was not measured, for lack of held-out pairs."""

    train_loss: float
    """DPO loss of the training pairs in the last epoch, each step before its update."""
    before: HeldOut | None
    """After the warm start, before DPO."""
    after: HeldOut | None

    @property
    def eval_loss(self) -> float | None:
        """DPO loss of the held-out pairs."""
        return None if self.after is None else self.after.loss.mean

    @property
    def accuracy(self) -> float | None:
        """Reward accuracy on the held-out pairs."""
        return None if self.after is None else self.after.accuracy.mean

    @property
    def reward_margin(self) -> float | None:
        """Reward margin of the held-out pairs."""
        return None if self.after is None else self.after.reward_margin.mean

    @property
    def summary(self) -> dict[str, JSON]:
        """Held-out figures in the layout of ``summary.json``; empty if nothing was measured."""
        if self.before is None or self.after is None:
            return {}
        return summarize(self.before, self.after)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTrainingResult:
    """What became of a training; where it failed, ``error`` says why and the rest is None."""

    success: bool
    model_path: Path | None = None
    """Folder of the policy: what ``LanguageModelPolicy.load`` takes."""
    start_path: Path | None = None
    """Folder of the policy before DPO; None without a warm start."""
    report_path: Path | None = None
    metrics: PolicyTrainingMetrics | None = None
    notes: tuple[str, ...] = ()
    """What a reader of the metrics should know."""
    error: str | None = None


def train_extraction_policy(
    dataset: Dataset[ExtractionState, ExtractionAction], config: PolicyTrainingConfig
) -> PolicyTrainingResult:
    """Train the policy that decides what to store; what is wrong is in the result."""
    return _train_kind("extraction", dataset, config)


def train_retrieval_policy(
    dataset: Dataset[RetrievalState, RetrievalAction], config: PolicyTrainingConfig
) -> PolicyTrainingResult:
    """Train the policy that decides what to recall; what is wrong is in the result."""
    return _train_kind("retrieval", dataset, config)


def train_consolidation_policy(
    dataset: Dataset[ConsolidationState, ConsolidationAction], config: PolicyTrainingConfig
) -> PolicyTrainingResult:
    """Train the policy that decides what to merge; what is wrong is in the result."""
    return _train_kind("consolidation", dataset, config)


def _train_kind(
    policy: str, dataset: Dataset[Any, Any], config: PolicyTrainingConfig
) -> PolicyTrainingResult:
    try:
        return train_policy(pairs_of_dataset(dataset, KINDS[policy], config.min_pairs), config)
    except (InputError, RunError) as error:
        return PolicyTrainingResult(success=False, error=str(error))


def train_policy(
    pairs: PolicyPairs, config: PolicyTrainingConfig, *, console: Console | None = None
) -> PolicyTrainingResult:
    """Train a policy on ``pairs`` and leave everything in ``config.output_path``.

    Args:
        pairs: of one kind.
        config: how to train.
        console: where progress is shown; None shows nothing.

    Raises:
        InputError: too few pairs, a folder that is not empty, no such model, a setting that is
            none, or a training to resume that was another.
        RunError: a step is not finite, or the device's memory is full.
        SystemExit: a signal stopped it after a checkpoint, as in ``dpo.run.train``.
    """
    console = console or Console(quiet=True)
    out = Path(config.output_path)
    _check(pairs, config, out)
    plan = _Plan(pairs, config, out)
    runs = plan.runs()
    if config.model_name != TINY:
        load_tokenizer(runs[0].model, runs[0].revision)  # is it a model? nothing is written yet
    out.mkdir(parents=True, exist_ok=True)
    if config.warm_start_epochs:
        _write_or_check(pairs.demonstrations, plan.file("sft"))
    _write_or_check(pairs.train, plan.file("train"))
    _write_or_check(pairs.eval, plan.file("eval"))
    if config.model_name == TINY and not (out / "start").exists():
        _make_start(pairs, out / "start", config.seed)
    results = [_run(run, pairs.kind, console) for run in runs]
    metrics = _measure(plan, results[-1], console)
    write_json(out / f"{pairs.kind.name}_metadata.json", _metadata(pairs, config, metrics))
    write_json(results[-1].folder / "summary.json", metrics.summary)
    return PolicyTrainingResult(
        success=True,
        model_path=results[-1].model,
        start_path=results[0].model if len(results) > 1 else None,
        report_path=write_report(results[-1].folder),
        metrics=metrics,
        notes=tuple(_notes(pairs, config, metrics)),
    )


def _check(pairs: PolicyPairs, config: PolicyTrainingConfig, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: the output is a folder")
    if out.exists() and any(out.iterdir()) and not config.resume:
        raise InputError(
            f"{out} is not empty: go on there with resume, choose another folder, or remove it"
        )
    unique = len({(pair.prompt, pair.chosen, pair.rejected) for pair in pairs.train})
    if unique < config.min_pairs:
        raise InputError(
            f"Insufficient training pairs: {len(pairs.train)} formed, {unique} of them unique "
            f"(minimum {config.min_pairs} required)"
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which runs make the policy."""

    pairs: PolicyPairs
    config: PolicyTrainingConfig
    out: Path

    def file(self, part: str) -> Path:
        """Return where the pairs of a part are: "sft", "train" or "eval"."""
        name = "sft_train" if part == "sft" else f"dpo_{part}"
        return self.out / f"{self.pairs.kind.name}_{name}.jsonl"

    def runs(self) -> list[RunConfig]:
        """Return the runs in their order; the last one is that of DPO.

        Raises:
            InputError: a setting is unknown or out of range, or contradicts another.
        """
        config = self.config
        start = str(self.out / "start") if config.model_name == TINY else config.model_name
        dpo: dict[str, str | float] = {
            "loss.name": "sigmoid",
            "loss.beta": config.beta,
            "train.learning_rate": config.learning_rate,
        }
        if self.pairs.eval:
            dpo["eval_data"] = str(self.file("eval"))
        if not config.warm_start_epochs:
            return [self._run("dpo", start, config.epochs, dpo)]
        sft: dict[str, str | float] = {
            "loss.name": "sft",
            "train.learning_rate": config.sft_learning_rate,
            "train.schedule": "cosine",
        }
        return [
            self._run("sft", start, config.warm_start_epochs, sft),
            self._run("dpo", str(self.out / "sft" / "model"), config.epochs, dpo),
        ]

    def _run(
        self, name: str, model: str, epochs: int, values: Mapping[str, str | float]
    ) -> RunConfig:
        config, is_warm_start = self.config, name == "sft"
        rows = self.pairs.demonstrations if is_warm_start else self.pairs.train
        steps = -(-len(rows) // config.batch_size) * epochs
        values = {
            "model": model,
            "data": str(self.file("sft" if is_warm_start else "train")),
            "out": str(self.out / name),
            "train.epochs": epochs,
            "train.batch_size": config.batch_size,
            "train.warmup_steps": steps // 10,
            "train.seed": config.seed,
            **values,
        }
        if config.resume:
            values["train.resume"] = "auto"
        base = [Setting(key, value, "the policy's config") for key, value in values.items()]
        return resolve(base, [parse_assignment(text) for text in config.settings]).config


def _write_or_check(pairs: Sequence[PreferencePair], path: Path) -> None:
    """Write pairs, or see that a training that is resumed was on these."""
    if not path.exists():
        write_pairs(pairs, path)
    elif read_side(path) != list(pairs):
        raise InputError(f"{path}: cannot resume: the training that was stopped had other pairs")


def _make_start(pairs: PolicyPairs, folder: Path, seed: int) -> None:
    """Write an untrained tiny model and a tokenizer learned from the training pairs."""
    tokenizer = make_tiny_tokenizer(text for pair in pairs.train for text in _texts(pair))
    with atomic_directory(folder, replace=True) as temporary:
        save_model(make_tiny_model(tokenizer, seed=seed), temporary)
        tokenizer.save(temporary)


def _texts(pair: PreferencePair) -> list[str]:
    texts = (pair.prompt, pair.chosen, pair.rejected)
    return [text for text in texts if isinstance(text, str)]


def _run(run: RunConfig, kind: PolicyKind, console: Console) -> RunResult:
    """Do a run, and make its model a policy's."""
    result = train_run(run, console=console)
    write_json(result.model / f"{kind.name}_metadata.json", {"policy": kind.name})
    return result


def _measure(plan: _Plan, result: RunResult, console: Console) -> PolicyTrainingMetrics:
    train_loss = _last_epoch_loss(result.folder)
    prompts = [str(pair.prompt) for pair in plan.pairs.eval]
    if len(set(prompts)) < 2:
        return PolicyTrainingMetrics(train_loss, before=None, after=None)
    run = plan.runs()[-1]
    scoring = replace(
        run,
        model=str(result.model),
        revision=None,
        reference=run.model,
        reference_revision=run.revision,
        data=str(plan.file("eval")),
        eval_data=None,
        out=str(plan.out / "scores.jsonl"),
        train=replace(run.train, eval_every=None, keep_best=False, early_stopping=None),
    )
    scores = score_file(scoring, console=console)
    return PolicyTrainingMetrics(train_loss, *measure_held_out(scores, prompts))


def _last_epoch_loss(run: Path) -> float:
    lines = [line for line in read_metrics(run) if "loss" in line]
    last = math.ceil(lines[-1]["epoch"]) - 1
    return float(np.mean([line["loss"] for line in lines if line["epoch"] > last]))


def _metadata(
    pairs: PolicyPairs, config: PolicyTrainingConfig, metrics: PolicyTrainingMetrics
) -> JSON:
    return {
        "policy": pairs.kind.name,
        "config": to_json(config),
        "dataset": pairs.dataset,
        "demonstrations": len(pairs.demonstrations),
        "trainPairs": len(pairs.train),
        "evalPairs": len(pairs.eval),
        "metrics": {"trainLoss": metrics.train_loss, **metrics.summary},
        "createdAt": pairs.created_at,
    }


def _notes(
    pairs: PolicyPairs, config: PolicyTrainingConfig, metrics: PolicyTrainingMetrics
) -> list[str]:
    notes = []
    if metrics.after is None:
        notes.append(
            f"nothing was measured on held-out pairs: there are {len(pairs.eval)}, and intervals "
            "need two or more prompts"
        )
    if config.model_name == TINY and config.learning_rate < SLOW_FOR_TINY:
        notes.append(
            f"a tiny model from scratch hardly moves at a learning rate of {config.learning_rate}; "
            "1e-3 suits it"
        )
    return notes
