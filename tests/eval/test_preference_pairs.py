"""Reward accuracy, margin, calibration and length control of scored pairs."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.errors import InputError
from dpo.eval.bootstrap import BootstrapOptions
from dpo.eval.preference_pairs import (
    PAIR_METRICS,
    ScoredPairs,
    compare_pairs,
    evaluate_pairs,
    read_scores,
)
from dpo.eval.report_text import format_pair_comparison, format_pair_report

FEW = BootstrapOptions(resamples=100)


def _row(identity: object, chosen: float, rejected: float, **more: object) -> dict[str, object]:
    return {"id": identity, "chosen_reward": chosen, "rejected_reward": rejected, **more}


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pairs(margins: list[float], longer: list[float]) -> ScoredPairs:
    ids = tuple(map(str, range(len(margins))))
    return ScoredPairs(ids, np.array(margins), np.array(longer), np.full(len(ids), np.nan), ids)


def _random_pairs(shift: float, seed: int, count: int = 200) -> ScoredPairs:
    generator = np.random.default_rng(seed)
    longer = generator.integers(0, 2, count).astype(float)
    return _pairs(generator.normal(shift, 1.0, count).tolist(), longer.tolist())


def test_ties_count_half() -> None:
    found = evaluate_pairs(_pairs([1.0, 0.0, -1.0, 2.0], [1, 1, 0, 0]), FEW)
    assert found.metrics["reward_accuracy"].mean == (1 + 0.5 + 0 + 1) / 4
    assert found.ties == 1


def test_margin_and_log_loss_by_hand() -> None:
    found = evaluate_pairs(_pairs([2.0, -1.0], [1, 0]), FEW)
    assert found.metrics["margin"].mean == 0.5
    losses = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(1.0))]
    assert found.metrics["log_loss"].mean == pytest.approx(np.mean(losses))


def test_a_model_without_an_opinion_has_log_loss_ln_2() -> None:
    found = evaluate_pairs(_pairs([0.0] * 4, [1, 1, 0, 0]), FEW)
    assert found.metrics["log_loss"].mean == pytest.approx(np.log(2))
    assert found.metrics["reward_accuracy"].mean == 0.5
    assert found.metrics["calibration_error"].mean == 0.0
    assert found.metrics["brier"].mean == 0.25  # a coin that says 0.5


def test_liking_the_longer_answer_is_worth_half_under_length_control() -> None:
    longer = [1.0] * 80 + [0.0] * 20
    found = evaluate_pairs(_pairs([1.0 if each else -1.0 for each in longer], longer), FEW)
    assert found.metrics["reward_accuracy"].mean == 0.8
    assert found.metrics["length_controlled_accuracy"].mean == 0.5
    assert found.chosen_is_longer == 0.8


def test_a_calibrated_model_has_a_small_calibration_error() -> None:
    generator = np.random.default_rng(0)
    size = generator.exponential(2.0, size=5000)
    right = generator.random(5000) < 1 / (1 + np.exp(-size))
    margins = np.where(right, size, -size)
    found = evaluate_pairs(_pairs(margins.tolist(), [1.0] * 2500 + [0.0] * 2500), FEW)
    assert found.calibration.expected_error.mean < 0.02


def test_scores_are_read(tmp_path: Path) -> None:
    rows = [
        _row("x", 1.0, 0.5, chosen_tokens=3, rejected_tokens=5, margin=0.5),
        _row("y", 0.0, 0.5, chosen_tokens=5, rejected_tokens=5),
        _row(None, 0.0, 0.5, chosen_tokens=9, rejected_tokens=5),
    ]
    found = read_scores(_write(tmp_path / "s.jsonl", rows))
    assert found.ids == ("x", "y", "3")
    assert found.margins.tolist() == [0.5, -0.5, -0.5]
    assert found.longer.tolist() == [0.0, 0.5, 1.0]


def test_scores_without_lengths_have_no_length_control(tmp_path: Path) -> None:
    path = _write(tmp_path / "s.jsonl", [_row("x", 1.0, 0.5), _row("y", 1.0, 0.5)])
    found = evaluate_pairs(read_scores(path), FEW)
    absent = {"length_controlled_accuracy", "chosen_likelier"}
    assert set(found.metrics) == set(PAIR_METRICS) - absent
    assert found.chosen_is_longer is None
    assert "the longer one" not in format_pair_report(found)


def test_the_report_names_every_metric() -> None:
    report = format_pair_report(evaluate_pairs(_random_pairs(0.5, 0), FEW))
    assert report.startswith("Preference Pair Report\n")
    assert "Reward accuracy:" in report
    assert "Length-controlled accuracy:" in report
    assert "The chosen answer is the longer one in" in report


def test_training_that_helps_is_seen_in_paired_differences() -> None:
    before = _random_pairs(0.0, 0)
    after = replace(before, margins=before.margins + 0.4)
    found = compare_pairs(before, after, FEW)
    assert found.winner == "B"
    assert found.differences["margin"].interval.mean == pytest.approx(0.4)
    accuracy = found.differences["reward_accuracy"].interval
    assert accuracy.mean == pytest.approx((after.hits - before.hits).mean())
    report = format_pair_comparison(found, "before", "after")
    assert "before vs after, 200 pairs\nWinner: after\n" in report


def test_pairs_are_matched_by_id() -> None:
    before = _random_pairs(0.0, 0)
    order = np.random.default_rng(1).permutation(200)
    shuffled = replace(
        before,
        ids=tuple(before.ids[i] for i in order),
        margins=before.margins[order],
        longer=before.longer[order],
    )
    found = compare_pairs(before, shuffled, FEW)
    assert found.winner == "tie"
    assert found.differences["margin"].interval.standard_error == 0.0


def test_pairs_of_one_prompt_are_one_unit(tmp_path: Path) -> None:
    """Ten prompts with twenty pairs that say the same: as uncertain as ten pairs."""
    generator = np.random.default_rng(0)
    rewards = generator.normal(0.0, 1.0, 10)
    rows = [
        _row(f"{prompt}-{pair}", rewards[prompt], 0.0, prompt_hash=f"p{prompt}")
        for prompt in range(10)
        for pair in range(20)
    ]
    pairs = read_scores(_write(tmp_path / "s.jsonl", rows))
    alone = replace(pairs, prompts=pairs.ids)
    found, narrow = (evaluate_pairs(each).metrics["margin"] for each in (pairs, alone))
    assert (found.units, narrow.units) == (10, 200)
    assert found.standard_error > 3 * narrow.standard_error
    compared = compare_pairs(pairs, replace(pairs, margins=pairs.margins + rewards.repeat(20)))
    assert compared.differences["margin"].interval.units == 10


def test_the_likelier_answer_is_counted_where_log_probs_are_there(tmp_path: Path) -> None:
    rows = [
        _row(number, 1.0, 0.0, chosen_log_prob=-float(number), rejected_log_prob=-1.0)
        for number in range(4)
    ]
    found = evaluate_pairs(read_scores(_write(tmp_path / "s.jsonl", rows)), FEW)
    assert found.metrics["chosen_likelier"].mean == (1 + 0.5) / 4
    bare = read_scores(_write(tmp_path / "bare.jsonl", [_row(number, 1, 0) for number in (0, 1)]))
    assert "chosen_likelier" not in evaluate_pairs(bare, FEW).metrics
    with pytest.raises(InputError, match="chosen_likelier needs chosen_log_prob and rejected_log"):
        compare_pairs(bare, bare, FEW, metric="chosen_likelier")


def test_other_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="A has 200, B has 100, 100 ids occur in both"):
        compare_pairs(_random_pairs(0, 0), _random_pairs(0, 0, 100), FEW)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InputError, match="metric must be one of reward_accuracy, margin, "):
        compare_pairs(_random_pairs(0, 0), _random_pairs(0, 1), FEW, metric="elo")


def test_length_control_without_lengths_is_refused() -> None:
    pairs = _pairs([1.0, 2.0], [float("nan")] * 2)
    with pytest.raises(InputError, match="needs chosen_tokens and rejected_tokens in every line"):
        compare_pairs(pairs, pairs, FEW, metric="length_controlled_accuracy")


def test_length_control_of_one_side_only_is_refused() -> None:
    pairs = _pairs([1.0, 2.0, 3.0], [1.0] * 3)
    with pytest.raises(InputError, match="is undefined: the same side is the longer one"):
        compare_pairs(pairs, pairs, FEW, metric="length_controlled_accuracy")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "x", "chosen_reward": 1.0}], "rejected_reward must be a finite number, got None"),
        ([_row("x", float("nan"), 1.0)], "chosen_reward must be a finite number, got nan"),
        ([_row("x", 1.0, 1.0), [1]], r"s\.jsonl:2: not a scored pair: expected an object"),
        ([_row("x", 1.0, 1.0)] * 2, "the id 'x' occurs more than once"),
        ([], "holds no scored pairs: there is nothing to evaluate"),
        ([_row("x", True, 1.0)] * 7, "and 2 more"),
        ([_row("x", 10**400, 1.0)], "chosen_reward must be a finite number, got 1000"),
    ],
)
def test_files_that_hold_no_scores_are_refused(
    tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_scores(_write(tmp_path / "s.jsonl", rows))


def test_lines_that_are_not_json_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("{\n")
    with pytest.raises(InputError, match=r"s\.jsonl:1: not a scored pair: malformed JSON"):
        read_scores(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; expected the scores that dpo score writes"):
        read_scores(tmp_path / "none.jsonl")


def test_gzip_is_read_and_other_bytes_are_refused(tmp_path: Path) -> None:
    lines = "".join(f"{json.dumps(_row(f'a{chr(0x2028)}{n}', 1.0, 0.0))}\n" for n in range(3))
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert len(read_scores(tmp_path / "s.jsonl.gz").ids) == 3
    (tmp_path / "s.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"s\.jsonl:1: not a scored pair: not UTF-8"):
        read_scores(tmp_path / "s.jsonl")
