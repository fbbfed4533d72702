"""A trainer in its run folder: the loop over its steps, what is told and saved, and the model.

README.md describes the folder of a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo.checkpoint import Checkpoint, checkpoint_path, load_checkpoint
from dpo.config import RunConfig
from dpo.device import describe_device
from dpo.displacement import ADVICE
from dpo.errors import InputError, RunError
from dpo.files import OTHER_SHAPE, atomic_directory
from dpo.inputs import Models
from dpo.models import Decoder
from dpo.progress import Console
from dpo.report import REPORT, write_report
from dpo.run_folder import CHECKPOINTS, RunLog, go_on_from, read_evaluations, write_reproduction
from dpo.run_record import EvalPairsLog, Samples
from dpo.saving import Saver
from dpo.stopping import OUT_OF_TIME, TimeLimit, heeding_signals
from dpo.throughput import peak_memory_mib
from dpo.tracking import Tracking
from dpo.trained_model import models_identity, write_trained_model
from dpo.trainer import Metrics, NonFiniteError, Trainer


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
        peak_mib: the most memory that this process had: allocated on a GPU, resident on a CPU.
    """

    folder: Path
    model: Path
    report: Path
    steps: int
    first: Metrics | None
    last: Metrics | None
    seconds: float
    peak_mib: float


class RunLoop:
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
        self.limit = limit
        self.started = time.monotonic()
        self.folder = Path(config.out)
        self.saver = Saver(
            self.folder / CHECKPOINTS,
            self.ranks,
            keep=config.train.keep,
            beside_steps=config.train.save_in_background,
        )
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
            self.saver,
            heeding_signals(self._stop, self.console, is_alone=is_alone) as received,
        ):
            try:
                self._train_steps()
            except NonFiniteError as error:
                self._save()
                self.saver.finish()
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
                self.saver.check()
                self._heed_time()
        self._save()
        self.saver.finish()

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
        trainer = self.trainer
        if trainer.step == self.saved_step:
            return
        self.saved_step = trainer.step
        state = self._state() if self.ranks.is_first else {}
        self.saver.save(trainer.step, trainer.tensors(), state, best=self._best_step())

    def _state(self) -> dict[str, float | int | str | None]:
        identity = models_identity(self.config, self.models)
        return {**self.trainer.state(), **identity, "hardware": self._hardware()}

    def _hardware(self) -> str:
        return describe_device(self.trainer.device, count=self.ranks.count)

    def _best_step(self) -> int | None:
        return self.trainer.best.step if self.config.train.keep_best else None

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
            path = checkpoint_path(self.folder / CHECKPOINTS, step)
            best = load_checkpoint(path, self.ranks)
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
            peak_mib=peak_memory_mib(self.trainer.device),
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
