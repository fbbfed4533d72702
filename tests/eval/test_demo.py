"""``dpo demo``: what it leaves, what it says, and that it says no where the answer is no."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dpo import cli
from dpo.data.dataset_files import load_dataset
from dpo.data.kinds import KINDS
from dpo.data.simulate import best_action, true_reward
from dpo.eval.demo import DemoResult, run_demo
from dpo.eval.language_model import LanguageModelPolicy
from dpo.files import sha256_file
from dpo.preferences import read_pairs
from dpo.progress import Console

DECISIONS = 1600


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--decisions", str(DECISIONS), "--out", str(folder)]
    result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console(quiet=True)
    return run_demo(folder, KINDS["consolidation"], seed=3, decisions=DECISIONS, console=console)


def test_it_names_the_simulation_the_figures_and_where_things_are(shown: tuple[Path, str]) -> None:
    folder, output = shown
    assert f"SIMULATION: {DECISIONS:,} decisions" in output
    for label in ("loss", "reward accuracy", "reward margin"):
        assert re.search(rf"^{label} +\S+ +\[.*\] +\S+ +\[.*\]$", output, flags=re.MULTILINE)
    for label in ("SFT", "rules", "DPO"):
        assert re.search(rf"^{label} .*\[.*\]$", output, flags=re.MULTILINE)
    named = dict(re.findall(r"^(model|report|data) +(\S+)$", output, flags=re.MULTILINE))
    assert (Path(named["model"]) / "model.safetensors").is_file()
    assert "held out: reward accuracy" in Path(named["report"]).read_text()
    assert (Path(named["data"]) / "extraction_dpo_train.jsonl").is_file()
    pages = re.findall(r"^page +(\S+) ", output, flags=re.MULTILINE)
    assert [Path(page).name for page in pages] == ["dpo-against-SFT.html", "dpo-against-rules.html"]
    assert all("<svg" in Path(page).read_text() for page in pages)
    assert {Path(page).parent for page in pages} == {folder}


def test_no_situation_is_on_both_sides(shown: tuple[Path, str]) -> None:
    sides = [
        {str(pair.prompt) for pair in read_pairs(shown[0] / f"dataset/extraction_dpo_{side}.jsonl")}
        for side in ("train", "eval")
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_the_true_rewards_are_those_of_what_each_policy_decides(found: DemoResult) -> None:
    kind = KINDS["consolidation"]
    states = [each.state for each in load_dataset(found.folder / "dataset", kind).eval]
    assert found.decisions == len(states)
    assert found.training.model_path is not None
    policy = LanguageModelPolicy.load(found.training.model_path)
    decided = [each.action for each in policy.decide_batch(states)]
    expected = {
        "DPO": decided,
        "rules": [kind.baseline(state).action for state in states],
        "best possible": [best_action(kind.name, state) for state in states],
    }
    for name, actions in expected.items():
        rewards = [true_reward(kind.name, *each) for each in zip(states, actions, strict=True)]
        assert found.true_rewards[name].mean == pytest.approx(np.mean(rewards))
    gain = found.true_rewards["DPO"].mean - found.true_rewards["rules"].mean
    assert found.gains["rules"].mean == pytest.approx(gain)


def test_the_result_is_on_disk_too(found: DemoResult) -> None:
    result = json.loads((found.folder / "result.json").read_text())
    assert result["policy"] == "consolidation"
    assert result["trueRewards"]["DPO"]["mean"] == found.true_rewards["DPO"].mean
    assert result["gains"]["SFT"]["lower"] == found.gains["SFT"].lower
    assert set(result["loggedRewards"]) == {"SFT", "rules", "DPO"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(found: DemoResult, tmp_path: Path) -> None:
    kind, console = KINDS["consolidation"], Console(quiet=True)
    again = run_demo(tmp_path, kind, seed=3, decisions=DECISIONS, console=console)
    paths = [each.training.model_path for each in (found, again)]
    first, second = [sha256_file(path / "model.safetensors") for path in paths if path is not None]
    assert first == second
    assert again.true_rewards == found.true_rewards


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ({"SFT": (0.01, 0.03)}, "DPO is better than SFT, by +0.020 [+0.010, +0.030]"),
        ({"rules": (-0.03, -0.01)}, "DPO is worse than rules, by -0.020 [-0.030, -0.010]"),
        ({"rules": (-0.01, 0.03)}, "DPO and rules cannot be told apart: by +0.010"),
    ],
)
def test_the_verdict_follows_the_interval(
    found: DemoResult, gains: Mapping[str, tuple[float, float]], words: str
) -> None:
    intervals = {
        name: replace(found.gains["SFT"], mean=(lower + upper) / 2, lower=lower, upper=upper)
        for name, (lower, upper) in gains.items()
    }
    result = replace(found, gains=intervals)
    assert words in result.verdict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decisions", "100"], "Insufficient training pairs"),
        (["--decisions", "0"], "decisions must be at least 1, .* got 0"),
        (["--policy", "gardening"], "'gardening' is not one of"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(cli.main, ["demo", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert re.search(message, result.output)
    assert "Traceback" not in result.output


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = CliRunner().invoke(cli.main, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not an empty folder" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
