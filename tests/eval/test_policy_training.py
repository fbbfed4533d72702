"""Policies trained from data sets: what is left on disk, what was measured, what is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from dpo import cli
from dpo.adapter_files import is_adapter
from dpo.data.builder import build_dataset
from dpo.data.dataset import BuildOptions, Dataset
from dpo.data.dataset_files import write_dataset
from dpo.data.examples import Example, ExampleMetadata
from dpo.data.kinds import KINDS
from dpo.data.simulate import simulate, simulated_situations
from dpo.data.stores import open_store
from dpo.errors import InputError
from dpo.eval import policy_training
from dpo.eval.language_model import LanguageModelPolicy
from dpo.eval.policy_pairs import (
    PolicyPairs,
    demonstrate,
    pairs_of_dataset,
    read_policy_pairs,
)
from dpo.eval.policy_training import (
    PolicyTrainingConfig,
    PolicyTrainingResult,
    train_consolidation_policy,
    train_extraction_policy,
    train_policy,
    train_retrieval_policy,
)
from dpo.preferences import read_pairs
from dpo.run import train
from dpo.run_loop import RunResult

TRAIN: dict[str, Callable[[Any, PolicyTrainingConfig], PolicyTrainingResult]] = {
    "extraction": train_extraction_policy,
    "retrieval": train_retrieval_policy,
    "consolidation": train_consolidation_policy,
}


def _dataset(folder: Path, kind: str = "extraction") -> Dataset[Any, Any]:
    """Build a data set of 60 situations, a fifth of them held out."""
    with open_store(folder / f"{kind}.sqlite", create=True) as store:
        store.record_decisions(simulate(kind, 800, 0, situations=60))
    with open_store(folder / f"{kind}.sqlite") as store:
        return build_dataset(store, KINDS[kind], BuildOptions(split_by="group", eval_split=0.2))


def _config(folder: Path, **changes: Any) -> PolicyTrainingConfig:
    config = PolicyTrainingConfig(
        output_path=str(folder / "policy"),
        epochs=1,
        batch_size=8,
        learning_rate=1e-3,
        sft_epochs=1,
        min_pairs=20,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset[Any, Any]:
    return _dataset(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def pairs(dataset: Dataset[Any, Any]) -> PolicyPairs:
    return pairs_of_dataset(dataset, KINDS["extraction"], min_pairs=20)


@pytest.fixture(scope="module")
def trained(
    dataset: Dataset[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PolicyTrainingResult]:
    folder = tmp_path_factory.mktemp("trained")
    return folder / "policy", train_extraction_policy(dataset, _config(folder))


def test_training_leaves_the_promised_files(trained: tuple[Path, PolicyTrainingResult]) -> None:
    out, result = trained
    assert result.success
    assert result.error is None
    assert result.report_path is not None
    assert result.model_path == out / "dpo" / "model"
    assert result.start_path == out / "sft" / "model"
    assert result.report_path == out / "dpo" / "report.html"
    assert {path.name for path in out.iterdir()} == {
        "extraction_sft_train.jsonl", "extraction_dpo_train.jsonl", "extraction_dpo_eval.jsonl",
        "extraction_metadata.json", "start", "sft", "dpo", "scores.jsonl",
    }  # fmt: skip
    assert "held out: reward accuracy" in result.report_path.read_text()


def test_a_disk_that_cannot_be_written_is_in_the_result(
    dataset: Dataset[Any, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    result = train_extraction_policy(dataset, _config(tmp_path / "file"))
    assert not result.success
    assert "Not a directory" in (result.error or "")


def test_the_metrics_are_those_of_the_scores(trained: tuple[Path, PolicyTrainingResult]) -> None:
    out, result = trained
    assert result.metrics is not None
    before, after = result.metrics.before, result.metrics.after
    assert before is not None
    assert after is not None
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == len(read_pairs(out / "extraction_dpo_eval.jsonl"))
    margins = np.array([row["margin"] for row in rows])
    assert result.metrics.reward_margin == pytest.approx(margins.mean(), abs=1e-9)
    assert result.metrics.accuracy == pytest.approx((margins > 0).mean(), abs=1e-9)
    assert result.metrics.eval_loss == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-9)
    assert before.loss.mean == pytest.approx(math.log(2))
    assert before.accuracy.mean == 0.5
    likelier = np.mean([row["chosen_log_prob"] > row["rejected_log_prob"] for row in rows])
    assert after.likelier.mean == pytest.approx(likelier)
    assert after.reward_margin.lower < after.reward_margin.mean < after.reward_margin.upper
    lines = (out / "dpo" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines][-1]
    assert result.metrics.eval_loss == pytest.approx(last["eval/loss"], abs=1e-5)
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert result.metrics.train_loss == pytest.approx(np.mean(losses))


def test_the_metadata_tell_what_was_done(
    dataset: Dataset[Any, Any], trained: tuple[Path, PolicyTrainingResult]
) -> None:
    out, result = trained
    assert result.metrics is not None
    metadata = json.loads((out / "extraction_metadata.json").read_text())
    assert metadata["policy"] == "extraction"
    assert metadata["config"]["learningRate"] == 1e-3
    assert metadata["demonstrations"] == len(read_pairs(out / "extraction_sft_train.jsonl"))
    assert metadata["trainPairs"] == len(read_pairs(out / "extraction_dpo_train.jsonl"))
    assert metadata["dataset"]["trainExamples"] == dataset.stats.train_examples
    assert metadata["metrics"]["trainLoss"] == result.metrics.train_loss
    assert metadata["metrics"]["held out: loss"]["after"]["value"] == result.metrics.eval_loss


def test_every_option_reaches_the_runs(
    trained: tuple[Path, PolicyTrainingResult], pairs: PolicyPairs, tmp_path: Path
) -> None:
    config = _config(
        tmp_path, model_name=str(trained[1].start_path), epochs=2, batch_size=16, beta=0.3,
        learning_rate=2e-3, sft_epochs=3, sft_learning_rate=4e-3, seed=5,
        settings=("train.weight_decay=0.1", "loss.name=ipo"),
    )  # fmt: skip
    sft, dpo = policy_training._Plan(pairs, config, tmp_path / "policy").runs()
    assert (sft.model, dpo.model) == (config.model_name, str(tmp_path / "policy" / "sft" / "model"))
    assert (sft.loss.name, dpo.loss.name) == ("sft", "ipo")
    assert dpo.loss.options["beta"] == 0.3
    assert (sft.train.epochs, dpo.train.epochs) == (3, 2)
    assert (sft.train.learning_rate, dpo.train.learning_rate) == (4e-3, 2e-3)
    for run in (sft, dpo):
        assert (run.train.batch_size, run.train.seed, run.train.weight_decay) == (16, 5, 0.1)


@pytest.mark.parametrize(
    "setting", ["out=elsewhere", "model=other", "loss.beta=1", "train.seed=1", "train.epochs=2"]
)
def test_what_other_options_say_cannot_be_set(setting: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{setting}: .* follows from other options"):
        _config(tmp_path, settings=(setting,))


def test_a_rate_without_a_warm_start_is_refused(tmp_path: Path) -> None:
    for changes in ({"sft_epochs": 0}, {"model_name": "model", "sft_epochs": None}):
        with pytest.raises(InputError, match="sft_learning_rate has no effect"):
            _config(tmp_path, sft_learning_rate=1e-3, **changes)


@pytest.mark.parametrize(("demonstrations", "epochs"), [(10, 150), (239, 10), (10_000, 1)])
def test_a_tiny_model_takes_300_steps_of_warm_start(
    demonstrations: int, epochs: int, tmp_path: Path
) -> None:
    config = _config(tmp_path, sft_epochs=None)
    assert config.warm_start_epochs(demonstrations) == epochs


def test_decisions_on_held_out_situations_are_counted(
    trained: tuple[Path, PolicyTrainingResult], pairs: PolicyPairs
) -> None:
    _, result = trained
    assert result.decided is not None
    assert list(result.decided) == ["rules", "start", "policy"]
    for counts in result.decided.values():
        assert list(counts) == ["store", "skip", "defer"]
        assert sum(counts.values()) == len(pairs.situations)
    rules = KINDS["extraction"].baseline
    stored = sum(rules(state).action.decision == "store" for state in pairs.situations)
    assert result.decided["rules"]["store"] == stored


def test_a_policy_that_always_does_the_same_is_noted(pairs: PolicyPairs, tmp_path: Path) -> None:
    """One step of training on few tokens: the untrained model has one favourite."""
    config = _config(tmp_path, sft_epochs=0, settings=("train.steps=1",))
    result = train_policy(pairs, config)
    assert any("one and the same action in all" in note for note in result.notes)


def test_both_models_decide(trained: tuple[Path, PolicyTrainingResult]) -> None:
    kind = KINDS["extraction"]
    for path in (trained[1].model_path, trained[1].start_path):
        assert path is not None
        policy = LanguageModelPolicy.load(path)
        for state in simulated_situations("extraction", 3):
            assert policy.decide(state).action in kind.actions()


@pytest.mark.parametrize("kind", ["retrieval", "consolidation"])
def test_the_other_kinds_are_trained_too(kind: str, tmp_path: Path) -> None:
    result = TRAIN[kind](_dataset(tmp_path, kind), _config(tmp_path, batch_size=16))
    assert result.success, result.error
    assert result.model_path is not None
    assert LanguageModelPolicy.load(result.model_path).kind.name == kind


def test_a_policy_can_be_an_adapter(
    trained: tuple[Path, PolicyTrainingResult], pairs: PolicyPairs, tmp_path: Path
) -> None:
    settings = ("train.steps=1", "adapter.kind=lora")
    model = str(trained[1].start_path)
    config = _config(tmp_path, model_name=model, sft_epochs=None, settings=settings)
    result = train_policy(pairs, config)
    assert result.model_path is not None
    assert is_adapter(result.model_path)
    assert result.decided is not None
    assert sum(result.decided["policy"].values()) == len(pairs.situations)


def test_training_starts_from_a_model_folder_without_a_warm_start(
    trained: tuple[Path, PolicyTrainingResult], pairs: PolicyPairs, tmp_path: Path
) -> None:
    model = str(trained[1].start_path)
    config = _config(tmp_path, model_name=model, sft_epochs=None, settings=("train.steps=1",))
    result = train_policy(pairs, config)
    assert result.start_path is None
    assert not (tmp_path / "policy" / "start").exists()
    assert not (tmp_path / "policy" / "sft").exists()
    assert result.model_path == tmp_path / "policy" / "dpo" / "model"


def test_the_action_that_a_log_speaks_for_most_is_demonstrated() -> None:
    kind = KINDS["extraction"]
    first, second = simulated_situations("extraction", 2)
    usual, lucky, punished = kind.actions()[2:5]
    log = [(first, usual, 0.2), (first, lucky, 1.0), (first, usual, 0.2), (first, usual, 0.2)]
    log += [(second, punished, -1.0), (second, lucky, 1.0), (second, punished, -1.0)]
    shown = demonstrate([_example(*each) for each in log], kind)
    assert [row.prompt for row in shown] == [kind.render_prompt(each) for each in (first, second)]
    assert [row.chosen for row in shown] == [kind.render_action(each) for each in (usual, lucky)]
    assert [row.weight for row in shown] == pytest.approx([math.exp(0.2), math.e])
    assert all(row.rejected != row.chosen for row in shown)


def _example(state: Any, action: Any, reward: float) -> Example[Any, Any]:
    metadata = ExampleMetadata("id", "session", datetime(2024, 1, 1, tzinfo=UTC), None, None)
    return Example(state, action, reward, metadata)


def test_what_was_not_measured_is_none(pairs: PolicyPairs, tmp_path: Path) -> None:
    result = train_policy(
        replace(pairs, eval=[]), _config(tmp_path, sft_epochs=0, settings=("train.steps=1",))
    )
    assert result.metrics is not None
    assert result.metrics.before is None
    assert result.metrics.accuracy is None
    assert result.metrics.eval_loss is None
    assert result.metrics.reward_margin is None
    assert any("there are 0" in note for note in result.notes)
    metadata = json.loads((tmp_path / "policy" / "extraction_metadata.json").read_text())
    assert set(metadata["metrics"]) == {"trainLoss"}


def test_a_rate_too_low_for_a_tiny_model_is_noted(pairs: PolicyPairs, tmp_path: Path) -> None:
    config = _config(tmp_path, learning_rate=1e-5, sft_epochs=0, settings=("train.steps=1",))
    notes = train_policy(pairs, config).notes
    assert any("hardly moves at a learning rate of 1e-05" in note for note in notes)


def test_a_stopped_training_goes_on_to_the_same_weights(
    trained: tuple[Path, PolicyTrainingResult],
    pairs: PolicyPairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = _config(tmp_path)

    def stop_after_the_warm_start(*args: Any, **options: Any) -> RunResult:
        if (tmp_path / "policy" / "sft" / "model").exists():
            raise KeyboardInterrupt
        return train(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(policy_training, "train_run", stop_after_the_warm_start)
        with pytest.raises(KeyboardInterrupt):
            train_policy(pairs, config)
    result = train_policy(pairs, replace(config, resume=True))
    assert result.model_path is not None
    assert trained[1].model_path is not None
    resumed, whole = (
        load_file(path / "model.safetensors") for path in (result.model_path, trained[1].model_path)
    )
    assert all(resumed[name].equal(whole[name]) for name in whole)
    assert result.metrics == trained[1].metrics


def test_a_stopped_training_says_how_it_goes_on(
    pairs: PolicyPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def stopped(*_: Any, go_on: str, **__: Any) -> RunResult:
        told.append(go_on)
        raise SystemExit(143)

    monkeypatch.setattr(policy_training, "train_run", stopped)
    with pytest.raises(SystemExit):
        train_policy(pairs, _config(tmp_path))
    assert told == ["the same dpo train-policy and --resume"]


def test_a_training_is_not_resumed_on_other_pairs(
    trained: tuple[Path, PolicyTrainingResult], pairs: PolicyPairs
) -> None:
    out, _ = trained
    config = _config(out.parent, resume=True)
    before = (out / "extraction_dpo_train.jsonl").read_bytes()
    with pytest.raises(InputError, match="the training that was stopped had other pairs"):
        train_policy(replace(pairs, train=pairs.train[1:]), config)
    assert (out / "extraction_dpo_train.jsonl").read_bytes() == before


def test_what_is_wrong_with_the_data_is_in_the_result(
    dataset: Dataset[Any, Any], tmp_path: Path
) -> None:
    result = train_extraction_policy(dataset, _config(tmp_path, min_pairs=5000))
    assert not result.success
    assert result.metrics is None
    assert result.error is not None
    assert "minimum 5000 required" in result.error
    other = train_retrieval_policy(dataset, _config(tmp_path))
    assert other.error == "expected a data set of the policy retrieval, got extraction"
    assert not (tmp_path / "policy").exists()


def test_too_few_pairs_are_refused_with_both_counts(pairs: PolicyPairs, tmp_path: Path) -> None:
    twice = replace(pairs, train=[*pairs.train[:5], *pairs.train[:5]])
    with pytest.raises(InputError, match=r"10 formed, 5 of them unique \(minimum 20 required\)"):
        train_policy(twice, _config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0 and finite, got nan"),
        ({"beta": 0.0}, "beta must be above 0 and finite, got 0.0"),
        ({"model_name": ""}, "model_name must not be empty"),
    ],
)
def test_config_refuses_what_is_out_of_range(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        _config(tmp_path, **changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": ("train.sede=1",)}, r"train\.sede.*train\.seed"),
        ({"model_name": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_a_bad_setting_leaves_nothing(
    changes: dict[str, Any], message: str, pairs: PolicyPairs, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train_policy(pairs, _config(tmp_path, **changes))
    assert not (tmp_path / "policy").exists()


def test_the_output_folder_must_be_free(pairs: PolicyPairs, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine.txt").touch()
    with pytest.raises(InputError, match=r"policy is not empty: go on there with resume"):
        train_policy(pairs, _config(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file: the output is a folder"):
        train_policy(pairs, _config(tmp_path, output_path=str(tmp_path / "file")))


def _command(*arguments: object) -> Any:
    return CliRunner().invoke(cli.main, ["train-policy", *map(str, arguments)])


def test_the_command_trains_and_tells(dataset: Dataset[Any, Any], tmp_path: Path) -> None:
    write_dataset(dataset, tmp_path / "data", min_pairs=20)
    read = read_policy_pairs(tmp_path / "data", KINDS["extraction"])
    formed = pairs_of_dataset(dataset, KINDS["extraction"], min_pairs=20)
    assert [row.chosen for row in read.train] == [row.chosen for row in formed.train]
    assert read.demonstrations == formed.demonstrations
    result = _command(
        "extraction", "--dataset", tmp_path / "data", "--out", tmp_path / "out", "--min-pairs", 20,
        "--epochs", 1, "--sft-epochs", 0, "--learning-rate", 1e-3, "--quiet",
        "--set", "train.steps=1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("training loss     0.69")
    assert lines[1].split() == ["held", "out", "before", "DPO", "after", "DPO"]
    assert lines[2].startswith("loss   ")
    assert f"model   {tmp_path}/out/dpo/model" in lines
    assert f"report  {tmp_path}/out/dpo/report.html" in lines


def test_the_command_refuses_a_folder_that_is_no_such_data_set(
    dataset: Dataset[Any, Any], tmp_path: Path
) -> None:
    write_dataset(dataset, tmp_path / "data", min_pairs=20)
    result = _command("retrieval", "--dataset", tmp_path / "data", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "expected a data set of the policy retrieval, got 'extraction'" in result.output
    (tmp_path / "data" / "extraction_dpo_eval.jsonl").unlink()
    result = _command("extraction", "--dataset", tmp_path / "data", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no data set: missing" in result.output
    result = _command("extraction", "--dataset", tmp_path / "none", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
