"""A whole run, from a config to a run folder: ``dpo train`` and ``dpo reference``.

What is composed here is defined elsewhere; this module decides what happens in which order, heeds
signals and writes the model. README.md describes the folder of a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo.adapter_files import adapter_parameters
from dpo.adapters import adapted_layers, rate_scales
from dpo.background import Background
from dpo.checkpoint import (
    Checkpoint,
    checkpoint_path,
    copied,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from dpo.config import RunConfig
from dpo.device import choose_device, describe_device, explained_lack_of_memory
from dpo.displacement import ADVICE
from dpo.distributed import joined_ranks
from dpo.duration import seconds_of
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
from dpo.parallel import check_parts, is_in_parts, kind_of_ranks
from dpo.precision import precision_of
from dpo.prepare import prepare_policy
from dpo.progress import Console, SilentConsole
from dpo.ranks import Ranks
from dpo.reference_pass import References, obtain_references
from dpo.rehearsal import hollow_policy
from dpo.report import REPORT, write_report
from dpo.report.record import CONFIG
from dpo.run_folder import (
    CHECKPOINTS,
    RunLog,
    find_checkpoint,
    go_on_from,
    read_evaluations,
    write_reproduction,
)
from dpo.run_header import header
from dpo.run_record import EvalPairsLog, Samples, write_data
from dpo.stopping import OUT_OF_TIME, TimeLimit, heeding_signals
from dpo.token_budget import choose_budget, with_budget
from dpo.tracking import Tracking, check_trackers, plain_config, tracking
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
        seconds: that the training took in this process.
    """

    folder: Path
    model: Path
    report: Path
    steps: int
    first: Metrics | None
    last: Metrics | None
    seconds: float


def train(config: RunConfig, *, console: Console, go_on: str | None = None) -> RunResult:
    """Train a model on preference pairs and write the run folder ``config.out``.

    Under torchrun the processes train one model together (``dpo.distributed``), and the first of
    them writes the folder.

    Args:
        config: of the run.
        console: is told what happens.
        go_on: what goes on with the run if it is stopped, in words; None: ``dpo resume``.

    Raises:
        InputError: the model, the data or the folder cannot be used.
        RunError: training cannot go on.
        SystemExit: a signal or the time stopped the run after a checkpoint; the code is 128 + the
            signal's number, or ``OUT_OF_TIME``.
    """
    limit = TimeLimit(config.train)
    check_trackers(config.train.track)
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: --out of dpo train is the folder of the run")
    device = choose_device(config.train)
    kind = kind_of_ranks(config)
    waits = timedelta(seconds=seconds_of(config.train.rank_timeout or "1h"))
    with (
        joined_ranks(device, kind, timeout=waits) as ranks,
        _held(folder, ranks),
        explained_lack_of_memory(),
    ):
        own_console, console = console, console if ranks.is_first else SilentConsole()
        checkpoint = _find_checkpoint(folder, config, ranks, console)
        told_before = len(console.told)
        models, inputs = _load(config, ranks, console, partial(_check_models, config))
        told_of_data = console.told[told_before:]
        config = pin_revisions(config, models, inputs)
        if checkpoint is not None:
            _refuse_another_run(checkpoint, config, models, inputs)
        if config.train.tokens_per_micro_batch == AUTO:
            budget = choose_budget(config, models.policy.config, inputs.pairs, device=device)
            console.say(budget.describe())
            config = with_budget(config, ranks.first([budget.tokens])[0])
        if ranks.is_first:
            whole = replace(config, train=replace(config.train, resume=None))
            for line in header(config, models, inputs, device=str(device)):
                console.say(line)
            atomic_write(folder / CONFIG, whole.to_toml())
            write_data(folder, inputs, told_of_data)
        trainer = _make_trainer(config, models, inputs, device, ranks, console)
        advice = go_on or f"dpo resume {folder}"
        run = _Run(config, models, trainer, console, own_console, limit, advice)
        run.begin_samples()
        if checkpoint is not None:
            run.restore(checkpoint)
        with tracking(
            config.train.track if ranks.is_first else None,
            folder,
            plain_config(config.flat()),
            step=trainer.step,
            console=console,
        ) as tracked:
            return run.train(tracked)


def compute_reference_only(config: RunConfig, *, console: Console) -> None:
    """Fill the reference cache for the pairs of ``config`` and train nothing.

    Raises:
        InputError: the model or the data cannot be used.
        RunError: a log-prob is not finite, or the device's memory is full.
    """
    device = choose_device(config.train)
    with joined_ranks(device) as ranks, explained_lack_of_memory():
        console = console if ranks.is_first else SilentConsole()
        models, inputs = _load(config, ranks, console)
        obtain_references(config, models, inputs, console, device=device, ranks=ranks)


@contextmanager
def _held(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder of a run, rid of what killed writers left, on the rank that writes to it."""
    with FolderLock(folder) if ranks.is_first else nullcontext():
        for place in (folder, folder / CHECKPOINTS) if ranks.is_first else ():
            remove_leftovers(place)
        yield


def _find_checkpoint(
    folder: Path, config: RunConfig, ranks: Ranks, console: Console
) -> Checkpoint | None:
    """Find what ``train.resume`` asks for; the other ranks read what the first has chosen."""
    if not ranks.is_first:
        path = ranks.first_text("")
        return load_checkpoint(Path(path)) if path else None
    checkpoint = find_checkpoint(folder, config.train.resume, console)
    ranks.first_text(str(checkpoint.path.resolve()) if checkpoint else "")
    return checkpoint


def _load(
    config: RunConfig,
    ranks: Ranks,
    console: Console,
    check: Callable[[Models], None] | None = None,
) -> tuple[Models, Inputs]:
    """Find models and read data: one rank of a machine fetches and tokenizes for all of them.

    Raises:
        InputError: one of them cannot be used, or a rank sees other data.
    """

    def load() -> tuple[Models, Inputs]:
        models = find_models(config)
        if check is not None:
            check(models)
        return models, load_inputs(config, models, console)

    models, inputs = ranks.one_before_others(load)
    ranks.check_same("the pairs", inputs.pairs.fingerprint)
    return models, inputs


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


def _check_models(config: RunConfig, models: Models) -> None:
    """Refuse before any data is read what cannot be trained in the way that is asked for.

    Raises:
        InputError: an option of an adapter or a name finds nothing, or a model cannot be in parts.
    """
    _check_adapter(config, models)
    _check_names(config, models)
    if is_in_parts(config.train):
        check_parts(config, models)


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
    config: RunConfig,
    models: Models,
    inputs: Inputs,
    device: torch.device,
    ranks: Ranks,
    console: Console,
) -> Trainer:
    loss, is_own_reference = config.loss.build(), models.reference is models.policy
    for pairs in (inputs.pairs, inputs.eval_pairs):
        if pairs is not None:  # the trainer asks the same, but after the reference is computed
            loss.check(pairs)
    # A policy that is its own reference is scored as it lies on disk: this comes before a resumed
    # run restores it. Another reference leaves the memory before the policy is loaded.
    policy = _load_policy(config, models.policy, device, ranks) if is_own_reference else None
    references = mismatched = References()
    reference_weights = None
    if uses_live_reference(loss, config.train):
        if not is_own_reference:
            model = _load_policy(config, models.reference, device, ranks)
            reference_weights = dict(model.named_parameters())
    elif loss.needs_reference:
        obtain = partial(
            obtain_references,
            config,
            models,
            console=console,
            device=device,
            model=policy,
            ranks=ranks,
        )
        references = obtain(inputs)
        if loss.needs_mismatch:
            mismatched = obtain(inputs.mismatched(seed=config.train.seed))
    policy = policy or _load_policy(config, models.policy, device, ranks)
    known = models.policy.adapter
    if known is not None and known.dropout:
        console.warn(f"{known.path} was trained with a dropout of {known.dropout}; here is none")
    ranks.take_apart(policy)
    prepare_policy(policy, config)
    rounds_to_nearest = config.train.dtype == "bfloat16" and not config.train.stochastic_rounding
    if rounds_to_nearest and not adapted_layers(policy):
        console.warn(
            "bfloat16 weights do not move at the learning rates of DPO, which lie below their "
            "resolution: --stochastic-rounding lets them, bf16-mixed keeps float32 weights"
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
        ranks=ranks,
    )


def _load_policy(
    config: RunConfig, folder: ModelFolder, device: torch.device, ranks: Ranks
) -> Decoder:
    dtype = precision_of(config.train).parameters
    return folder.load(dtype=dtype, device=device, ranks=ranks)


class _Run:
    """A trainer in its run folder, to which the first rank writes.

    Attributes:
        console: speaks on the first rank alone.
        own_console: speaks on every rank.
    """

    def __init__(
        self,
        config: RunConfig,
        models: Models,
        trainer: Trainer,
        console: Console,
        own_console: Console,
        limit: TimeLimit,
        go_on: str,
    ) -> None:
        self.config, self.models, self.trainer = config, models, trainer
        self.console, self.own_console, self.ranks = console, own_console, trainer.ranks
        self.limit, self.background = limit, Background()
        self.started = time.monotonic()
        self.folder = Path(config.out)
        self.go_on = go_on
        self.saved_step = 0
        self.has_warned = False  # of displacement
        self.is_out_of_time = False
        self.samples: Samples | None = None

    def begin_samples(self) -> None:
        """Let the model that is not yet trained answer held-out prompts, if that is asked for."""
        count, batches = self.config.train.samples, self.trainer.eval_batches
        if count is None or batches is None or not self.ranks.is_first:
            return
        tokenizer, model = self.models.tokenizer, self.models.policy.config
        self.samples = Samples(
            self.folder,
            batches.pairs,
            tokenizer,
            count=count,
            most_positions=model.max_positions,
        )
        self.samples.write_before(self._policy())

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
        if self.ranks.is_first:
            go_on_from(checkpoint, self.folder)

    def train(self, tracked: Tracking) -> RunResult:
        """Train to the end, leaving metrics and checkpoints, and write the model.

        Args:
            tracked: is given the metrics as well.

        Raises:
            RunError: a step is not finite, and the run is to stop there.
            SystemExit: a signal came, or the time is over.
        """
        if self.ranks.is_first:
            self.trainer.callbacks += [
                RunLog(self.folder, step=self.trainer.step, console=self.console),
                EvalPairsLog(self.folder),
                tracked,
            ]
        is_alone = self.ranks.processes == 1
        with (
            self.background,
            heeding_signals(self._stop, self.console, is_alone=is_alone) as received,
        ):
            try:
                self._train_steps()
            except NonFiniteError as error:
                self._save()
                self.background.finish()
                self.ranks.wait()  # a rank that ends is the end of all
                if not self.ranks.is_first:
                    raise SystemExit(1) from error  # the first has the same to tell
                path = write_reproduction(self.folder, self.trainer, error)
                raise RunError(f"{error}. The rows as the model saw them are in {path}") from error
            number = int(self.ranks.max(received[0] if received else 0))
            if number or self.ranks.any(self.is_out_of_time):
                self.console.warn(f"stopped at step {self.trainer.step}; go on with {self.go_on}")
                self.ranks.wait()
                raise SystemExit(128 + number if number else OUT_OF_TIME)
        self._write_model()
        self.ranks.wait()
        result = self._result()
        tracked.summary = result.last or {}
        return result

    def _train_steps(self) -> None:
        trainer, every = self.trainer, self.config.train.save_every
        trainer.watch = self._watch
        self.limit.begin_step()
        with self.console.bar(
            "train", trainer.total_steps, unit="steps", start=trainer.step
        ) as bar:
            for step in trainer:
                while trainer.notes:
                    rank = "" if self.ranks.is_first else f"rank {self.ranks.rank}: "
                    self.own_console.warn(rank + trainer.notes.pop(0))
                bar.update(step.number, status=_status(step.metrics))
                self._warn_of_displacement(step.metrics)
                self._tell_evaluation(step.evaluation)
                if self._best_step() == step.number or (every and step.number % every == 0):
                    self._save()
                self.background.check()
                self._heed_time()
        self._save()
        self.background.finish()

    def _stop(self) -> None:
        self.trainer.should_stop = True

    def _heed_time(self) -> None:
        """Stop unless another step ends within the time; the last one is done in any case."""
        self.limit.end_step()
        if self.trainer.step < self.trainer.total_steps and not self.limit.leaves_a_step():
            self.console.warn("the time is over: stopping after this step")
            self.is_out_of_time = True
            self._stop()

    @contextmanager
    def _watch(self, pairs: int) -> Iterator[Callable[[int], object]]:
        """Show how far an evaluation is."""
        with self.console.bar("evaluate", pairs, unit="pairs") as bar:
            yield bar.update

    def _tell_evaluation(self, metrics: Metrics | None) -> None:
        if metrics is not None:
            shown = _headline(metrics)
            self.console.say(f"step {self.trainer.step}, held out: {shown}")

    def _warn_of_displacement(self, metrics: Metrics | None) -> None:
        if metrics and metrics.get("displacement/alarm") and not self.has_warned:
            self.console.warn(f"step {self.trainer.step}: {ADVICE}")
            self.has_warned = True

    def _save(self) -> None:
        """Write a checkpoint, unless that of this step is written, and remove old ones."""
        trainer, checkpoints = self.trainer, self.folder / CHECKPOINTS
        if trainer.step == self.saved_step:
            return
        tensors, self.saved_step = trainer.tensors(), trainer.step
        if not self.ranks.is_first:
            return
        identity = models_identity(self.config, self.models)
        state = {**trainer.state(), **identity, "hardware": self._hardware()}
        step, keep, best = trainer.step, self.config.train.keep, self._best_step()

        def write(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
            save_checkpoint(checkpoints, step, tensors, state)
            prune(checkpoints, keep=keep, best=best)

        if self.config.train.save_in_background:
            self.background.finish()  # before another copy is made
            self.background.begin(partial(write, copied(tensors)))
        else:
            write(tensors)

    def _hardware(self) -> str:
        return describe_device(self.trainer.device, count=self.ranks.count)

    def _best_step(self) -> int | None:
        return self.trainer.best_step if self.config.train.keep_best else None

    def _model_step(self) -> int:
        return self._best_step() or self.trainer.step

    def _evaluations(self) -> list[dict[str, float]]:
        """Return the evaluations up to that of the model."""
        return read_evaluations(self.folder, up_to=self._model_step())

    def _write_model(self) -> None:
        """Write the model folder, of the best step if that is kept, and the report."""
        policy = self._policy()
        step = self._model_step()
        if step != self.trainer.step:
            best = load_checkpoint(checkpoint_path(self.folder / CHECKPOINTS, step))
            self.trainer.restore_weights(best.tensors)
            self.console.say(f"the model is that of step {step}, of the lowest evaluation loss")
        known = (policy, self.config, self.models)
        if not self.ranks.is_first:
            with self.trainer.averaged_weights():  # its parts, and no file
                write_trained_model(self.folder, *known, ranks=self.ranks)
            return
        with (
            atomic_directory(self.folder / "model", replace=True) as model_folder,
            self.trainer.averaged_weights(),
        ):
            write_trained_model(
                model_folder,
                *known,
                self._evaluations(),
                ranks=self.ranks,
                hardware=self._hardware(),
            )
            if self.samples is not None:
                self.samples.write_after(policy)
        write_report(self.folder)

    def _policy(self) -> Decoder:
        policy = self.trainer.module
        assert isinstance(policy, Decoder)
        return policy

    def _result(self) -> RunResult:
        evaluations = self._evaluations()
        return RunResult(
            folder=self.folder,
            model=self.folder / "model",
            report=self.folder / REPORT,
            steps=self.trainer.step,
            first=evaluations[0] if evaluations else None,
            last=evaluations[-1] if evaluations else None,
            seconds=time.monotonic() - self.started,
        )


def _headline(metrics: Metrics) -> str:
    """Say the loss of an evaluation and, where rows are pairs, accuracy and margin."""
    words = [f"loss {metrics['eval/loss']:.4f}"]
    if "eval/rewards/accuracy" in metrics:
        words.append(f"accuracy {metrics['eval/rewards/accuracy']:.3f}")
        words.append(f"margin {metrics['eval/rewards/margin']:+.4f}")
    return "  ".join(words)


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
