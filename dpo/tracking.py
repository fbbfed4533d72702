"""The metrics of a run in other programs too: TensorBoard, Weights & Biases, MLflow.

Nothing of them is imported, written or sent unless ``train.track`` names them. ``metrics.jsonl`` is
always written and always complete: a tracker that fails is told of once and left out.

To add one, write a class with the methods of ``Tracker`` and add a line to ``TRACKERS``.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from dpo.errors import InputError
from dpo.files import OTHER_SHAPE, read_json, write_json
from dpo.progress import Console

PROJECT = "dpo-engine"  # of runs whose environment names none
IDS = "tracking.json"  # of the runs of a folder by tracker, so that a resumed run goes on there

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunStart:
    """What a tracker is told of a run.

    Attributes:
        folder: of the run.
        config: every option by its key.
        step: optimizer steps done before, as in a resumed run.
        id: of the tracker's own run, if it has begun before.
    """

    folder: Path
    config: Mapping[str, object]
    step: int = 0
    id: str | None = None


class Tracker(Protocol):
    """A run in another program, begun by making it."""

    @property
    def id(self) -> str | None:
        """By which the program knows the run; None if its folder is enough."""
        ...

    def log(self, step: int, metrics: Metrics) -> None:
        """Note finite metrics of a step or of an evaluation after it."""
        ...

    def finish(self, summary: Metrics, *, is_done: bool) -> None:
        """End with the evaluation of the saved model, or early, where ``is_done`` is false."""
        ...


class TensorBoard:
    """Writes event files into ``RUN/tensorboard``: ``tensorboard --logdir RUN``."""

    id = None

    def __init__(self, start: RunStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run wrote of later steps is hidden
        purge = start.step + 1 if start.step else None
        self._writer: Any = SummaryWriter(str(start.folder / "tensorboard"), purge_step=purge)
        rows = "\n".join(f"| {key} | {value} |" for key, value in start.config.items())
        self._writer.add_text("config", f"| key | value |\n| --- | --- |\n{rows}", start.step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write scalars, at once: a kill is to lose none."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, summary: Metrics, *, is_done: bool) -> None:
        """Close the files."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, wherever its own environment says: ``WANDB_MODE=offline`` etc."""

    def __init__(self, start: RunStart) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
        import wandb

        self.id = start.id or secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or start.folder.resolve().name,
            id=self.id,
            dir=str(start.folder),
            config=dict(start.config),
            resume="allow" if start.id and os.environ.get("WANDB_MODE") != "offline" else None,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        """Log at the step of the optimizer."""
        self._run.log(dict(metrics), step=step)

    def finish(self, summary: Metrics, *, is_done: bool) -> None:
        """Put the saved model's evaluation into the summary, and wait until all is written."""
        self._run.summary.update({f"model/{name}": value for name, value in summary.items()})
        self._run.finish(exit_code=0 if is_done else 1)


class MLflow:
    """A run of MLflow, on the server or in the store that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self, start: RunStart) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        if start.id is not None:
            self.id = start.id
            self._client.update_run(start.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        run = self._client.create_run(experiment, run_name=start.folder.resolve().name)
        self.id = str(run.info.run_id)
        params = [Param(key, str(value)[:500]) for key, value in start.config.items()]
        for first in range(0, len(params), 100):  # the most that a server takes at once
            self._client.log_batch(self.id, params=params[first : first + 100])

    def log(self, step: int, metrics: Metrics) -> None:
        """Log at the step of the optimizer, under names without what MLflow refuses."""
        now = int(time.time() * 1000)
        values = [
            self._metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self.id, metrics=values)

    def finish(self, summary: Metrics, *, is_done: bool) -> None:
        """Log the saved model's evaluation and end the run."""
        if summary:
            self.log(0, {f"model/{name}": value for name, value in summary.items()})
        self._client.set_terminated(self.id, status="FINISHED" if is_done else "KILLED")


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """How a tracker is begun, and the package that it needs, which is its extra's name too."""

    start: Callable[[RunStart], Tracker]
    package: str


TRACKERS: Mapping[str, TrackerKind] = {
    "tensorboard": TrackerKind(TensorBoard, "tensorboard"),
    "wandb": TrackerKind(WandB, "wandb"),
    "mlflow": TrackerKind(MLflow, "mlflow"),
}


def tracker_names(text: str | None) -> list[str]:
    """Read the names in ``train.track``.

    Raises:
        InputError: one is unknown, or is there twice.
    """
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in TRACKERS]:
        raise InputError(f"no tracker {unknown[0]!r}, only {', '.join(TRACKERS)}")
    if len(set(names)) < len(names):
        raise InputError(f"{text!r} names a tracker twice")
    return names


def check_trackers(text: str | None) -> None:
    """Refuse trackers whose package is not installed; nothing is imported.

    Raises:
        InputError: one is missing.
    """
    for name in tracker_names(text):
        package = TRACKERS[name].package
        if find_spec(package) is None:
            raise InputError(
                f"train.track: {name} needs the package {package}: pip install "
                f"'dpo-engine[{package}]'"
            )


class Tracking:
    """The trackers of a run, as a callback of the trainer; at their first fault they are left."""

    def __init__(self, trackers: Mapping[str, Tracker], console: Console) -> None:
        self._trackers, self._console = dict(trackers), console
        self.summary: Metrics = {}

    def __call__(self, _trainer: object, metrics: Metrics) -> None:
        """Hand a line of metrics on, without what is not finite."""
        step, finite = int(metrics["step"]), _finite(metrics)
        self._each(lambda tracker: tracker.log(step, finite))

    def finish(self, *, is_done: bool) -> None:
        """End all of them."""
        summary = _finite(self.summary)
        self._each(lambda tracker: tracker.finish(summary, is_done=is_done))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._trackers[name]
                self._console.warn(
                    f"{name} is left out from here on, metrics.jsonl has all: {error!r}"
                )


@contextmanager
def tracking(
    text: str | None,
    folder: Path,
    config: Mapping[str, object],
    *,
    step: int,
    console: Console,
) -> Iterator[Tracking]:
    """Begin the trackers of a run, and end them with it, however it ends.

    Args:
        text: ``train.track``.
        folder: of the run.
        config: every option by its key.
        step: optimizer steps done before.
        console: hears of trackers that fail.

    Raises:
        InputError: one cannot begin. In a run that goes on it is told and left out.
    """
    names = tracker_names(text)
    ids = _read_ids(folder) if step else {}
    trackers: dict[str, Tracker] = {}
    for name in names:
        try:
            trackers[name] = TRACKERS[name].start(RunStart(folder, config, step, ids.get(name)))
        except Exception as error:
            if not step:
                raise InputError(f"train.track: {name} cannot begin: {error}") from error
            console.warn(f"{name} cannot go on, metrics.jsonl has all: {error!r}")
    known = {name: tracker.id for name, tracker in trackers.items() if tracker.id is not None}
    if known:
        write_json(folder / IDS, {**ids, **known})
    found, is_done = Tracking(trackers, console), False
    try:
        yield found
        is_done = True
    finally:
        found.finish(is_done=is_done)


def plain_config(flat: Mapping[str, object]) -> dict[str, object]:
    """Return options as values that every tracker takes: numbers and texts."""
    return {
        key: value if isinstance(value, bool | int | float | str) else _text(value)
        for key, value in flat.items()
    }


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, Sequence):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _finite(metrics: Metrics) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if name != "step" and math.isfinite(value)
    }


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        return {str(name): str(id_) for name, id_ in read_json(folder / IDS).items()}
    except (InputError, *OTHER_SHAPE):
        return {}
