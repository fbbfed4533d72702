"""Scores are the rewards that training logs, whatever the batch size."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpo import run
from dpo.config import LossConfig, RunConfig
from dpo.errors import InputError, RunError
from dpo.models import Decoder
from dpo.progress import Console
from dpo.reference import ReferenceLogProbs
from dpo.score import PairScore, score_file, score_pairs
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]
MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, make_model_folder: MakeFolder) -> RunConfig:
    """To train from one model against another as the reference."""
    rows = [
        {"id": f"pair {n}", "prompt": f"say {n}", "chosen": f" yes {n % 5}", "rejected": " no"}
        for n in range(8)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RunConfig(
        model=str(model_folder),
        data=str(data),
        out=str(tmp_path / "RUN"),
        reference=str(make_model_folder(tmp_path / "reference", seed=1)),
        train=TrainConfig(batch_size=4, steps=4, learning_rate=1e-2, threads=1, device="cpu"),
    )


def changed(config: RunConfig, **options: Any) -> RunConfig:
    """Replace options, those of the training under their own names."""
    names = options.keys() & {field.name for field in fields(TrainConfig)}
    train = replace(config.train, **{name: options.pop(name) for name in names})
    return replace(config, train=train, **options)


def scores(config: RunConfig) -> list[dict[str, Any]]:
    path = score_file(
        replace(config, out=f"{config.out}-scores.jsonl"), console=Console(io.StringIO())
    )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(config: RunConfig) -> list[dict[str, float]]:
    text = (Path(config.out) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_line_has_the_names_that_scripts_rely_on(config: RunConfig) -> None:
    line = scores(config)[3]
    assert list(line) == [
        "id", "prompt_hash", "chosen_log_prob", "rejected_log_prob", "reference_chosen_log_prob",
        "reference_rejected_log_prob", "chosen_reward", "rejected_reward", "margin",
        "chosen_tokens", "rejected_tokens",
    ]  # fmt: skip
    assert (line["id"], line["chosen_tokens"], line["rejected_tokens"]) == ("pair 3", 7, 4)
    ratio = line["chosen_log_prob"] - line["reference_chosen_log_prob"]
    assert line["chosen_reward"] == pytest.approx(0.1 * ratio, abs=1e-5)
    assert line["margin"] == pytest.approx(line["chosen_reward"] - line["rejected_reward"])


def unpaired(config: RunConfig) -> RunConfig:
    """The same rows one answer after another: good and bad ones in turn."""
    texts = Path(str(config.data)).read_text(encoding="utf-8").splitlines()
    rows = [
        {
            "id": f"{row['id']} {side}",
            "prompt": row["prompt"],
            "completion": row[side],
            "label": is_good,
        }
        for row in map(json.loads, texts)
        for side, is_good in (("chosen", True), ("rejected", False))
    ]
    data = Path(str(config.data)).with_name("unpaired.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return replace(config, data=str(data), out=f"{config.out}-unpaired")


@pytest.mark.parametrize("loss", ["sigmoid", "bco", "simpo"])
def test_unpaired_answers_have_the_scores_that_they_have_in_pairs(
    config: RunConfig, loss: str
) -> None:
    config = replace(config, loss=LossConfig(loss))
    whole, single = scores(config), scores(unpaired(config))
    for pair, good, bad in zip(whole, single[::2], single[1::2], strict=True):
        assert (good["id"], bad["id"]) == (f"{pair['id']} chosen", f"{pair['id']} rejected")
        for there, missing, row in (("chosen", "rejected", good), ("rejected", "chosen", bad)):
            assert list(row) == list(pair)
            assert row["margin"] is None
            for name in ("{}_log_prob", "reference_{}_log_prob", "{}_reward", "{}_tokens"):
                assert row[name.format(there)] == pytest.approx(pair[name.format(there)], abs=1e-4)
                assert not row[name.format(missing)]
                assert name == "{}_tokens" or row[name.format(missing)] is None


def test_scores_of_unpaired_answers_are_the_rewards_that_training_logs(config: RunConfig) -> None:
    config = changed(unpaired(config), loss=LossConfig("kto"), batch_size=16, steps=1)
    run.train(config, console=Console(io.StringIO()))
    found = scores(config)
    for side in ("chosen", "rejected"):
        rewards = [line[f"{side}_reward"] for line in found if line[f"{side}_tokens"]]
        assert sum(rewards) / 8 == pytest.approx(metrics(config)[0][f"rewards/{side}"], abs=1e-5)


@pytest.mark.parametrize("loss", ["ld_dpo", "sampo", "humanline"])
def test_unpaired_answers_are_refused_by_losses_that_change_tokens(
    config: RunConfig, loss: str
) -> None:
    config = replace(unpaired(config), loss=LossConfig(loss))
    with pytest.raises(InputError, match=r"row 'pair 0 chosen' has one answer alone, but rewards"):
        scores(config)


def test_pairs_of_one_prompt_have_one_hash(tmp_path: Path, config: RunConfig) -> None:
    """Answers play no part in it."""
    rows = [
        {"prompt": f"say {n % 2}", "chosen": f" yes {n % 3}", "rejected": " no"} for n in range(6)
    ]
    data = tmp_path / "shared.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    hashes = [line["prompt_hash"] for line in scores(replace(config, data=str(data)))]
    assert hashes == [hashes[0], hashes[1]] * 3
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig("sigmoid", {"beta": 0.3}),
        LossConfig("ipo"),
        LossConfig("simpo"),
        LossConfig("sft"),
    ],
    ids=lambda loss: loss.name,
)
def test_scores_are_the_rewards_that_training_logs_for_the_same_rows(
    config: RunConfig, loss: LossConfig
) -> None:
    """With one pair in a step and a rate too small to tell, each step logs the rewards of a row."""
    config = changed(config, loss=loss, batch_size=1, steps=8, learning_rate=1e-30)
    if loss.name in ("simpo", "sft"):
        config = replace(config, reference=None)
    run.train(config, console=Console(io.StringIO()))
    for scored, logged in (
        ("chosen_reward", "rewards/chosen"),
        ("rejected_reward", "rewards/rejected"),
        ("margin", "rewards/margin"),
        ("chosen_log_prob", "logps/chosen"),
    ):
        expected = sorted(line[logged] for line in metrics(config))
        assert sorted(line[scored] for line in scores(config)) == pytest.approx(expected, abs=1e-4)


def test_scores_of_the_trained_model_are_those_of_the_last_evaluation(config: RunConfig) -> None:
    config = replace(config, eval_data=str(config.data))
    result = run.train(config, console=Console(io.StringIO()))
    found = scores(replace(config, model=str(result.model), eval_data=None))
    assert result.last is not None
    margins = [line["margin"] for line in found]
    assert sum(margins) / 8 == pytest.approx(result.last["eval/rewards/margin"], abs=1e-5)


def test_every_row_is_scored_though_the_config_holds_some_out(config: RunConfig) -> None:
    assert [line["id"] for line in scores(replace(config, eval_split=0.5))] == [
        f"pair {n}" for n in range(8)
    ]


def test_loss_without_a_reference_leaves_its_columns_null(config: RunConfig) -> None:
    line = scores(replace(config, loss=LossConfig("simpo"), reference=None))[0]
    assert line["reference_chosen_log_prob"] is line["reference_rejected_log_prob"] is None
    assert line["margin"] != 0


def test_missing_reference_is_refused(config: RunConfig) -> None:
    with pytest.raises(InputError, match="dpo score needs --reference"):
        scores(replace(config, reference=None))


def test_folder_in_the_place_of_the_scores_is_refused_before_any_work(
    tmp_path: Path, config: RunConfig
) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} is a folder: --out of dpo score is the file"):
        score_file(replace(config, out=str(tmp_path)), console=Console(quiet=True))
    assert not (tmp_path / "cache").exists()


# --- as a library -------------------------------------------------------------------------------


@pytest.fixture
def reference(make_model: MakeModel, make_pairs: MakePairs) -> ReferenceLogProbs:
    own = Trainer(make_model(seed=1), make_pairs(9)).batches.reference
    assert own is not None
    return own


def test_scores_keep_the_order_of_the_pairs_and_do_not_depend_on_batches(
    make_model: MakeModel, make_pairs: MakePairs, reference: ReferenceLogProbs
) -> None:
    model, pairs = make_model(), make_pairs(9)
    whole = score_pairs(model, pairs, reference)
    single = score_pairs(model, pairs, reference, tokens_per_micro_batch=1)
    assert [score.id for score in whole] == list(pairs.ids)
    for one, other in zip(whole, single, strict=True):
        for field in fields(PairScore)[1:]:
            found = getattr(one, field.name)
            assert found == pytest.approx(getattr(other, field.name), abs=1e-4), field.name


def test_policy_is_scored_without_dropout_and_left_as_it_was(
    make_model: MakeModel, make_pairs: MakePairs, reference: ReferenceLogProbs
) -> None:
    class Dropping(Decoder):
        def forward(self, stream: Any) -> torch.Tensor:
            return nn.functional.dropout(super().forward(stream), 0.9, self.training)

    model = make_model()
    expected = score_pairs(model, make_pairs(9), reference)
    model.__class__ = Dropping
    assert score_pairs(model, make_pairs(9), reference) == expected
    assert model.training


def test_loss_that_lacks_its_reference_is_refused(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    with pytest.raises(InputError, match=r"Sigmoid.* needs the reference log-probs"):
        score_pairs(make_model(), make_pairs())


def test_module_without_the_protocol_is_refused(make_pairs: MakePairs) -> None:
    with pytest.raises(InputError, match=r"Linear is no policy: it has no output_head\(\)"):
        score_pairs(nn.Linear(2, 2), make_pairs())


def test_scores_that_are_not_finite_are_refused_by_pair(
    make_model: MakeModel, make_pairs: MakePairs, reference: ReferenceLogProbs
) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(RunError, match=r"pair 'row-\d': its log-probs .* are not finite"):
        score_pairs(model, make_pairs(9), reference)
