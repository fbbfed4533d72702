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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo.config import RunConfig
from dpo.data.dataset import Dataset
from dpo.data.dataset_files import MIN_PAIRS
from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.kinds.consolidation import ConsolidationAction, ConsolidationState
from dpo.data.kinds.extraction import ExtractionAction, ExtractionState
from dpo.data.kinds.retrieval import RetrievalAction, RetrievalState
from dpo.data.kinds.schema import to_json
from dpo.errors import InputError, RunError
from dpo.eval.bootstrap import ConfidenceInterval, compute_confidence_interval
from dpo.eval.held_out import HeldOut, measure_held_out, summarize
from dpo.eval.language_model import LanguageModelPolicy
from dpo.eval.policies import Policy, RulesPolicy, decide_all
from dpo.eval.policy_pairs import PolicyPairs, pairs_of_dataset, read_side
from dpo.eval.tiny import make_tiny_tokenizer
from dpo.files import JSON, atomic_directory, write_json
from dpo.models import save_model
from dpo.models.tiny import make_tiny_model
from dpo.preferences import PreferencePair, write_pairs
from dpo.progress import Console
from dpo.report import write_report
from dpo.run import train as train_run
from dpo.run_folder import read_metrics
from dpo.run_loop import RunResult
from dpo.score import score_file
from dpo.settings import Setting, parse_assignment, resolve
from dpo.tokenizer import load_tokenizer

TINY = "tiny"
SFT_LEARNING_RATE = 3e-3
# what a run is told by the other fields of the config
_OWNED = frozenset(
    {
        *("model", "data", "out", "eval_data", "loss.beta", "train.epochs", "train.batch_size"),
        *("train.learning_rate", "train.seed", "train.resume"),
    }
)
TINY_SFT_STEPS = 300  # fewer leave a model from scratch with one action for every state
DECIDED_STATES = 1000  # most held-out states that the trained policy decides for its result
SLOW_FOR_TINY = 1e-4  # learning rate below which a model from scratch hardly moves


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTrainingConfig:
    """How a policy is trained.

    Raises:
        InputError: values are out of range; names all of them.

    Example:
        >>> from dpo import PolicyTrainingConfig
        >>> PolicyTrainingConfig(output_path="out", epochs=3, learning_rate=1e-3).has_warm_start
        True
    """

    output_path: str
    """Folder for everything; must not exist or be empty, unless ``resume``."""
    model_name: str = TINY
    """What to start from: "tiny", a small Llama from scratch; a model folder; an id of the Hub.
    (In the document it is a name for the result; here the result is named by its folder.)"""
    epochs: int = 10
    """Passes of DPO over the training pairs, at least 1."""
    batch_size: int = 32
    """Pairs per optimizer step, at least 1."""
    learning_rate: float = 1e-5
    """Peak learning rate of DPO, above 0; a tiny model wants more, such as 1e-3."""
    beta: float = 0.1
    """How strongly DPO is held to its start, above 0."""
    sft_epochs: int | None = None
    """Passes of the warm start over the demonstrations; None: as many as 300 steps take for a tiny
    model, else 0."""
    sft_learning_rate: float | None = None
    """Peak learning rate of the warm start, above 0; None: 3e-3."""
    min_pairs: int = MIN_PAIRS
    """Least number of training pairs, at least 1."""
    seed: int = 0
    """Of the weights from scratch and of the order of the pairs, at least 0."""
    resume: bool = False
    """Go on in ``output_path`` where a training with the same config was stopped."""
    settings: tuple[str, ...] = ()
    """Further options, as for ``dpo train --set``: "train.dtype=bf16-mixed". Those of the loss are
    for DPO alone; what the other fields say cannot be set."""

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
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf
        ]
        faults += [
            f"{text}: {parse_assignment(text).key} follows from other options, it cannot be set"
            for text in self.settings
            if parse_assignment(text).key in _OWNED
        ]
        if self.sft_learning_rate is not None and not self.has_warm_start:
            faults.append("sft_learning_rate has no effect: there is no warm start")
        faults += [
            f"{name} must not be empty"
            for name in ("model_name", "output_path")
            if not getattr(self, name)
        ]
        if faults:
            raise InputError("\n".join(faults))

    @property
    def has_warm_start(self) -> bool:
        """Whether there is a warm start."""
        return self.model_name == TINY if self.sft_epochs is None else self.sft_epochs > 0

    def warm_start_epochs(self, demonstrations: int) -> int:
        """Return the epochs of a warm start on so many demonstrations, the default filled in."""
        if self.sft_epochs is not None:
            return self.sft_epochs
        return math.ceil(TINY_SFT_STEPS / math.ceil(demonstrations / self.batch_size))


@dataclass(frozen=True, slots=True)
class PolicyTrainingMetrics:
    """What training brought. None is what was not measured, for lack of held-out pairs."""

    train_loss: float
    """Mean DPO loss of the steps of the last epoch, each before its update."""
    train_interval: ConfidenceInterval | None
    """The same with an interval; None where that epoch has one step."""
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
    decided: Mapping[str, Mapping[str, int]] | None = None
    """How often the rules, the policy before DPO (``start``) and the ``policy`` take an action of
    each class, in held-out situations (at most 1,000); None without any."""
    notes: tuple[str, ...] = ()
    """What a reader of the metrics should know."""
    error: str | None = None


def train_extraction_policy(
    dataset: Dataset[ExtractionState, ExtractionAction], config: PolicyTrainingConfig
) -> PolicyTrainingResult:
    """Train the policy that decides what to store; what is wrong is in the result.

    Example:
        >>> from dpo import PolicyTrainingConfig, build_extraction_dataset, train_extraction_policy
        >>> dataset = build_extraction_dataset("feedback.db", split_by="group")
        >>> config = PolicyTrainingConfig(
        ...     output_path="extraction", epochs=1, sft_epochs=1, min_pairs=1
        ... )
        >>> train_extraction_policy(dataset, config).success
        True
    """
    return _train_kind("extraction", dataset, config)


def train_retrieval_policy(
    dataset: Dataset[RetrievalState, RetrievalAction], config: PolicyTrainingConfig
) -> PolicyTrainingResult:
    """Train the policy that decides what to recall; what is wrong is in the result.

    Example:
        >>> from dpo import PolicyTrainingConfig, build_retrieval_dataset, train_retrieval_policy
        >>> dataset = build_retrieval_dataset("feedback.db", split_by="group")
        >>> config = PolicyTrainingConfig(
        ...     output_path="retrieval", epochs=1, sft_epochs=1, min_pairs=1
        ... )
        >>> train_retrieval_policy(dataset, config).success
        True
    """
    return _train_kind("retrieval", dataset, config)


def train_consolidation_policy(
    dataset: Dataset[ConsolidationState, ConsolidationAction], config: PolicyTrainingConfig
) -> PolicyTrainingResult:
    """Train the policy that decides what to merge; what is wrong is in the result.

    Example:
        >>> from dpo import PolicyTrainingConfig, train_consolidation_policy
        >>> from dpo import build_consolidation_dataset
        >>> dataset = build_consolidation_dataset(
        ...     "feedback.db", split_by="group", remove_crossing="prompt"
        ... )
        >>> config = PolicyTrainingConfig(
        ...     output_path="consolidation", epochs=1, sft_epochs=1, min_pairs=1
        ... )
        >>> train_consolidation_policy(dataset, config).success
        True
    """
    return _train_kind("consolidation", dataset, config)


def _train_kind(
    policy: str, dataset: Dataset[Any, Any], config: PolicyTrainingConfig
) -> PolicyTrainingResult:
    try:
        return train_policy(pairs_of_dataset(dataset, KINDS[policy], config.min_pairs), config)
    except (InputError, RunError, OSError) as error:
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
    if config.has_warm_start:
        _write_or_check(pairs.demonstrations, plan.file("sft"))
    _write_or_check(pairs.train, plan.file("train"))
    _write_or_check(pairs.eval, plan.file("eval"))
    if config.model_name == TINY and not (out / "start").exists():
        _make_start(pairs, out / "start", config.seed)
    results = [_run(run, pairs.kind, console) for run in runs]
    metrics = _measure(plan, results[-1], console)
    decided = _decide(pairs, results) if pairs.situations else None
    write_json(out / f"{pairs.kind.name}_metadata.json", _metadata(pairs, config, metrics, decided))
    write_json(results[-1].folder / "summary.json", metrics.summary)
    return PolicyTrainingResult(
        success=True,
        model_path=results[-1].model,
        start_path=results[0].model if len(results) > 1 else None,
        report_path=write_report(results[-1].folder),
        metrics=metrics,
        decided=decided and {name: by_class(pairs.kind, each) for name, each in decided.items()},
        notes=tuple(_notes(pairs, config, metrics, decided)),
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
        if not config.has_warm_start:
            return [self._run("dpo", start, config.epochs, dpo)]
        sft: dict[str, str | float] = {
            "loss.name": "sft",
            "train.learning_rate": config.sft_learning_rate or SFT_LEARNING_RATE,
            "train.schedule": "cosine",
        }
        return [
            self._run("sft", start, config.warm_start_epochs(len(self.pairs.demonstrations)), sft),
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
        given = [parse_assignment(text) for text in config.settings]
        if is_warm_start:
            given = [setting for setting in given if not setting.key.startswith("loss.")]
        return resolve(base, given).config


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
    result = train_run(run, console=console, go_on="the same dpo train-policy and --resume")
    write_json(result.model / f"{kind.name}_metadata.json", {"policy": kind.name})
    return result


def _measure(plan: _Plan, result: RunResult, console: Console) -> PolicyTrainingMetrics:
    losses = _last_epoch_losses(result.folder)
    interval = compute_confidence_interval(losses) if len(losses) > 1 else None
    train_loss = interval.mean if interval else losses[0]
    prompts = [str(pair.prompt) for pair in plan.pairs.eval]
    if len(set(prompts)) < 2:
        return PolicyTrainingMetrics(train_loss, interval, before=None, after=None)
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
    return PolicyTrainingMetrics(train_loss, interval, *measure_held_out(scores, prompts))


def _last_epoch_losses(run: Path) -> list[float]:
    lines = [line for line in read_metrics(run) if "loss" in line]
    last = math.ceil(lines[-1]["epoch"]) - 1
    return [line["loss"] for line in lines if line["epoch"] > last]


def _decide(pairs: PolicyPairs, results: Sequence[RunResult]) -> dict[str, Counter[str]]:
    """Count the answers (their texts) of the rules, the start and the policy, held out."""
    kind, states = pairs.kind, pairs.situations[:DECIDED_STATES]
    names = ("start", "policy")[-len(results) :]
    policies: list[tuple[str, Policy]] = [("rules", RulesPolicy(kind))]
    policies += [
        (name, LanguageModelPolicy.load(result.model))
        for name, result in zip(names, results, strict=True)
    ]
    return {
        name: Counter(kind.render_action(each.action) for each in decide_all(policy, states))
        for name, policy in policies
    }


def by_class(kind: PolicyKind, answers: Mapping[str, int]) -> dict[str, int]:
    """Add counts of answers up by the class of their action; every class of the kind is there."""
    counts = dict.fromkeys(kind.classes, 0)
    for text, count in answers.items():
        counts[kind.action_class(kind.parse_response(text))] += count
    return counts


def _metadata(
    pairs: PolicyPairs,
    config: PolicyTrainingConfig,
    metrics: PolicyTrainingMetrics,
    decided: Mapping[str, Mapping[str, int]] | None,
) -> JSON:
    return {
        "policy": pairs.kind.name,
        "config": to_json(config),
        "dataset": pairs.dataset,
        "demonstrations": len(pairs.demonstrations),
        "trainPairs": len(pairs.train),
        "evalPairs": len(pairs.eval),
        "metrics": {"trainLoss": metrics.train_loss, **metrics.summary},
        "decided": decided,
        "createdAt": pairs.created_at,
    }


def _notes(
    pairs: PolicyPairs,
    config: PolicyTrainingConfig,
    metrics: PolicyTrainingMetrics,
    decided: Mapping[str, Mapping[str, int]] | None,
) -> list[str]:
    notes = []
    if decided and len(decided["policy"]) == 1 < len(decided["rules"]):
        ((text, count),) = decided["policy"].items()
        notes.append(
            f"the policy takes one and the same action in all {count} held-out situations, "
            f"{' '.join(text.split())}: more data, or a longer warm start (sft_epochs), is needed"
        )
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
