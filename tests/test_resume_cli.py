"""``dpo resume`` and ``dpo checkpoint``, and runs that end for want of time."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dpo.cli import main
from dpo.files import sha256_file
from dpo.trainer import Trainer

PLAIN = ("--batch-size", "4", "--learning-rate", "0.01", "--threads", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say {n}", "chosen": f" yes {n}", "rejected": " no"} for n in range(16)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def train(model_folder: Path, data: Path) -> Callable[..., Result]:
    """Train into a folder."""

    def run(out: Path, *options: str) -> Result:
        given = ("--model", str(model_folder), "--data", str(data), "--out", str(out))
        return dpo("train", *given, *PLAIN, *options)

    return run


def dpo(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


# --- dpo resume ---------------------------------------------------------------------------------


def test_resume_goes_on_with_the_runs_own_config(
    tmp_path: Path, train: Callable[..., Result]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ("--steps", "6", "--seed", "3", "--loss", "ipo")
    assert train(whole, *options).exit_code == 0
    assert train(stopped, *options, "--max-time", "1s").exit_code in (0, 124)
    result = dpo("resume", stopped, "--max-time", "none")
    assert result.exit_code == 0, result.output
    assert files(stopped / "model") == files(whole / "model")


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_epochs_are_extended(tmp_path: Path, train: Callable[..., Result], schedule: str) -> None:
    """wsd from a checkpoint before its decay: the last fifth of 8 steps are 2."""
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    options = ("--schedule", schedule, "--save-every", "5", "--keep", "9")
    assert train(whole, *options, "--epochs", "3").exit_code == 0
    assert train(longer, *options, "--epochs", "2").exit_code == 0
    checkpoint = longer / "checkpoints" / "step-000005"
    result = dpo("resume", longer, "--epochs", "3", "--resume", checkpoint)
    assert result.exit_code == 0, result.output
    assert files(longer / "model") == files(whole / "model")
    assert "epochs = 3\n" in (longer / "config.toml").read_text()


def test_extension_that_would_change_the_steps_done_is_refused_with_both_values(
    tmp_path: Path, train: Callable[..., Result]
) -> None:
    out = tmp_path / "RUN"
    assert train(out, "--epochs", "1").exit_code == 0
    before = files(out / "model"), (out / "config.toml").read_bytes()
    result = dpo("resume", out, "--epochs", "2")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "step-000004, the run has changed: total_steps was 4 and is 8; on it depend learning "
        "rates, or the loss, of the steps done\n"
    )
    assert (files(out / "model"), (out / "config.toml").read_bytes()) == before


def test_folder_that_was_moved_is_resumed_where_it_is(
    tmp_path: Path, train: Callable[..., Result]
) -> None:
    assert train(tmp_path / "RUN", "--schedule", "constant", "--steps", "2").exit_code == 0
    (tmp_path / "RUN").rename(tmp_path / "moved")
    assert dpo("resume", tmp_path / "moved", "--steps", "3").exit_code == 0
    assert not (tmp_path / "RUN").exists()
    assert (tmp_path / "moved/checkpoints/step-000003").exists()


def test_run_with_a_loss_of_ones_own_goes_on_where_it_is_named_again(
    tmp_path: Path, train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder can come from anyone: it is not to say what is imported."""
    source = "def loss(pairs, beta=0.1):\n    return -beta * pairs.log_ratio_gap\n"
    (tmp_path / "own_loss.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    run, named = tmp_path / "RUN", ("--loss", "own_loss:loss")
    assert train(run, *named, "--schedule", "constant", "--steps", "2").exit_code == 0
    for again in (("resume", run), ("checkpoint", "export", run, "--out", tmp_path / "model")):
        refused = dpo(*again)
        assert refused.exit_code == 2
        assert "config.toml: loss.name names code to run, which a file cannot" in refused.stderr
        assert dpo(*again, *named).exit_code == 0
    assert files(tmp_path / "model") == files(run / "model")


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for command in (("resume",), ("checkpoint", "export", "--out", tmp_path / "model")):
        result = dpo(*command, tmp_path)
        assert result.exit_code == 2
        assert f"{tmp_path} is no folder of a run that has begun" in result.stderr


def test_run_that_was_ended_before_its_first_step_is_resumed(
    tmp_path: Path, train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpo.run.obtain_references", end)
        assert train(tmp_path / "RUN", "--steps", "2").exit_code == 130
    result = dpo("resume", tmp_path / "RUN")
    assert result.exit_code == 0, result.output


# --- time and terminals -------------------------------------------------------------------------


def test_run_out_of_time_leaves_a_checkpoint_and_its_own_exit_code(
    tmp_path: Path, train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, limited = tmp_path / "whole", tmp_path / "limited"
    assert train(whole, "--steps", "4").exit_code == 0
    step = Trainer.train_step

    def slow_step(trainer: Trainer) -> None:
        step(trainer)
        time.sleep(1.1)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", slow_step)
        result = train(limited, "--steps", "4", "--max-time", "1s")
    assert result.exit_code == 124
    assert result.stderr.endswith(f"stopped at step 1; go on with dpo resume {limited}\n")
    assert [path.name for path in (limited / "checkpoints").iterdir()] == ["step-000001"]
    assert dpo("resume", limited, "--max-time", "none").exit_code == 0
    assert files(limited / "model") == files(whole / "model")


def test_end_of_a_job_of_slurm_stops_the_run(
    tmp_path: Path, train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    assert train(tmp_path / "RUN", "--steps", "4", "--save-before-end", "5m").exit_code == 124
    assert (tmp_path / "RUN/checkpoints/step-000001").exists()


@pytest.mark.slow
def test_run_outlives_its_terminal(tmp_path: Path, model_folder: Path, data: Path) -> None:
    """A hang-up stops it after the step with a checkpoint, though nothing can be said any more."""
    master, terminal = pty.openpty()
    out = tmp_path / "RUN"
    arguments = ["--model", model_folder, "--data", data, "--out", out, "--steps", "100000", *PLAIN]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started us may ignore it
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo", "train", *map(str, arguments)],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGHUP, before)
    os.close(terminal)
    while not (out / "metrics.jsonl").exists() or "\n" not in (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        os.read(master, 2**16)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert not dpo("checkpoint", "verify", out).exit_code
    assert json.loads((checkpoint / "state.json").read_text())["step"] > 0


# --- dpo checkpoint -----------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path, train: Callable[..., Result]) -> Path:
    out = tmp_path / "RUN"
    options = ("--steps", "6", "--save-every", "2", "--keep", "3", "--eval-split", "0.25")
    assert train(out, *options, "--eval-every", "2").exit_code == 0
    return out


def test_checkpoints_are_listed_by_rising_step(finished: Path) -> None:
    result = dpo("checkpoint", "list", finished)
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["step-000002", "step-000004", "step-000006"]
    assert all(" MiB  of 6 steps, " in line and "held-out loss 0." in line for line in lines)


@pytest.mark.parametrize("content", ["{", '{"state": {}}', "[]"])
def test_checkpoint_without_a_readable_state_is_listed_as_damaged(
    finished: Path, content: str
) -> None:
    (finished / "checkpoints/step-000004/state.json").write_text(content)
    result = dpo("checkpoint", "list", finished)
    assert result.exit_code == 0
    assert ["damaged" in line for line in result.stdout.splitlines()] == [False, True, False]


def test_sound_checkpoints_are_verified(finished: Path) -> None:
    result = dpo("checkpoint", "verify", finished)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "".join(f"step-00000{step}  sound\n" for step in (2, 4, 6))


def test_damaged_checkpoint_is_told_with_its_file(finished: Path) -> None:
    path = finished / "checkpoints/step-000004/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = dpo("checkpoint", "verify", finished)
    assert result.exit_code == 1
    assert f"step-000004  damaged\n  {path}: damaged: " in result.stdout
    assert "1 checkpoints are damaged" in result.stderr


@pytest.mark.parametrize("command", ["list", "verify"])
def test_folder_without_checkpoints_is_refused(tmp_path: Path, command: str) -> None:
    result = dpo("checkpoint", command, tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"Error: {tmp_path}/checkpoints: there is no checkpoint\n"


OPTIONS = {
    "all weights": (),
    "adapter": ("--adapter", "lora"),
    "moving average": ("--set", "train.ema_decay=0.5"),
    "schedule-free": ("--optimizer", "schedule-free", "--schedule", "constant"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_exported_model_is_that_of_a_run_which_ended_there(
    tmp_path: Path, train: Callable[..., Result], data: Path, options: tuple[str, ...]
) -> None:
    out = tmp_path / "RUN"
    assert train(out, "--steps", "2", "--eval-split", "0.25", *options).exit_code == 0
    data.unlink()  # it is not read
    result = dpo("checkpoint", "export", out, "--out", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"step    2\nmodel   {tmp_path / 'model'}\n"
    assert files(tmp_path / "model") == files(out / "model")


def test_model_of_an_earlier_step_is_exported(finished: Path, tmp_path: Path) -> None:
    assert (
        dpo("checkpoint", "export", finished, "--step", 2, "--out", tmp_path / "early").exit_code
        == 0
    )
    assert dpo("checkpoint", "export", finished, "--out", tmp_path / "last").exit_code == 0
    early, last = files(tmp_path / "early"), files(tmp_path / "last")
    assert last == files(finished / "model")
    assert early["model.safetensors"] != last["model.safetensors"]


def test_checkpoint_to_be_exported_must_be_there_and_sound(finished: Path, tmp_path: Path) -> None:
    result = dpo("checkpoint", "export", finished, "--step", 3, "--out", tmp_path / "model")
    assert (result.exit_code, "step-000003: no such checkpoint" in result.stderr) == (2, True)
    for path in (finished / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    result = dpo("checkpoint", "export", finished, "--out", tmp_path / "model")
    assert (result.exit_code, "no checkpoint is sound" in result.stderr) == (1, True)
    assert not (tmp_path / "model").exists()


def test_export_beside_another_model_is_refused(
    tmp_path: Path, train: Callable[..., Result], make_model_folder: Callable[..., Path]
) -> None:
    base = make_model_folder(tmp_path / "base")
    assert train(tmp_path / "RUN", "--steps", "1", "--model", str(base)).exit_code == 0
    make_model_folder(base, seed=1)
    result = dpo("checkpoint", "export", tmp_path / "RUN", "--out", tmp_path / "model")
    assert result.exit_code == 2
    assert "the run has changed: model was '" in result.stderr
