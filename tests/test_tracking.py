"""Trackers: asked for by name, told what metrics.jsonl holds, never in the way of a run."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo import run, run_loop, tracking
from dpo.config import LossConfig, RunConfig
from dpo.errors import InputError
from dpo.progress import Console
from dpo.tracking import TRACKERS, RunStart, TrackerKind
from dpo.train_config import TrainConfig


class Recorder:
    """A tracker that remembers, and fails where it is told to."""

    made: list["Recorder"] = []  # noqa: RUF012
    fails_at: str | None = None

    def __init__(self, start: RunStart) -> None:
        if self.fails_at == "start":
            raise OSError("no such server")
        self.start, self.id = start, start.id or f"id-{len(self.made)}"
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.ended: tuple[Mapping[str, float], bool] | None = None
        self.made.append(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.fails_at == "log" and step == 2:
            raise OSError("the server is gone")
        self.logged.append((step, metrics))

    def finish(self, summary: Mapping[str, float], *, is_done: bool) -> None:
        self.ended = (summary, is_done)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The recorders that stand in for W&B and MLflow."""
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(Recorder, "fails_at", None)
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(tracking.TRACKERS, name, TrackerKind(Recorder, "json"))
    return Recorder.made


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"prompt": f"say {n}", "chosen": f" yes {n}", "rejected": " no"} for n in range(8)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = TrainConfig(
        batch_size=4, steps=3, schedule="constant", learning_rate=1e-2, threads=1, device="cpu",
        track="wandb",
    )  # fmt: skip
    return RunConfig(
        model=str(model_folder), data=str(data), out=str(tmp_path / "RUN"), eval_split=0.3,
        train=train, loss=LossConfig("sigmoid", {"beta": 0.1}),
    )  # fmt: skip


def changed(config: RunConfig, **options: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **options))


def trained(config: RunConfig) -> str:
    said = io.StringIO()
    run.train(config, console=Console(said))
    return said.getvalue()


def lines(config: RunConfig) -> list[dict[str, float]]:
    text = (Path(config.out) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# --- what they are told -------------------------------------------------------------------------


def test_tracker_gets_every_line_the_config_and_the_end(
    config: RunConfig, made: list[Recorder]
) -> None:
    trained(config)
    (tracker,) = made
    expected = [(line.pop("step"), line) for line in lines(config)]
    assert tracker.logged == expected
    assert tracker.start.config["loss.beta"] == 0.1
    assert tracker.start.config["train.max_time"] == "none"
    summary, is_done = tracker.ended or ({}, False)
    assert is_done
    assert summary["eval/loss"] == expected[-1][1]["eval/loss"]


def test_resumed_run_goes_on_in_the_run_of_its_tracker(
    config: RunConfig, made: list[Recorder]
) -> None:
    trained(config)
    trained(changed(config, steps=5, resume="auto"))
    first, second = made
    assert (second.start.id, second.start.step) == (first.id, 3)
    assert [step for step, _ in second.logged] == [4, 5, 5]


def test_several_are_told_the_same(config: RunConfig, made: list[Recorder]) -> None:
    trained(changed(config, track="wandb, mlflow"))
    one, other = made
    assert one.logged == other.logged != []


def test_run_that_fails_ends_its_tracker_as_not_done(
    config: RunConfig, made: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **_options: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(run_loop, "write_trained_model", stop)
    with pytest.raises(SystemExit):
        trained(config)
    assert [tracker.ended for tracker in made] == [({}, False)]


def test_what_is_not_finite_is_left_out(tmp_path: Path, made: list[Recorder]) -> None:
    options: Mapping[str, object] = {}
    with tracking.tracking("wandb", tmp_path, options, step=0, console=Console()) as tracked:
        tracked(None, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "epoch": 0.5})
    assert made[0].logged == [(1, {"epoch": 0.5})]


# --- what fails ---------------------------------------------------------------------------------


def test_tracker_that_fails_is_told_of_once_and_the_run_goes_on(
    config: RunConfig, made: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "fails_at", "log")
    said = trained(config)
    assert said.count("wandb is left out from here on") == 1
    assert [step for step, _ in made[0].logged] == [0, 1]
    assert [line["step"] for line in lines(config)] == [0, 1, 2, 3, 3]


def test_tracker_that_cannot_begin_is_refused_but_does_not_stop_a_resume(
    config: RunConfig, made: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(config)
    monkeypatch.setattr(Recorder, "fails_at", "start")
    said = trained(changed(config, steps=4, resume="auto"))
    assert "wandb cannot go on, metrics.jsonl has all: OSError('no such server')" in said
    other = replace(config, out=f"{config.out}-2")
    with pytest.raises(InputError, match=r"train\.track: wandb cannot begin: no such server"):
        trained(other)
    assert len(made) == 1


def test_missing_package_is_refused_before_anything_is_read(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _name: None)
    expected = r"train\.track: wandb needs the package wandb: pip install 'dpo-engine\[wandb\]'"
    with pytest.raises(InputError, match=expected):
        trained(replace(config, model="there is none"))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("comet", r"train\.track: no tracker 'comet', only tensorboard, wandb, mlflow"),
        ("wandb,wandb", r"train\.track: 'wandb,wandb' names a tracker twice"),
        ("", r"train\.track: no tracker ''"),
    ],
)
def test_other_names_are_refused(names: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(track=names)


def test_extra_of_each_tracker_is_in_pyproject() -> None:
    import tomllib

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert {kind.package for kind in TRACKERS.values()} <= extras.keys()


# --- the real ones ------------------------------------------------------------------------------


def test_no_tracker_begins_unless_it_is_asked_for(config: RunConfig, made: list[Recorder]) -> None:
    trained(changed(config, track=None))
    assert made == []
    assert not (Path(config.out) / "tracking.json").exists()


@pytest.mark.slow
def test_none_is_imported_unless_it_is_asked_for(config: RunConfig, tmp_path: Path) -> None:
    untracked = changed(config, track=None)
    (tmp_path / "run.toml").write_text(untracked.to_toml())
    code = (
        "import sys\nfrom dpo.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'tensorboard', 'wandb', 'mlflow'} & set(sys.modules)))"
    )
    done = _dpo(["-c", code, "train", "--config", str(tmp_path / "run.toml")])
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_three_of_them_hold_a_resumed_run_as_one(config: RunConfig, tmp_path: Path) -> None:
    folder, store = Path(config.out), tmp_path / "mlruns"
    environment = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": store.as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    (tmp_path / "run.toml").write_text(changed(config, track="tensorboard,wandb,mlflow").to_toml())
    _dpo(["-m", "dpo", "train", "--config", str(tmp_path / "run.toml")], **environment)
    ids = json.loads((folder / "tracking.json").read_text())
    resumed = _dpo(["-c", RESUME_AND_READ, str(folder), ids["mlflow"]], **environment)
    seen = json.loads(resumed.stdout.splitlines()[-1])
    losses = {str(int(line["step"])): line["loss"] for line in lines(config) if "loss" in line}
    assert list(losses) == ["1", "2", "3", "4", "5"]
    assert seen["tensorboard"] == pytest.approx(losses, rel=1e-6)  # float32
    assert (seen["mlflow"], seen["status"], seen["beta"]) == (losses, "FINISHED", "0.1")
    offline = sorted((folder / "wandb").glob(f"offline-run-*-{ids['wandb']}"))
    assert len(offline) == 2  # `wandb sync` makes one run of the files of one id
    for part in offline:
        (file,) = part.glob("*.wandb")
        assert b"rewards/margin" in file.read_bytes()


RESUME_AND_READ = """
import json, sys
from dpo.cli import main
main(["resume", sys.argv[1], "--steps", "5"], standalone_mode=False)

from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(f"{sys.argv[1]}/tensorboard")
events.Reload()
client, run_id = MlflowClient(), sys.argv[2]
run, history = client.get_run(run_id), client.get_metric_history(run_id, "loss")
print(json.dumps({
    "tensorboard": {event.step: event.value for event in events.Scalars("loss")},
    "mlflow": {metric.step: metric.value for metric in history},
    "status": run.info.status, "beta": run.data.params["loss.beta"],
}))
"""


def _dpo(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
