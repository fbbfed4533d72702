"""Sweeps: grids of runs that share what they can, go on after faults, and end in one page."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dpo import reference, reference_pass, tokenization
from dpo.cli import main
from dpo.trainer import Trainer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def needed(tmp_path: Path, model_folder: Path) -> list[str]:
    rows = [{"prompt": f"say {n}", "chosen": f" yes {n}", "rejected": " no"} for n in range(8)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--model", str(model_folder), "--data", str(data), "--out", str(tmp_path / "SWEEP"),
        "--batch-size", "4", "--steps", "2", "--threads", "1", "--device", "cpu",
        "--schedule", "constant", "--learning-rate", "1e-2", "--eval-split", "0.3",
    ]  # fmt: skip


def dpo(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, [command, *arguments])


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "SWEEP").iterdir() if path.is_dir())


# --- what is done -------------------------------------------------------------------------------


def test_grid_is_trained_with_one_reference_and_one_tokenization(
    needed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"reference": 0, "tokens": 0}

    def counted(name: str, work: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            calls[name] += 1
            return work(*arguments, **options)

        return call

    compute, tokenize = reference.compute_reference, tokenization._tokenize
    monkeypatch.setattr(reference_pass, "compute_reference", counted("reference", compute))
    monkeypatch.setattr(tokenization, "_tokenize", counted("tokens", tokenize))
    done = dpo("sweep", *needed, "--beta", "0.1,0.5", "--loss", "sigmoid,ipo")
    assert done.exit_code == 0, done.output
    names = [f"loss-{loss}_beta-{beta}" for loss in ("sigmoid", "ipo") for beta in (0.1, 0.5)]
    assert folders(tmp_path) == sorted(names)
    assert calls == {"reference": 2, "tokens": 2}  # the pairs and the held-out ones, once
    for name in folders(tmp_path):
        assert (tmp_path / "SWEEP" / name / "report.html").is_file()
    page = (tmp_path / "SWEEP/report.html").read_text()
    assert "4 runs, which differ in loss.name, " in page
    table = done.stdout.splitlines()
    assert table[0].split() == ["held", "out", "loss", "accuracy", "margin", "KL"]
    assert [line.split()[0] for line in table[1:5]] == names
    assert table[5].startswith("best    ")
    assert table[6] == f"report  {tmp_path}/SWEEP/report.html"


def test_run_of_a_sweep_is_that_of_dpo_train(needed: list[str], tmp_path: Path) -> None:
    assert dpo("sweep", *needed, "--beta", "0.1,0.5").exit_code == 0
    alone = [str(tmp_path / "ALONE") if part.endswith("SWEEP") else part for part in needed]
    assert dpo("train", *alone, "--beta", "0.5").exit_code == 0
    assert weights(tmp_path / "SWEEP/beta-0.5") == weights(tmp_path / "ALONE")


def test_done_runs_are_left_alone_and_stopped_ones_go_on(needed: list[str], tmp_path: Path) -> None:
    sweep = [*needed, "--beta", "0.1,0.5", "--save-every", "1"]
    assert dpo("sweep", *sweep).exit_code == 0
    first, second = (tmp_path / "SWEEP" / name for name in ("beta-0.1", "beta-0.5"))
    kept, wanted = (first / "metrics.jsonl").stat().st_mtime_ns, weights(second)
    shutil.rmtree(second / "model")  # as if it was stopped after its first step
    shutil.rmtree(second / "checkpoints/step-000002")
    again = dpo("sweep", *sweep)
    assert again.exit_code == 0
    assert "run 1 of 2: beta-0.1: was done" in again.output
    assert "resuming from" in again.output
    assert (first / "metrics.jsonl").stat().st_mtime_ns == kept
    assert weights(second) == wanted
    (row,) = [line for line in again.stdout.splitlines() if line.startswith("beta-0.1 ")]
    assert row.endswith("was done")


def test_stopped_sweep_says_that_it_goes_on_itself(
    needed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def slow_step(trainer: Trainer) -> None:
        step(trainer)
        time.sleep(1.1)

    monkeypatch.setattr(Trainer, "train_step", slow_step)
    result = dpo("sweep", *needed, "--beta", "0.1,0.3", "--max-time", "1s")
    assert result.exit_code == 124
    assert result.stderr.endswith("stopped at step 1; go on with the same dpo sweep\n")


def test_failed_run_is_told_and_the_others_are_done(needed: list[str], tmp_path: Path) -> None:
    (tmp_path / "SWEEP").mkdir()
    (tmp_path / "SWEEP/beta-0.1").write_text("in the way")
    done = dpo("sweep", *needed, "--beta", "0.1,0.5")
    assert done.exit_code == 1
    assert "beta-0.1 failed: " in done.output
    assert "Error: 1 of 2 runs failed: beta-0.1" in done.output
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("beta-0.1 ")]
    assert row.split()[1:] == ["-", "-", "-", "-", "failed"]
    assert weights(tmp_path / "SWEEP/beta-0.5")
    assert "Sweep SWEEP" in (tmp_path / "SWEEP/report.html").read_text()


def test_configs_of_all_runs_are_printed_and_nothing_is_done(
    needed: list[str], tmp_path: Path
) -> None:
    done = dpo("sweep", *needed, "--set", "train.share_prefix=true,false", "--print-config")
    assert done.exit_code == 0, done.output
    assert [line for line in done.stdout.splitlines() if line.startswith("# ")] == [
        "# prefix-sharing-true", "# prefix-sharing-false",
    ]  # fmt: skip
    assert f'out = "{tmp_path}/SWEEP/prefix-sharing-true"' in done.stdout
    assert not (tmp_path / "SWEEP").exists()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((), "no option has several values: give some separated by commas"),
        (("--beta", "0.1,x"), "beta-x: loss.beta must be a number"),
        (("--learning-rate", "1e-6,-1"), "learning-rate--1: train.learning_rate must be above 0"),
        (("--learning-rate", "1e-6,"), "train.learning_rate must be a number, got ''"),
        (("--beta", "0.1,0.10"), "beta-0.1 and beta-0.10 are the same run: a value is given twice"),
        (("--loss", "sigmoid,none"), "loss-none: "),
        (("--beta", "0.1,0.2", "--resume", "auto"), "dpo sweep goes on with the runs"),
        (("--beta", ",".join(map(str, range(1, 1002)))), "the grid has 1,001 runs; at most 1,000"),
    ],
)  # fmt: skip
def test_bad_grid_is_refused_before_anything_is_read(
    grid: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    refused = dpo("sweep", "--model", "no", "--data", "no", "--out", str(tmp_path / "S"), *grid)
    assert refused.exit_code == 2
    assert message in refused.output
    assert not (tmp_path / "S").exists()


def test_done_run_with_another_config_is_refused(needed: list[str], tmp_path: Path) -> None:
    assert dpo("sweep", *needed, "--beta", "0.1,0.5").exit_code == 0
    refused = dpo("sweep", *needed, "--beta", "0.1,0.5", "--steps", "3")
    assert refused.exit_code == 2
    assert "SWEEP/beta-0.1 holds a run that was done with steps = 2" in refused.output.replace(
        "train.steps", "steps"
    )


def test_options_that_hold_commas_of_their_own_are_no_grid(needed: list[str]) -> None:
    for option in ("--loss=sigmoid:0.8,sft:0.2", "--columns=prompt=a,chosen=b", "--out=a,b"):
        refused = dpo("sweep", *needed, option)
        assert "no option has several values" in refused.output
