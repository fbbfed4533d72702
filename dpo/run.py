"""A whole run, from a config to a run folder: ``dpo train`` and ``dpo reference``.

What is composed here is defined elsewhere; this module decides what happens in which order, heeds
signals and writes the model. README.md describes the folder of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo.adapter_files import adapter_parameters
from dpo.adapters import adapted_layers, rate_scales
from dpo.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, prune, save_checkpoint
from dpo.config import RunConfig
from dpo.device import choose_device, explained_lack_of_memory
from dpo.displacement import ADVICE
from dpo.errors import InputError, RunError
from dpo.files import OTHER_SHAPE, FolderLock, atomic_directory, atomic_write, remove_leftovers
from dpo.identity import refuse_another_run, training_identity
from dpo.inputs import (
    Inputs,
    ModelFolder,
    Models,
    find_models,
    load_inputs,
    pin_revisions,
)
from dpo.models import Decoder
from dpo.optim import rate_scales as find_rates
from dpo.optim import trained_names
from dpo.precision import precision_of
from dpo.prepare import prepare_policy
from dpo.progress import Console
from dpo.reference_pass import References, obtain_references
from dpo.rehearsal import hollow_policy
from dpo.report import write_report
from dpo.run_folder import (
    CHECKPOINTS,
    RunLog,
    find_checkpoint,
    go_on_from,
    read_evaluations,
    write_reproduction,
)
from dpo.stopping import OUT_OF_TIME, TimeLimit, heeding_signals
from dpo.token_budget import choose_budget, with_budget
from dpo.train_config import AUTO
from dpo.trained_model import models_identity, write_trained_model
from dpo.trainer import Metrics, NonFiniteError, Trainer, uses_live_reference


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: the run folder.
        model: the folder of the trained model.
        report: the page about the run.
        steps: optimizer steps done.
        first: the first evaluation, before the first step; None without held-out pairs.
        last: the evaluation of the saved model; None without held-out pairs.
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
        SystemExit: a signal or the time stopped the run after a checkpoint; the code is 128 + the
            signal's number, or ``OUT_OF_TIME``.
    """
    limit = TimeLimit(config.train)
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: --out of dpo train is the folder of the run")
    with FolderLock(folder), explained_lack_of_memory():
        for place in (folder, folder / CHECKPOINTS):
            remove_leftovers(place)
        checkpoint = find_checkpoint(folder, config.train.resume, console)
        device = choose_device(config.train)
        models = find_models(config)
        _check_adapter(config, models)
        _check_names(config, models)
        inputs = load_inputs(config, models, console)
        config = pin_revisions(config, models, inputs)
        if checkpoint is not None:
            _refuse_another_run(checkpoint, config, models, inputs)
        if config.train.tokens_per_micro_batch == AUTO:
            budget = choose_budget(config, models.policy.config, inputs.pairs, device=device)
            console.say(budget.describe())
            config = with_budget(config, budget.tokens)
        whole = replace(config, train=replace(config.train, resume=None))
        atomic_write(folder / "config.toml", whole.to_toml())
        trainer = _make_trainer(config, models, inputs, device, console)
        run = _Run(config, models, trainer, console, limit)
        if checkpoint is not None:
            run.restore(checkpoint)
        return run.train()


def compute_reference_only(config: RunConfig, *, console: Console) -> None:
    """Fill the reference cache for the pairs of ``config`` and train nothing.

    Raises:
        InputError: the model or the data cannot be used.
        RunError: a log-prob is not finite, or the device's memory is full.
    """
    device = choose_device(config.train)
    models = find_models(config)
    inputs = load_inputs(config, models, console)
    with explained_lack_of_memory():
        obtain_references(config, models, inputs, console, device=device)


def _refuse_another_run(
    checkpoint: Checkpoint, config: RunConfig, models: Models, inputs: Inputs
) -> None:
    """Compare a checkpoint with the run that is to go on from it, before anything is computed.

    Raises:
        InputError: it is of another run, or lacks the best model that is to be kept.
    """
    training = training_identity(config.train, config.loss.build(), inputs.pairs, inputs.eval_pairs)
    identity = {**models_identity(config, models), **training}
    refuse_another_run(checkpoint.state, identity, source=str(checkpoint.path))
    best = checkpoint.state["best_step"]
    if not config.train.keep_best or best is None:
        return
    if not (path := checkpoint_path(checkpoint.path.parent, best)).exists():
        raise InputError(
            f"cannot resume from {checkpoint.path} with train.keep_best: {path}, the best so far, "
            "was not kept; go on with --no-keep-best"
        )


def _check_adapter(config: RunConfig, models: Models) -> None:
    """Refuse options of an adapter that the model at hand would ignore.

    Raises:
        InputError: an adapter is asked for twice, or an option asks for one that there is not.
    """
    has_adapter = models.policy.adapter is not None
    if has_adapter and config.adapter.kind is not None:
        raise InputError(
            f"adapter.kind is {config.adapter.kind}, but {models.policy.name} is an adapter "
            "already, which is trained on: leave adapter.kind away, or merge it first (dpo merge)"
        )
    if has_adapter or config.adapter.kind is not None:
        return
    for name in ("quantize", "b_rate_ratio"):
        if getattr(config.adapter, name) is not None:
            raise InputError(
                f"adapter.{name} needs an adapter to train: give adapter.kind, or a model that is "
                "an adapter"
            )


def _check_names(config: RunConfig, models: Models) -> None:
    """Refuse names of layers and of parameters that find none, by a policy without memory.

    The trainer and the adapter ask the same, but after the reference is computed.

    Raises:
        InputError: adapter.targets or a pattern of train.rates finds nothing.
    """
    if config.adapter.kind is None and not config.train.rates:
        return
    if (known := models.policy.adapter) is not None:
        names = adapter_parameters(known.path)
    else:
        with FakeTensorMode():
            policy = hollow_policy(models.policy.config, config)
            prepare_policy(policy, config)
        names = trained_names(policy)
    find_rates(names, config.train.rates)


def _make_trainer(
    config: RunConfig, models: Models, inputs: Inputs, device: torch.device, console: Console
) -> Trainer:
    loss, is_own_reference = config.loss.build(), models.reference is models.policy
    for pairs in (inputs.pairs, inputs.eval_pairs):
        if pairs is not None:  # the trainer asks the same, but after the reference is computed
            loss.check(pairs)
    # A policy that is its own reference is scored as it lies on disk: this comes before a resumed
    # run restores it. Another reference leaves the memory before the policy is loaded.
    policy = _load_policy(config, models.policy, device) if is_own_reference else None
    references = mismatched = References()
    reference_weights = None
    if uses_live_reference(loss, config.train):
        if not is_own_reference:
            model = _load_policy(config, models.reference, device)
            reference_weights = dict(model.named_parameters())
    elif loss.needs_reference:
        references = obtain_references(config, models, inputs, console, device=device, model=policy)
        if loss.needs_mismatch:
            beside = inputs.mismatched(seed=config.train.seed)
            mismatched = obtain_references(
                config, models, beside, console, device=device, model=policy
            )
    policy = policy or _load_policy(config, models.policy, device)
    known = models.policy.adapter
    if known is not None and known.dropout:
        console.warn(f"{known.path} was trained with a dropout of {known.dropout}; here is none")
    prepare_policy(policy, config)
    if config.train.dtype == "bfloat16" and not adapted_layers(policy):
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
        mismatched_reference=mismatched.pairs,
        eval_mismatched_reference=mismatched.eval_pairs,
        reference_weights=reference_weights,
        starts_at_reference=is_own_reference,
        rate_factors=rate_scales(policy, config.adapter.b_rate_ratio or 1.0),
    )


def _load_policy(config: RunConfig, folder: ModelFolder, device: torch.device) -> Decoder:
    dtype = precision_of(config.train).parameters
    return folder.load(dtype=dtype, device=device)


class _Run:
    """A trainer in its run folder."""

    def __init__(
        self,
        config: RunConfig,
        models: Models,
        trainer: Trainer,
        console: Console,
        limit: TimeLimit,
    ) -> None:
        self.config, self.models, self.trainer, self.console = config, models, trainer, console
        self.limit = limit
        self.folder = Path(config.out)
        self.saved_step = 0
        self.has_warned = False  # of displacement
        self.is_out_of_time = False

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same run.

        Raises:
            InputError: it is of another run.
            RunError: it is of none of this engine.
        """
        try:
            self.trainer.restore(checkpoint.tensors, checkpoint.state)
        except (InputError, RunError):
            raise
        except (RuntimeError, *OTHER_SHAPE) as error:
            raise RunError(
                f"{checkpoint.path} was not written by this engine: {error!r}"
            ) from error
        self.saved_step = self.trainer.step
        go_on_from(checkpoint, self.folder)

    def train(self) -> RunResult:
        """Train to the end, leaving metrics and checkpoints, and write the model.

        Raises:
            RunError: a step is not finite, and the run is to stop there.
            SystemExit: a signal came, or the time is over.
        """
        self.trainer.callbacks.append(
            RunLog(self.folder, step=self.trainer.step, console=self.console)
        )
        with heeding_signals(self._stop, self.console) as received:
            try:
                self._train_steps()
            except NonFiniteError as error:
                self._save()
                path = write_reproduction(self.folder, self.trainer, error)
                raise RunError(f"{error}. The rows as the model saw them are in {path}") from error
        if received or self.is_out_of_time:
            self.console.warn(
                f"stopped at step {self.trainer.step}; go on with dpo resume {self.folder}"
            )
            raise SystemExit(128 + received[0] if received else OUT_OF_TIME)
        return self._write_model()

    def _train_steps(self) -> None:
        trainer, every = self.trainer, self.config.train.save_every
        self.limit.begin_step()
        with self.console.bar(
            "train", trainer.total_steps, unit="steps", start=trainer.step
        ) as bar:
            for step in trainer:
                while trainer.notes:
                    self.console.warn(trainer.notes.pop(0))
                bar.update(step.number, status=_status(step.metrics))
                self._warn_of_displacement(step.metrics)
                if self._best_step() == step.number or (every and step.number % every == 0):
                    self._save()
                self._heed_time()
        self._save()

    def _stop(self) -> None:
        self.trainer.should_stop = True

    def _heed_time(self) -> None:
        """Stop unless another step ends within the time; the last one is done in any case."""
        self.limit.end_step()
        if self.trainer.step < self.trainer.total_steps and not self.limit.leaves_a_step():
            self.console.warn("the time is over: stopping after this step")
            self.is_out_of_time = True
            self._stop()

    def _warn_of_displacement(self, metrics: Metrics | None) -> None:
        if metrics and metrics.get("displacement/alarm") and not self.has_warned:
            self.console.warn(f"step {self.trainer.step}: {ADVICE}")
            self.has_warned = True

    def _save(self) -> None:
        """Write a checkpoint, unless that of this step is written, and remove old ones."""
        trainer, checkpoints = self.trainer, self.folder / CHECKPOINTS
        if trainer.step == self.saved_step:
            return
        state = {**trainer.state(), **models_identity(self.config, self.models)}
        save_checkpoint(checkpoints, trainer.step, trainer.tensors(), state)
        self.saved_step = trainer.step
        prune(checkpoints, keep=self.config.train.keep, best=self._best_step())

    def _best_step(self) -> int | None:
        return self.trainer.best_step if self.config.train.keep_best else None

    def _write_model(self) -> RunResult:
        """Write the model folder, of the best step if that is kept, and the report."""
        policy = self.trainer.module
        assert isinstance(policy, Decoder)
        step = self._best_step() or self.trainer.step
        if step != self.trainer.step:
            best = load_checkpoint(checkpoint_path(self.folder / CHECKPOINTS, step))
            self.trainer.restore_weights(best.tensors)
            self.console.say(f"the model is that of step {step}, of the lowest evaluation loss")
        evaluations = read_evaluations(self.folder, up_to=step)
        with (
            atomic_directory(self.folder / "model", replace=True) as model_folder,
            self.trainer.averaged_weights(),
        ):
            write_trained_model(model_folder, policy, self.config, self.models, evaluations)
        return RunResult(
            folder=self.folder,
            model=self.folder / "model",
            report=write_report(self.folder),
            steps=self.trainer.step,
            first=evaluations[0] if evaluations else None,
            last=evaluations[-1] if evaluations else None,
        )


def _status(metrics: Metrics | None) -> str | None:
    if metrics is None or math.isnan(metrics["loss"]):  # all steps since the last were skipped
        return None
    of_pairs = ""
    if not math.isnan(metrics["rewards/accuracy"]):  # which unpaired answers have not
        of_pairs = (
            f"acc {metrics['rewards/accuracy']:.3f}  margin {metrics['rewards/margin']:+.4f}  "
        )
    return (
        f"loss {metrics['loss']:.4f}  {of_pairs}{metrics['perf/pairs_per_s']:.1f} pairs/s  "
        f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"
    )
