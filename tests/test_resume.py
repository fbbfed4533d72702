"""A run that is killed, stopped or damaged goes on to the same weights, bit for bit."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dpo import run
from dpo.cli import main
from dpo.config import RunConfig
from dpo.errors import InputError, RunError
from dpo.progress import Console
from dpo.train_config import TrainConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_pairs(path: Path, *, chosen: str, rejected: str) -> Path:
    rows = [
        {"prompt": f"say {n}", "chosen": f" {chosen} {n % 5}", "rejected": f" {rejected} {n % 3}"}
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", chosen="yes", rejected="no")


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, data: Path) -> RunConfig:
    train = TrainConfig(
        batch_size=4,
        steps=6,
        save_every=2,
        keep=3,
        learning_rate=1e-2,
        schedule="constant",
        threads=1,
        device="cpu",
    )
    return RunConfig(
        model=str(model_folder), data=str(data), out=str(tmp_path / "RUN"), train=train
    )


def changed(config: RunConfig, **options: Any) -> RunConfig:
    """Replace options, those of the training under their own names."""
    names = options.keys() & {field.name for field in fields(TrainConfig)}
    train = replace(config.train, **{name: options.pop(name) for name in names})
    return replace(config, train=train, **options)


def said_by(config: RunConfig) -> str:
    """Run a config and return what it said."""
    said = io.StringIO()
    run.train(config, console=Console(said))
    return said.getvalue()


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def losses(folder: str | Path) -> list[tuple[float, float]]:
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def steps_of_checkpoints(folder: str | Path) -> list[str]:
    return sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# --- killed and stopped -------------------------------------------------------------------------

# One process forks the runs, so that torch is loaded once. A run gets a signal at the n-th thing it
# asks of the system in its folder or caches: a file opened or forced to the disk, a folder made, a
# name changed. It is then resumed, and compared with an unbroken run.
STOPPED_AT_EVERY_INSTANT = """
import itertools, json, os, shutil, signal, sys
from pathlib import Path
import torch._dynamo, dpo.run
from dpo.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may ignore it
place, arguments, plan = Path(sys.argv[1]), sys.argv[2].split(), json.loads(sys.argv[3])
run, cache = place / "RUN", place / "cache"
os.environ["XDG_CACHE_HOME"] = str(cache)

def start(extra, at=None, number=0):
    child = os.fork()
    if child == 0:
        with open(place / "stderr", "w") as file:
            os.dup2(file.fileno(), 2)
        count = itertools.count()
        def heed(*arguments):
            if str(place) in str(arguments) and next(count) == at:
                os.kill(os.getpid(), number)
        os.fsync = lambda descriptor: heed(place)  # a killed process needs no disk
        sys.addaudithook(
            lambda event, about: event.split(".")[0] in ("open", "os", "shutil") and heed(about)
        )
        try:
            main(["train", *arguments, "--out", str(run), *extra])
        except SystemExit as end:
            if at is None:
                (place / "count").write_text(str(next(count)))
            sys.stderr.flush()
            os._exit(end.code or 0)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), (place / "stderr").read_text()

def result():
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line.get("loss"), line.get("eval/loss")) for line in lines]
    rubbish = [path.name for path in run.rglob("*") if ".tmp-" in path.name or ".old" in path.name]
    files = ("model/model.safetensors", "model/README.md", "config.toml", "data.json",
             "eval_pairs.jsonl")
    return losses, rubbish, *((run / file).read_bytes().hex() for file in files)

start([])
unbroken, instants = result(), int((place / "count").read_text())
outcomes = []
for name, share, stride in plan:
    for instant in range(int(share * instants), instants, stride):
        shutil.rmtree(run), shutil.rmtree(cache)
        stopped = start([], instant, getattr(signal, name))
        resumed = start(["--resume", "auto"])
        outcomes.append({
            "signal": name, "instant": instant, "exit": stopped[0], "stopped": stopped[1],
            "again": resumed[0], "resumed": resumed[1], "same": result() == unbroken,
        })
print(json.dumps(outcomes))
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((97, 500), id="some"),
        pytest.param((4, 10), marks=pytest.mark.slow, id="many"),
    ],
)
def outcomes(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Path,
    data: Path,
) -> list[dict[str, Any]]:
    """What became of runs that got a signal at some instants: kills, and friendlier ones."""
    kills, stops = request.param
    # From shares of all instants on: a signal to stop is heeded once the training has begun.
    plan = [("SIGKILL", 0.04, kills), ("SIGTERM", 0.6, stops), ("SIGINT", 0.65, stops)]
    arguments = (
        f"--model {model_folder} --data {data} --threads 1 --device cpu --batch-size 4 --steps 4 "
        "--save-every 1 --keep 2 --eval-split 0.25 --eval-every 2 --keep-best --learning-rate 0.01"
    )
    script, place = STOPPED_AT_EVERY_INSTANT, str(tmp_path_factory.mktemp("stopped"))
    done = subprocess.run(
        [sys.executable, "-c", script, place, arguments, json.dumps(plan)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_run_that_got_a_signal_at_any_instant_ends_in_the_same_files(
    outcomes: list[dict[str, Any]],
) -> None:
    assert len(outcomes) >= 6
    for outcome in outcomes:
        assert outcome["again"] == 0, outcome
        assert outcome["same"], outcome
        assert "Traceback" not in outcome["stopped"] + outcome["resumed"], outcome
    killed = {outcome["exit"] for outcome in outcomes if outcome["signal"] == "SIGKILL"}
    assert killed == {-signal.SIGKILL}


def test_stopped_run_leaves_a_checkpoint_and_says_which_signal_by_its_exit_code(
    outcomes: list[dict[str, Any]],
) -> None:
    stopped = [outcome for outcome in outcomes if "stopped at step" in outcome["stopped"]]
    assert {(outcome["signal"], outcome["exit"]) for outcome in stopped} == {
        ("SIGTERM", 128 + signal.SIGTERM),
        ("SIGINT", 128 + signal.SIGINT),
    }
    for outcome in stopped:
        step = int(outcome["stopped"].rpartition("stopped at step ")[2].partition(";")[0])
        assert step == 0 or f"checkpoints/step-{step:06d}\n" in outcome["resumed"], outcome


def test_second_run_on_a_folder_in_use_is_refused_and_the_first_goes_on(
    tmp_path: Path, config: RunConfig
) -> None:
    """In real processes; the first is stopped meanwhile, then terminated, and resumed."""
    config = changed(config, steps=30, save_every=None)
    said_by(changed(config, out=str(tmp_path / "unbroken")))
    out = Path(config.out)
    arguments = [
        *("train", "--model", config.model, "--data", str(config.data), "--out", config.out),
        *("--batch-size", "4", "--steps", "30", "--learning-rate", "0.01"),
        *("--schedule", "constant", "--threads", "1", "--device", "cpu"),
    ]
    first = subprocess.Popen(
        [sys.executable, "-m", "dpo", *arguments], stderr=subprocess.PIPE, text=True
    )
    while not (out / "metrics.jsonl").exists() or "\n" not in (out / "metrics.jsonl").read_text():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = CliRunner().invoke(main, [*arguments, "--resume", "auto"])
    first.terminate()
    first.send_signal(signal.SIGCONT)
    _, stderr = first.communicate(timeout=60)

    assert second.exit_code == 2
    assert second.stderr.startswith(f"Error: {out} is in use by process {first.pid} on ")
    assert second.stderr.count("\n") == 1
    assert first.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert CliRunner().invoke(main, [*arguments, "--resume", "auto"]).exit_code == 0
    assert weights(out) == weights(tmp_path / "unbroken")
    assert losses(out) == losses(tmp_path / "unbroken")


# --- resumed ------------------------------------------------------------------------------------


@pytest.fixture
def finished(config: RunConfig) -> RunConfig:
    """The config of a run that is done, with checkpoints of steps 2, 4 and 6."""
    said_by(config)
    return config


def test_damaged_newest_checkpoint_is_passed_over_aloud(finished: RunConfig) -> None:
    before = weights(finished.out), losses(finished.out)
    damaged = Path(finished.out) / "checkpoints" / "step-000006"
    flip_byte(damaged / "optimizer.safetensors")

    said = said_by(changed(finished, resume="auto"))

    assert f"passed over: checkpoint {damaged} is damaged" in said
    assert f"resuming from {damaged.with_name('step-000004')}" in said
    assert (weights(finished.out), losses(finished.out)) == before
    assert steps_of_checkpoints(finished.out) == [
        *("step-000002", "step-000004", "step-000006", "step-000006.aside")
    ]


def test_resuming_is_refused_if_every_checkpoint_is_damaged(finished: RunConfig) -> None:
    for step in (2, 4, 6):
        flip_byte(Path(finished.out) / "checkpoints" / f"step-00000{step}" / "state.json")
    with pytest.raises(RunError, match=f"no checkpoint is sound; remove {finished.out} to start"):
        said_by(changed(finished, resume="auto"))


def test_resuming_a_finished_run_changes_nothing(finished: RunConfig) -> None:
    before = weights(finished.out), losses(finished.out), steps_of_checkpoints(finished.out)
    said_by(changed(finished, resume="auto"))
    assert before == (
        weights(finished.out), losses(finished.out), steps_of_checkpoints(finished.out)
    )  # fmt: skip


@pytest.fixture
def contrary(tmp_path: Path, config: RunConfig) -> RunConfig:
    """A run whose held-out loss rises from the first step on: their preferences are the reverse."""
    eval_data = write_pairs(tmp_path / "contrary.jsonl", chosen="no", rejected="yes")
    return changed(config, eval_data=str(eval_data), eval_every=1, save_every=None)


def test_what_killed_runs_left_under_temporary_names_is_removed(finished: RunConfig) -> None:
    rubbish = ("model.tmp-1-ab", "metrics.jsonl.tmp-1-ab", "checkpoints/step-000002.tmp-1-ab")
    for name in rubbish:
        (Path(finished.out) / name).mkdir()
    said_by(changed(finished, resume="auto"))
    assert not list(Path(finished.out).rglob("*.tmp-*"))


def test_early_stopped_run_stays_stopped(contrary: RunConfig) -> None:
    config = changed(contrary, early_stopping=2)
    said_by(config)
    before = weights(config.out), losses(config.out)
    said_by(changed(config, resume="auto"))
    assert (weights(config.out), losses(config.out)) == before
    assert [step for step, _ in before[1]] == [1, 2, 3]


def test_finished_run_goes_on_to_further_steps(tmp_path: Path, finished: RunConfig) -> None:
    said_by(changed(finished, out=str(tmp_path / "longer"), steps=8))
    said_by(changed(finished, steps=8, resume="auto"))
    assert weights(finished.out) == weights(tmp_path / "longer")


def test_earlier_checkpoint_is_resumed_by_its_path(finished: RunConfig) -> None:
    before = weights(finished.out), losses(finished.out)
    checkpoint = Path(finished.out) / "checkpoints" / "step-000002"
    said = said_by(changed(finished, resume=str(checkpoint)))
    assert f"resuming from {checkpoint}" in said
    assert (weights(finished.out), losses(finished.out)) == before


def test_checkpoint_of_another_folder_begins_a_run_with_its_history(
    tmp_path: Path, finished: RunConfig
) -> None:
    checkpoint = Path(finished.out) / "checkpoints" / "step-000002"
    said_by(changed(finished, out=str(tmp_path / "other"), resume=str(checkpoint)))
    assert weights(tmp_path / "other") == weights(finished.out)
    assert losses(tmp_path / "other") == losses(finished.out)
    assert steps_of_checkpoints(tmp_path / "other") == steps_of_checkpoints(finished.out)


def test_best_checkpoint_comes_along_to_another_folder(tmp_path: Path, contrary: RunConfig) -> None:
    config = changed(contrary, keep_best=True, keep=1)
    assert "the model is that of step 1" in said_by(config)
    last = f"{config.out}/checkpoints/step-000006"
    said_by(changed(config, out=str(tmp_path / "other"), resume=last))
    assert weights(tmp_path / "other") == weights(config.out)


def test_run_is_never_overwritten(tmp_path: Path, finished: RunConfig) -> None:
    before = weights(finished.out)
    said_by(changed(finished, out=str(tmp_path / "other")))
    foreign = str(tmp_path / "other" / "checkpoints" / "step-000002")
    for resume in (None, foreign):
        with pytest.raises(InputError, match=f"{finished.out} holds a run: go on with --resume"):
            said_by(changed(finished, resume=resume))
    assert weights(finished.out) == before


def test_resume_auto_in_an_empty_folder_begins_a_run(tmp_path: Path, config: RunConfig) -> None:
    said_by(config)
    said_by(changed(config, out=str(tmp_path / "other"), resume="auto"))
    assert weights(tmp_path / "other") == weights(config.out)


def test_checkpoint_that_is_not_there_is_refused(config: RunConfig) -> None:
    with pytest.raises(InputError, match="step-000009: no such checkpoint folder"):
        said_by(changed(config, resume=f"{config.out}/checkpoints/step-000009"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.02}, r"learning_rate was 0\.01 and is 0\.02"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"schedule": "linear"}, "schedule was 'constant' and is 'linear'"),
    ],
)
def test_other_options_are_refused_and_nothing_is_set_aside(
    finished: RunConfig, options: Mapping[str, Any], message: str
) -> None:
    checkpoint = Path(finished.out) / "checkpoints" / "step-000002"
    before = steps_of_checkpoints(finished.out), losses(finished.out), weights(finished.out)
    with pytest.raises(InputError, match=f"step-000002, the run has changed: {message}"):
        said_by(changed(finished, resume=str(checkpoint), **options))
    assert before == (
        steps_of_checkpoints(finished.out), losses(finished.out), weights(finished.out)
    )  # fmt: skip


@pytest.mark.parametrize("role", ["model", "reference"])
def test_other_models_are_refused(
    tmp_path: Path, config: RunConfig, make_model_folder: Callable[..., Path], role: str
) -> None:
    reference = make_model_folder(tmp_path / "reference", seed=1)
    config = replace(config, reference=str(reference))
    said_by(config)
    other = {role: str(make_model_folder(tmp_path / "other", seed=2))}
    with pytest.raises(InputError, match=f"step-000006, the run has changed: {role} was '"):
        said_by(changed(config, **other, resume="auto"))


def test_other_data_is_refused_before_its_reference_is_computed(
    tmp_path: Path, finished: RunConfig
) -> None:
    shards = list((tmp_path / "cache").rglob("shard-*"))
    other = write_pairs(tmp_path / "other.jsonl", chosen="aye", rejected="nay")
    with pytest.raises(InputError, match="step-000006, the run has changed: data was '"):
        said_by(changed(finished, data=str(other), resume="auto"))
    assert list((tmp_path / "cache").rglob("shard-*")) == shards


def test_best_model_that_was_not_kept_is_missed_before_the_training(contrary: RunConfig) -> None:
    config = changed(contrary, early_stopping=6, keep=1)
    said_by(config)
    with pytest.raises(InputError, match="step-000001, the best so far, was not kept; go on with"):
        said_by(changed(config, keep_best=True, resume="auto"))
