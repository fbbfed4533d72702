"""What a run says: a header, lines while it goes, and a footer; plain where nobody looks."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpo import load_model, run
from dpo.cli import main
from dpo.cli.train import duration
from dpo.config import RunConfig
from dpo.progress import Console
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer


@pytest.fixture
def arguments(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"prompt": f"say {n}", "chosen": f" yes {n}", "rejected": " no"} for n in range(12)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "train", "--model", str(model_folder), "--data", str(data), "--out", str(tmp_path / "RUN"),
        "--batch-size", "4", "--steps", "2", "--learning-rate", "1e-2", "--schedule", "constant",
        "--threads", "1", "--device", "cpu", "--eval-split", "0.3", "--eval-every", "1",
    ]  # fmt: skip


def test_run_in_a_pipe_says_what_it_is_and_what_changed(
    arguments: list[str], tmp_path: Path, model_folder: Path
) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.output)  # no bar, no colour
    count = sum(p.numel() for p in load_model(model_folder).parameters())
    said = done.stderr.splitlines()
    assert f"model   {model_folder.name}: {count:,} parameters, float32, on cpu" in said
    # less than a MiB in all, as is each part
    held = "weights 0, gradients 0, optimizer states 0"
    assert f"memory  0 MiB without activations: {held}" in said
    tokens = json.loads((tmp_path / "RUN/data.json").read_text())["train"]
    assert (
        f"data    {tokens['pairs']} rows, {tokens['tokens']} useful tokens an epoch; 4 held out"
        in said
    )
    assert any(line.startswith("steps   2 of 4 rows, in micro-batches of at most") for line in said)
    assert f"writes  {tmp_path}/RUN" in said
    assert [
        line for line in said if line.startswith(("step 1, held out: loss", "step 2, held out"))
    ]
    footer = done.stdout.splitlines()
    assert footer[0].split() == ["held", "out", "before", "after", "95", "%", "interval"]
    assert re.fullmatch(r"loss +0\.6931 +0\.\d{4} +\[[\d.]+, [\d.]+\]", footer[1])
    assert [line.split()[0] for line in footer[-5:]] == [
        "steps", "memory", "model", "report", "next",
    ]  # fmt: skip
    assert re.fullmatch(r"memory  [1-9][\d,]* MiB at the peak", footer[-4])
    assert footer[-1] == f"next    dpo generate {tmp_path}/RUN/model --prompt ..."


def test_quiet_run_says_its_result_alone(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, [*arguments, "--quiet"])
    assert done.stderr == ""
    assert done.stdout.startswith("held out")


def test_every_long_job_shows_a_rate(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    config = RunConfig(
        model=arguments[2], data=arguments[4], out=arguments[6], eval_split=0.3,
        train=TrainConfig(batch_size=4, steps=2, threads=1, device="cpu"),
    )  # fmt: skip
    terminal = Terminal()
    run.train(config, console=Console(terminal))
    for label in ("tokenize", "reference", "reference, held out", "evaluate", "train"):
        assert re.search(
            rf"{label}[^\r\n]*\[\d\d:\d\d[^\r\n]*/s\]",
            re.sub(r"\x1b\[\d*m", "", terminal.getvalue()),
        ), label


def test_evaluation_tells_how_far_it_is(
    make_model: Callable[..., object], make_pairs: Callable[..., TokenizedPairs]
) -> None:
    from contextlib import nullcontext

    told: list[int] = []
    train = TrainConfig(batch_size=4, steps=1, micro_batch_size=2, tokens_per_micro_batch=None)
    trainer = Trainer(make_model(), make_pairs(4), train, eval_pairs=make_pairs(5))  # type: ignore[arg-type]
    trainer.watch = lambda pairs: nullcontext(lambda done: told.append(pairs - done))
    trainer.evaluate()
    assert told == [3, 1, 0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (7380, "2 h 03 min")]
)
def test_time_is_written_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
