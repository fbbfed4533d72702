"""Density ratios are those of the prompts, and the rows of ``dpo weigh`` carry them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from dpo.cli import main
from dpo.density_ratio import density_ratios, prompt_features
from dpo.losses import make_loss
from dpo.models import Decoder, load_model
from dpo.precision import PRECISIONS
from dpo.preferences import read_pairs
from dpo.segments import Segments, TokenStream, plan_attention
from dpo.tokenization import TokenizedPair, TokenizedPairs, columns_of, tokenize_pairs
from dpo.tokenizer import load_tokenizer
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

NOTHING = np.zeros(0, np.int32)
ANSWER = np.array([1, 2], np.int32)


def answers(prompts: Sequence[int], labels: Sequence[bool]) -> TokenizedPairs:
    """Unpaired answers to prompts of one token each, which first appear in rising order."""
    return columns_of(
        [
            TokenizedPair(
                np.array([prompt], np.int32),
                ANSWER if is_good else NOTHING,
                NOTHING if is_good else ANSWER,
                id=f"row-{row}",
            )
            for row, (prompt, is_good) in enumerate(zip(prompts, labels, strict=True))
        ]
    )


# --- ratios -------------------------------------------------------------------------------------


def test_ratio_of_two_prompts_is_that_of_their_shares() -> None:
    """Good: 3/4 and 1/4 of 4,000; bad: 1/2 and 1/2 of 1,000. Ratios 3/2 and 1/2."""
    prompts = [0] * 3000 + [1] * 1000 + [0] * 500 + [1] * 500
    pairs = answers(prompts, [True] * 4000 + [False] * 1000)
    ratios = density_ratios(torch.tensor([[0.0], [1.0]]), pairs)
    assert sorted(set(ratios.round(2))) == [0.5, 1.5]
    assert ratios[pairs.has_rejected][[0, -1]] == pytest.approx([1.5, 0.5], rel=2e-3)


def test_ratios_of_two_normal_distributions_are_recovered() -> None:
    """Of unit variance with means m and -m the log-ratio is 2 m x; noise plays no part."""
    generator, count, mean = torch.Generator().manual_seed(0), 4000, 0.4
    features = torch.randn(2 * count, 3, generator=generator)
    features[:count, 0] += mean
    features[count:, 0] -= mean
    pairs = answers(range(2 * count), [True] * count + [False] * count)
    found = np.log(density_ratios(features, pairs))
    expected = 2 * mean * features[:, 0].numpy()
    assert np.abs(found - expected).mean() < 0.05


def test_equal_distributions_of_prompts_have_ratios_of_one() -> None:
    prompts = [0, 1, 2, 2] * 10
    pairs = answers(prompts * 2, [True] * 40 + [False] * 40)
    features = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert density_ratios(features, pairs) == pytest.approx(np.ones(80), abs=1e-6)


def test_penalty_is_that_of_scikit_learn() -> None:
    """At the optimum the gradient of |w|^2 / 2 + sum of balanced losses is 0: here for one feature.

    Two prompts, one good and one bad, standardized to -1 and 1: the log-odds are -w and w with
    w = 2 s(-w).
    """
    pairs = answers([0, 1], [False, True])
    log_ratio = float(np.log(density_ratios(torch.tensor([[5.0], [7.0]]), pairs)[1]))
    assert log_ratio == pytest.approx(2 / (1 + np.exp(log_ratio)), abs=1e-6)


def test_features_are_mean_hidden_states_of_each_prompt_alone(
    make_model: Callable[..., Decoder], make_pairs: Callable[..., TokenizedPairs]
) -> None:
    model, pairs = make_model(), make_pairs(9)
    pairs = columns_of([*pairs, replace(pairs[2], id="again")])

    def alone(prompt: np.ndarray[tuple[int], np.dtype[np.int32]]) -> Tensor:
        segments = Segments((len(prompt),), (None,))
        ids, positions = torch.from_numpy(prompt).long(), torch.arange(len(prompt))
        hidden: Tensor = model(TokenStream(ids, positions, plan_attention(segments)))
        return hidden.mean(dim=0).detach()

    for budget in (1, 12, 8192):
        found = prompt_features(
            model, pairs, precision=PRECISIONS["float32"], tokens_per_batch=budget
        )
        assert len(found) == pairs.prompt_groups.max() + 1
        expected = torch.stack([alone(pair.prompt_ids) for pair in pairs])
        torch.testing.assert_close(found[pairs.prompt_groups], expected, rtol=1e-4, atol=1e-5)


# --- the command --------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def called(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["weigh", "--device", "cpu", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


ROWS = [
    {
        "id": f"{kind} {n}",
        "prompt": f"{topic} {n % 4}?",
        "completion": " 7",
        "label": kind == "good",
    }
    for kind, topics in (("good", ["sum", "sum", "sum", "poem"]), ("bad", ["sum", "poem"] * 2))
    for n, topic in enumerate(topics * 8)
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Good answers are to sums mostly, bad ones to sums and poems alike."""
    rows = [dict(row) for row in ROWS]
    rows[-1]["weight"] = 2.0
    return write(tmp_path / "answers.jsonl", rows)


def test_weights_of_bad_answers_are_clipped_ratios_and_all_else_stays(
    tmp_path: Path, data: str, model_folder: Path
) -> None:
    out, wide = str(tmp_path / "out.jsonl"), str(tmp_path / "wide.jsonl")
    said = called("--model", str(model_folder), "--data", data, "--out", out)
    assert "32 bad answers: ratios" in said
    called(
        "--model", str(model_folder), "--data", data, "--out", wide, "--quiet",
        "--min-ratio", "0", "--max-ratio", "1000",
    )  # fmt: skip
    before, after, ratios = read_pairs(data), read_pairs(out), read_pairs(wide)
    assert [replace(row, weight=1.0) for row in after] == [
        replace(row, weight=1.0) for row in before
    ]
    for old, row, ratio in zip(before, after, ratios, strict=True):
        factor = np.clip(ratio.weight / old.weight, 0.5, 10)
        expected = old.weight * (1 if row.chosen is not None else factor)
        assert row.weight == pytest.approx(expected, rel=1e-5), row.id
    bad = [row for row in ratios if row.rejected is not None]
    means = [
        np.mean([row.weight for row in bad[:-1] if topic in str(row.prompt)])
        for topic in ("sum", "poem")
    ]
    assert means[1] < 0.8 < 1.2 < means[0]
    assert called(
        "--model", str(model_folder), "--data", data, "--out", out, "--quiet"
    ) == f"{out}\n"  # fmt: skip
    assert read_pairs(out) == after


def test_rows_and_columns_that_are_left_out_are_told(tmp_path: Path, model_folder: Path) -> None:
    rows = [{**ROWS[0], "note": "mine"}, {"id": "b", "prompt": ""}, *ROWS[1:]]
    data, out = write(tmp_path / "answers.jsonl", rows), str(tmp_path / "out.jsonl")
    said = called(
        "--model", str(model_folder), "--data", data, "--out", out, "--on-bad-row", "skip"
    )
    assert "columns that are not read: note" in said
    assert "1 faulty rows left out" in said
    assert len(read_pairs(out)) == len(ROWS)


def test_loss_of_a_step_is_weighted_by_them(tmp_path: Path, data: str, model_folder: Path) -> None:
    out = str(tmp_path / "out.jsonl")
    called("--model", str(model_folder), "--data", data, "--out", out, "--quiet")
    pairs = tokenize_pairs(read_pairs(out), load_tokenizer(model_folder)).pairs
    assert len(set(pairs.weights.tolist())) > 3
    config = TrainConfig(batch_size=64, steps=2, learning_rate=1e-3, schedule="constant")
    trainer = Trainer(load_model(model_folder), pairs, config, loss="bco")
    trainer.train_step()  # which takes the policy away from its reference
    seen = trainer.score(trainer.sampler.rows(1), trainer.batches).loss_pairs
    loss = make_loss("bco")
    seen = replace(seen, running=loss.update(replace(seen, running=trainer.running)))
    expected = (seen.weight * loss(seen).detach()).sum() / seen.weight.sum()
    trainer.close_window()
    trainer.train_step()
    assert trainer.close_window()["loss"] == pytest.approx(float(expected), abs=1e-6)
    assert float(expected) != pytest.approx(float(loss(seen).detach().mean()), abs=1e-7)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS[:32], [], "no answer is bad: there is no ratio of good to bad prompts"),
        (ROWS[32:], [], "no answer is good: there is no ratio"),
        (
            [{"id": "a", "prompt": "b", "chosen": "c", "rejected": "d"}],
            [],
            "1 rows have two answers (the first is a), to the same prompt",
        ),
        (ROWS, ["--min-ratio", "2", "--max-ratio", "1"], "max-ratio finite and no less, got 2 and"),
        (ROWS, ["--min-ratio", "-1"], "min-ratio must be at least 0"),
        (ROWS, ["--out", "weights.json"], "--out of dpo weigh is a file .jsonl or .jsonl.gz"),
        (ROWS, ["--data", "another.jsonl"], "takes one data set, but data names 2"),
    ],
)
def test_what_has_no_ratio_is_refused(
    tmp_path: Path, model_folder: Path, rows: list[object], options: list[str], message: str
) -> None:
    data, out = write(tmp_path / "rows.jsonl", rows), str(tmp_path / "out.jsonl")
    arguments = ["--model", str(model_folder), "--data", data, "--out", out, *options]
    result = CliRunner().invoke(main, ["weigh", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert not Path(out).exists()
