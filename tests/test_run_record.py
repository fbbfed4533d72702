"""What a run leaves in its folder for its page, and that it changes nothing else."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo import run, run_record
from dpo.config import RunConfig
from dpo.errors import InputError
from dpo.progress import Console
from dpo.run_record import EvalPairsLog
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(run_record, "NEW_TOKENS", 16)


@pytest.fixture
def config(tmp_path: Path, make_model_folder: Callable[..., Path]) -> RunConfig:
    model = make_model_folder(tmp_path / "model", max_position_embeddings=160)
    rows = [
        {"prompt": f"say {n % 12}", "chosen": f" yes {n}", "rejected": " no" * (1 + n % 3)}
        for n in range(24)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = TrainConfig(
        batch_size=4, steps=4, eval_every=2, save_every=2, learning_rate=1e-2,
        schedule="constant", threads=1, device="cpu",
    )  # fmt: skip
    return RunConfig(
        model=str(model), data=str(data), out=str(tmp_path / "RUN"), eval_split=0.3, train=train
    )


def changed(config: RunConfig, **options: Any) -> RunConfig:
    out = options.pop("out", config.out)
    return replace(config, out=str(out), train=replace(config.train, **options))


def trained(config: RunConfig) -> Path:
    run.train(config, console=Console(io.StringIO()))
    return Path(config.out)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def metrics(folder: Path, name: str) -> list[float]:
    return [line[name] for line in rows_of(folder / "metrics.jsonl") if name in line]


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


# --- held-out pairs -----------------------------------------------------------------------------


def test_margins_of_the_pairs_are_those_that_the_metrics_are_means_of(config: RunConfig) -> None:
    folder = trained(config)
    pairs = rows_of(folder / "eval_pairs.jsonl")
    before, *_, after = metrics(folder, "eval/rewards/margin")
    assert {pair["step"] for pair in pairs} == {4}
    assert sum(pair["margin"] for pair in pairs) / len(pairs) == pytest.approx(after, abs=1e-6)
    assert {pair["margin_before"] for pair in pairs} == {before} == {0.0}
    assert len({pair["margin"] for pair in pairs}) > 1


def test_standard_error_is_that_of_the_mean_of_the_margins(config: RunConfig) -> None:
    folder = trained(config)
    margins = [pair["margin"] for pair in rows_of(folder / "eval_pairs.jsonl")]
    mean = sum(margins) / len(margins)
    variance = sum((margin - mean) ** 2 for margin in margins) / len(margins)
    error = metrics(folder, "eval/rewards/margin_se")[-1]
    assert error == pytest.approx(math.sqrt(variance / len(margins)), rel=1e-4)


def test_margins_of_the_best_model_are_kept_with_it(config: RunConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "chosen": " no no", "rejected": f" yes {n}"} for n in range(8)]
    reversed_data = tmp_path / "reversed.jsonl"  # the more is learned, the worse it is on these
    reversed_data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, eval_data=str(reversed_data), eval_split=None)
    folder = trained(changed(config, keep_best=True))
    before, first, last = metrics(folder, "eval/loss")
    assert before < first < last
    assert {pair["step"] for pair in rows_of(folder / "eval_pairs.jsonl")} == {2}


def test_pairs_are_bounded_and_spread_over_the_data(
    tmp_path: Path,
    make_model: Callable[..., Any],
    make_pairs: Callable[..., TokenizedPairs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_record, "MOST_PAIRS", 5)
    train = TrainConfig(batch_size=4, steps=1)
    trainer = Trainer(make_model(), make_pairs(4), train, eval_pairs=make_pairs(12))
    EvalPairsLog(tmp_path)(trainer, trainer.evaluate())
    kept = [pair["id"] for pair in rows_of(tmp_path / "eval_pairs.jsonl")]
    assert kept == ["row-1", "row-3", "row-5", "row-8", "row-10"]


# --- the data -----------------------------------------------------------------------------------


def test_lengths_are_counted_and_dropped_rows_told(config: RunConfig) -> None:
    tokenize = replace(config.tokenize, max_length=14, truncation="drop")
    folder = trained(replace(config, tokenize=tokenize))
    data = json.loads((folder / "data.json").read_text())
    for side in (data["train"], data["held out"]):
        for part in ("prompt", "chosen", "rejected"):
            assert sum(side["counts"][part]) == side["pairs"]
            least, median, _, greatest = side["lengths"][part]
            assert side["edges"][0] <= least <= median <= greatest < side["edges"][-1]
    assert any("rows dropped" in line for line in data["told"])
    assert not any("cache" in line for line in data["told"])  # a second run has the same file


# --- samples ------------------------------------------------------------------------------------


def test_samples_are_what_generate_writes_before_and_after(config: RunConfig) -> None:
    from dpo import load_model, load_tokenizer
    from dpo.generate import GenerateOptions, generate

    folder = trained(changed(config, samples=2))
    samples = rows_of(folder / "samples.jsonl")
    assert len({sample["prompt"] for sample in samples}) == 2
    for moment, path in (("before", Path(config.model)), ("after", folder / "model")):
        prompts = [sample["prompt"] for sample in samples]
        options = GenerateOptions(max_new_tokens=16)
        texts = generate(load_model(path), load_tokenizer(path), prompts, options)
        assert [sample[moment] for sample in samples] == [text.text for text in texts]
    assert samples[0]["before"] != samples[0]["after"]


def test_samples_change_neither_weights_nor_metrics(config: RunConfig, tmp_path: Path) -> None:
    without = trained(config)
    options = {"samples": 3, "recompute": "layer"}
    with_samples = trained(changed(config, out=tmp_path / "other", **options))
    assert not (without / "samples.jsonl").exists()
    assert weights(with_samples) == weights(without)
    for name in ("loss", "eval/loss"):
        assert metrics(with_samples, name) == metrics(without, name)


def test_resumed_run_leaves_the_files_of_an_unbroken_one(config: RunConfig, tmp_path: Path) -> None:
    names = ("eval_pairs.jsonl", "samples.jsonl", "data.json", "model/model.safetensors")
    config = changed(config, samples=2)
    folder = trained(config)
    unbroken = [(folder / name).read_bytes() for name in names]
    again = trained(
        changed(config, resume=str(folder / "checkpoints/step-000002"), out=tmp_path / "B")
    )
    assert [(again / name).read_bytes() for name in names] == unbroken


def test_prompts_without_room_for_an_answer_are_refused(config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"no held-out prompt leaves room for 16 tokens among"):
        trained(replace(changed(config, samples=2), model=str(_short(Path(config.model)))))


def _short(model: Path) -> Path:
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 16}))
    return model


def test_samples_need_held_out_pairs_and_whole_models(config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"train\.samples needs held-out pairs"):
        replace(changed(config, samples=2, eval_every=None), eval_split=None)
    with pytest.raises(InputError, match=r"train\.samples needs train\.parallel = data, which is"):
        changed(config, samples=2, parallel="shard")
    with pytest.raises(InputError, match=r"train\.samples needs train\.tensor_ranks = 1, which is"):
        changed(config, samples=2, tensor_ranks=2)
