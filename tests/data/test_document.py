"""The usage document's own example calls, transcribed from TypeScript."""

import json
import re
from pathlib import Path

import pytest

from dpo import (
    build_consolidation_dataset,
    build_extraction_dataset,
    build_retrieval_dataset,
    compare_policies,
    compute_confidence_interval,
    evaluate_policy,
    format_evaluation_report,
    read_pairs,
)
from dpo.data.dataset import Dataset
from dpo.data.dataset_files import write_dataset
from dpo.data.kinds.extraction import EXTRACTION, ExtractionAction, ExtractionState
from dpo.data.pairs import PairOptions
from dpo.data.simulate import simulate
from dpo.data.stores import open_store
from dpo.eval.policies import RulesPolicy, UniformPolicy


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated agent's log of all three policies over 2024."""
    path = tmp_path_factory.mktemp("document") / "feedback.db"
    with open_store(path, create=True) as store:
        for policy in ("extraction", "retrieval", "consolidation"):
            store.record_decisions(simulate(policy, 1500, 0, situations=60))
    return path


@pytest.fixture(scope="module")
def dataset(feedback: Path) -> Dataset[ExtractionState, ExtractionAction]:
    # The simulated agent meets the same situations in many sessions, hence split_by="group".
    return build_extraction_dataset(
        feedback,
        start_date="2024-01-01",
        end_date="2024-12-31",
        min_confidence=0.7,
        max_examples=10000,
        eval_split=0.2,
        split_by="group",
    )


def test_building_datasets(
    dataset: Dataset[ExtractionState, ExtractionAction], capsys: pytest.CaptureFixture[str]
) -> None:
    stats = dataset.stats
    print(f"Training examples: {stats.train_examples}")
    print(f"Eval examples: {stats.eval_examples}")
    printed = re.findall(r"(Training|Eval) examples: (\d+)\n", capsys.readouterr().out)
    assert [name for name, _ in printed] == ["Training", "Eval"]
    assert sum(int(number) for _, number in printed) == stats.total_examples
    assert stats.train_examples + stats.eval_examples == stats.total_examples
    assert 0.1 < stats.eval_examples / stats.total_examples < 0.3
    confidences = [example.metadata.confidence or 0.0 for example in dataset.train]
    assert min(confidences) >= 0.7
    assert stats.filters.min_confidence < stats.filters.policy == 1500
    assert "2024-01-01" <= stats.date_range.start < stats.date_range.end < "2025"


def test_building_the_other_two(feedback: Path) -> None:
    for built in (
        build_retrieval_dataset(feedback, split_by="group"),
        build_consolidation_dataset(feedback, split_by="group", remove_crossing="prompt"),
    ):
        assert built.stats.train_examples > built.stats.eval_examples > 0


def test_evaluating_policies(dataset: Dataset[ExtractionState, ExtractionAction]) -> None:
    test_data = [
        {"state": example.state, "expected_action": example.action, "reward": example.reward}
        for example in dataset.eval
    ]
    policy = RulesPolicy(EXTRACTION)
    report = format_evaluation_report(evaluate_policy(policy, test_data))
    for heading in ("Accuracy", "Precision", "Recall", "F1", "Confusion"):
        assert heading in report
    comparison = compare_policies(UniformPolicy(EXTRACTION), policy, test_data)
    print(f"Winner: {comparison.winner}")
    print(f"Accuracy improvement: {comparison.improvements.accuracy:.2%}")
    assert comparison.winner in ("A", "B", "tie")
    assert -1 <= comparison.improvements.accuracy <= 1


def test_training_format_and_files(
    dataset: Dataset[ExtractionState, ExtractionAction], tmp_path: Path
) -> None:
    write_dataset(dataset, tmp_path / "out", pair_options=PairOptions(strategy="all"))
    for name in ("extraction_dpo_train.jsonl", "extraction_dpo_eval.jsonl"):
        lines = (tmp_path / "out" / name).read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(list(row) == ["prompt", "chosen", "rejected"] for row in rows)
        assert rows[0]["prompt"].startswith("Context:\n- Turn: ")
        assert rows[0]["prompt"].endswith("\n\nWhat action should be taken?")
        assert json.loads(rows[0]["chosen"])["decision"] in ("store", "skip", "defer")
    metadata = json.loads((tmp_path / "out/extraction_metadata.json").read_text("utf-8"))
    assert metadata["trainPairs"] >= 100
    assert metadata["dataset"]["trainExamples"] == dataset.stats.train_examples


def test_external_training_loads_the_files(
    dataset: Dataset[ExtractionState, ExtractionAction], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    write_dataset(dataset, tmp_path / "out", min_pairs=1)
    path = tmp_path / "out/extraction_dpo_train.jsonl"
    train_dataset = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert train_dataset[:]["rejected"] == [pair.rejected for pair in read_pairs(path)]


def test_confidence_intervals(dataset: Dataset[ExtractionState, ExtractionAction]) -> None:
    rewards = [example.reward for example in dataset.eval]
    interval = compute_confidence_interval(rewards, 0.95)
    print(f"Mean: {interval.mean:.3f} [{interval.lower:.3f}, {interval.upper:.3f}]")
    mean = sum(rewards) / len(rewards)
    assert interval.lower < mean < interval.upper
