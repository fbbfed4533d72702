"""Work beside the training: one piece at a time, none lost, no error lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import dpo.checkpoint
from dpo.background import Background
from dpo.checkpoint import copied, load_checkpoint, own_share
from dpo.cli import main
from dpo.errors import InputError
from dpo.ranks import Ranks
from dpo.tensor_files import write_tensors
from dpo.train_config import TrainConfig


def fail() -> None:
    raise OSError("the disk is full")


def test_pieces_are_done_one_after_another_and_none_is_left_undone() -> None:
    may_end, done = threading.Event(), list[str]()

    def first() -> None:
        may_end.wait()
        done.append("first")

    with Background() as background:
        background.begin(first)
        background.check()  # does not wait
        assert done == []
        may_end.set()
        background.begin(lambda: done.append("second"))
        assert done[0] == "first"
    assert done == ["first", "second"]


@pytest.mark.parametrize("call", [Background.check, Background.finish, Background.__enter__])
def test_failure_is_raised_by_the_next_call_or_at_the_end(
    call: Callable[[Background], object],
) -> None:
    def work() -> None:
        with Background() as background:
            background.begin(fail)
            while not (background._begun and background._begun.done()):
                pass
            call(background)

    with pytest.raises(OSError, match="the disk is full"):
        work()


def test_error_of_the_block_is_raised_after_the_work_is_done() -> None:
    done: list[int] = []

    def work() -> None:
        with Background() as background:
            background.begin(lambda: done.append(1))
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert done == [1]


def test_copy_does_not_change_with_the_weights_and_keeps_what_is_one() -> None:
    weight = torch.ones(3)
    tensors = {"model": {"a": weight, "b": weight}, "loss": {"c": torch.zeros(1)}}
    found = copied(own_share(tensors, Ranks()))
    weight += 1
    assert found["model"]["a"].part.tolist() == [1, 1, 1]
    assert found["model"]["a"].part is found["model"]["b"].part
    assert found["loss"]["c"].part.tolist() == [0]


# --- a run --------------------------------------------------------------------------------------


@pytest.fixture
def arguments(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [f'{{"prompt": "say {n}", "chosen": " yes", "rejected": " no"}}\n' for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    inputs = ["--model", str(model_folder), "--data", str(tmp_path / "pairs.jsonl")]
    options = "--batch-size 4 --steps 6 --save-every 1 --keep 9 --learning-rate 0.01 --threads 1"

    def make(out: str, *more: str) -> list[str]:
        return ["train", *inputs, "--out", str(tmp_path / out), *options.split(), *more]

    return make


def test_checkpoints_in_the_background_are_those_of_a_run_that_waits(
    tmp_path: Path, arguments: Callable[..., list[str]]
) -> None:
    for out, more in (("WAITS", ()), ("GOES_ON", ("--save-in-background",))):
        result = CliRunner().invoke(main, arguments(out, *more))
        assert result.exit_code == 0, result.output
    for step in range(1, 7):
        waited, found = (
            load_checkpoint(tmp_path / out / f"checkpoints/step-{step:06d}")
            for out in ("WAITS", "GOES_ON")
        )
        assert found.state == waited.state
        for stem, named in waited.tensors.items():
            for name, tensor in named.items():
                assert torch.equal(found.tensors[stem][name], tensor), name


def test_checkpoint_that_cannot_be_written_ends_the_run(
    tmp_path: Path, arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, *rest: Any) -> Any:
        if "step-000003" in str(path):
            fail()
        return write_tensors(path, *rest)

    monkeypatch.setattr(dpo.checkpoint, "write_tensors", write)
    result = CliRunner().invoke(main, arguments("RUN", "--save-in-background"))
    assert result.exit_code == 1
    assert "the disk is full" in result.stderr
    names = sorted(path.name for path in (tmp_path / "RUN/checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]
    assert not (tmp_path / "RUN/model").exists()


def test_option_without_checkpoints_is_refused() -> None:
    with pytest.raises(InputError, match=r"save_in_background needs train\.save_every"):
        TrainConfig(save_in_background=True)
