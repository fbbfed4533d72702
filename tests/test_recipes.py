"""The commands of ``dpo/RECIPES.md`` are understood, and those that a CPU can do run."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpo.cli import main
from dpo.report.charts import CHARTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "dpo/RECIPES.md").read_text(encoding="utf-8")
RECIPES = {
    title: block.replace("\\\n", "").splitlines()
    for title, block in re.findall(r"## ([^\n]*)\n\n```sh\n(.*?)\n```", PAGE, re.DOTALL)
}
LINES = [line for lines in RECIPES.values() for line in lines]
MODELS = r"[\w.-]+/(Qwen|SmolLM)[\w.-]+"
SMALL = ["--device", "cpu", "--threads", "1", "--quiet", "--batch-size", "16"]
SMALL += ["--tokens-per-micro-batch", "512"]


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model_folder: Callable[..., Path]
) -> Path:
    """A folder with what the recipes name, and a model in place of all of theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_model_folder(tmp_path / "tiny", max_position_embeddings=512)
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " no"} for n in range(40)]
    for name in ("pairs.jsonl", "held.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def do(line: str, *further: str) -> str:
    """Run a line with the tiny model; its output goes where the line says."""
    command, _, file = re.sub(MODELS, "tiny", line).partition(" > ")
    words = shlex.split(command)
    result = CliRunner().invoke(main, [*words[words.index("dpo") + 1 :], *further])
    assert result.exit_code == 0, result.output
    if file:
        Path(file).write_text(result.stdout, encoding="utf-8")
    return result.stdout


def test_there_are_five_recipes() -> None:
    assert len(RECIPES) == 5


@pytest.mark.parametrize("line", LINES)
def test_command_is_understood(line: str, folder: Path, understand: Callable[[str], None]) -> None:
    understand(line)
    if "dpo train --model" in line:
        assert "[train]" in do(line, "--print-config")


def test_full_training_and_generation(folder: Path) -> None:
    train, generate = RECIPES["One GPU, all weights"]
    assert "rewards/accuracy" in do(train, *SMALL)
    do(generate, "--max-new-tokens", "3")


def test_adapter_on_a_quantized_base_is_merged(folder: Path) -> None:
    train, merge = RECIPES["QLoRA"]
    do(train, *SMALL)
    do(merge)
    assert (folder / "merged/model.safetensors").exists()


def test_config_for_many_gpus_is_one_that_a_run_takes(folder: Path) -> None:
    print_config, train, resume = RECIPES["Many GPUs"]
    do(print_config)
    do(train, *SMALL, "--parallel", "data")  # the ranks of a test are in test_distributed.py
    do(resume, "--quiet")


def test_training_on_a_cpu_is_scored(folder: Path) -> None:
    train, score, evaluate = RECIPES["A CPU"]
    do(train, *SMALL)
    do(score)
    assert "Preference Pair Report" in do(evaluate)


def test_feedback_becomes_a_data_set(folder: Path) -> None:
    simulate, build, _, compare = RECIPES["From feedback logs"]
    do(simulate, "--decisions", "1200")
    do(build)
    assert (folder / "dataset/extraction_dpo_train.jsonl").exists()
    assert (folder / re.findall(r"--data (\S+)", compare)[0]).is_file()


def test_every_chart_of_the_report_is_explained() -> None:
    page = (ROOT / "dpo/REPORT.md").read_text(encoding="utf-8").lower()
    told = re.findall(r"^\| ([\w ,-]+) \|", page, re.MULTILINE)
    titles = [chart.title.split(" (")[0].lower() for chart in CHARTS]
    assert [title for title in titles if not any(title in each for each in told)] == []
