"""Whole runs with an adapter: what they write, their reference, and how they go on."""

import io
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from dpo import run
from dpo.adapter_config import AdapterConfig
from dpo.adapter_files import CONFIG, WEIGHTS, read_adapter
from dpo.adapters import Adapter
from dpo.cli import main
from dpo.config import LossConfig, RunConfig
from dpo.errors import InputError
from dpo.files import read_json
from dpo.progress import Console
from dpo.run_loop import RunResult
from dpo.train_config import TrainConfig

LORA = AdapterConfig(kind="lora", rank=4, alpha=8.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> RunConfig:
    rows = [
        {"prompt": f"say {n}", "chosen": f" yes {n % 5}", "rejected": f" no {n % 3}"}
        for n in range(16)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = TrainConfig(
        batch_size=4, steps=4, learning_rate=1e-2, schedule="constant", threads=1, device="cpu"
    )
    return RunConfig(
        model=str(model_folder),
        data=str(data),
        out=str(tmp_path / "RUN"),
        train=train,
        adapter=LORA,
    )


def changed(config: RunConfig, **options: Any) -> RunConfig:
    """Replace options, those of the training and of the adapter under their own names."""
    sections: dict[str, Any] = {}
    for name, section in (("train", config.train), ("adapter", config.adapter)):
        names = options.keys() & {field.name for field in fields(section)}
        sections[name] = replace(section, **{name: options.pop(name) for name in names})
    return replace(config, **sections, **options)


def started(config: RunConfig) -> RunResult:
    return run.train(config, console=silent())


def silent() -> Console:
    return Console(io.StringIO())


def said_by(config: RunConfig) -> str:
    said = io.StringIO()
    run.train(config, console=Console(said))
    return said.getvalue()


def called(*arguments: str) -> str:
    """What a command says when all is well."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    """What a command says when it refuses its input."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


def metrics(folder: str | Path) -> list[dict[str, float]]:
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model" / WEIGHTS).read_bytes()


def test_run_learns_and_writes_an_adapter_and_no_model(config: RunConfig) -> None:
    result = started(config)
    assert sorted(path.name for path in result.model.iterdir()) == [
        *("README.md", CONFIG, WEIGHTS, "chat_template.jinja", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert read_adapter(result.model).adapter == Adapter(4, 8.0)
    assert read_json(result.model / CONFIG)["base_model_name_or_path"] == config.model
    losses = [line["loss"] for line in metrics(config.out)]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[-1] < 0.6


# --- the reference ------------------------------------------------------------------------------


def test_new_adapter_takes_the_reference_of_its_base_from_the_cache(config: RunConfig) -> None:
    run.compute_reference_only(replace(config, adapter=AdapterConfig()), console=silent())
    assert "all 16 pairs are in the cache" in said_by(config)


def test_quantized_bases_have_references_of_their_own(config: RunConfig) -> None:
    started(config)
    for scheme in ("nf4", "nf4-double"):
        quantized = changed(config, quantize=scheme, out=f"{config.out}-{scheme}")
        assert "all 16 pairs are in the cache" not in said_by(quantized)
        again = replace(quantized, adapter=AdapterConfig(quantize=scheme))
        run.compute_reference_only(again, console=silent())
    assert len(list(Path(config.out).parent.glob("cache/dpo-engine/reference/*/info.json"))) == 3
    assert metrics(quantized.out)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_adapter_that_is_trained_on_is_its_own_reference(config: RunConfig) -> None:
    first = started(config).model
    on = replace(config, model=str(first), out=f"{config.out}-2", adapter=AdapterConfig())
    second = started(on).model
    assert metrics(on.out)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert metrics(on.out)[0]["rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert read_json(second / CONFIG) == read_json(first / CONFIG)
    assert weights(on.out) != weights(config.out)


def test_base_can_be_the_reference_of_an_adapter_that_is_trained_on(config: RunConfig) -> None:
    first = started(config).model
    on = replace(config, model=str(first), reference=config.model, out=f"{config.out}-2")
    on = changed(replace(on, adapter=AdapterConfig()), steps=1)
    started(on)
    assert metrics(on.out)[0]["rewards/margin"] > 0.05


# --- how a run goes on --------------------------------------------------------------------------

FORMS = {
    "lora": LORA,
    "dora on 4 bits, output too": replace(
        LORA, kind="dora", quantize="nf4", targets=r".*proj|lm_head", b_rate_ratio=4.0
    ),
}


@pytest.mark.parametrize("adapter", FORMS.values(), ids=FORMS)
def test_resumed_run_equals_unbroken_run(config: RunConfig, adapter: AdapterConfig) -> None:
    config = changed(config, save_every=2, keep=5)
    config = replace(config, adapter=adapter)
    started(config)
    resumed = f"{config.out}/checkpoints/step-000002"
    other = changed(config, out=f"{config.out}-2", resume=resumed)
    started(other)
    assert weights(other.out) == weights(config.out)
    last = [load_file(f"{out}/checkpoints/step-000004/optimizer.safetensors") for out in (
        config.out, other.out,
    )]  # fmt: skip
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_checkpoint_holds_what_is_trained(config: RunConfig) -> None:
    started(config)
    saved = load_file(f"{config.out}/checkpoints/step-000004/model.safetensors")
    assert len(saved) == 2 * 2 * 7
    assert {name.rpartition(".")[2] for name in saved} == {"down", "up"}


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"kind": "dora"}, {"quantize": "int8"}, {"b_rate_ratio": 2.0}]
)
def test_resuming_with_another_adapter_is_refused(
    config: RunConfig, options: dict[str, Any]
) -> None:
    started(config)
    with pytest.raises(InputError, match=r"the run has changed: adapter was .*rank=4"):
        started(changed(config, steps=6, resume="auto", **options))


def test_best_adapter_is_saved(config: RunConfig) -> None:
    best = changed(config, eval_split=0.5, eval_every=1, keep_best=True, learning_rate=1.0)
    result = started(best)
    assert result.last is not None
    step = int(result.last["step"])
    saved = load_file(f"{config.out}/checkpoints/step-{step:06d}/model.safetensors")
    written = load_file(result.model / WEIGHTS)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(written[f"base_model.model.{name}.lora_B.weight"], saved[f"{name}.up"])


def test_ratio_of_rates_changes_the_result(config: RunConfig) -> None:
    started(config)
    started(changed(config, b_rate_ratio=8.0, out=f"{config.out}-2"))
    assert weights(config.out) != weights(f"{config.out}-2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "q_projection"}, r"adapter\.targets: no linear layer matches 'q_projection'"),
        ({"rates": {"embed": 0.5}}, r"train\.rates: 'embed' finds no trained parameter"),
    ],
    ids=["targets", "rates"],
)
def test_names_that_find_nothing_are_refused_before_the_reference_is_computed(
    config: RunConfig, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        started(changed(config, **options))
    assert not (tmp_path / "cache" / "dpo-engine" / "reference").exists()


def test_rates_of_an_adapter_that_is_trained_on_are_known_before_it_is_loaded(
    config: RunConfig,
) -> None:
    first = started(config).model
    on = replace(config, model=str(first), out=f"{config.out}-2", adapter=AdapterConfig())
    with pytest.raises(InputError, match=r"train\.rates: 'embed' finds no .*down_proj\.up"):
        started(changed(on, rates={"embed": 0.5}))
    started(changed(on, rates={r"q_proj\.up$": 0.5}))


# --- what else reads an adapter -----------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_scores_are_the_rewards_that_training_logged(
    config: RunConfig, tmp_path: Path, quantize: Any
) -> None:
    result = started(changed(config, quantize=quantize, eval_data=config.data))
    assert result.last is not None
    out = tmp_path / "scores.jsonl"
    arguments = ["--model", str(result.model), "--reference", config.model, "--out", str(out)]
    held = ["--quantize", quantize] if quantize else []
    called("score", *arguments, *held, "--data", str(config.data), "--device", "cpu")
    margins = [json.loads(line)["margin"] for line in out.read_text().splitlines()]
    assert sum(margins) / len(margins) == pytest.approx(
        result.last["eval/rewards/margin"], abs=1e-6
    )
    assert min(map(abs, margins)) > 0


def test_generate_continues_with_an_adapter_as_with_the_merged_model(
    config: RunConfig, tmp_path: Path
) -> None:
    result = started(changed(config, targets=r".*proj|lm_head", learning_rate=0.1))
    merged = str(tmp_path / "merged")
    assert called("merge", "--adapter", str(result.model), "--out", merged) == f"{merged}\n"
    texts = {
        called("generate", model, "--prompt", "say 3", "--raw", "--max-new-tokens", "8", "--quiet")
        for model in (config.model, merged, str(result.model))
    }
    assert len(texts) == 2


def test_base_that_moved_is_named_anew(config: RunConfig, tmp_path: Path) -> None:
    result = started(config)
    text = (result.model / CONFIG).read_text()
    (result.model / CONFIG).write_text(text.replace(config.model, str(tmp_path / "gone")))
    plain = replace(config, adapter=AdapterConfig(), out=f"{config.out}-2", model=str(result.model))
    with pytest.raises(
        InputError, match=r"base of the adapter .*gone: no such .*; name it by adapter\.b"
    ):
        started(plain)
    started(changed(plain, base=config.model))
    assert read_json(Path(plain.out) / "model" / CONFIG)["base_model_name_or_path"] == config.model


def test_card_names_base_and_adapter(config: RunConfig) -> None:
    result = started(changed(config, quantize="int8", kind="dora", rslora=True))
    card = (result.model / "README.md").read_text()
    assert "library_name: peft\n" in card
    assert (
        "- DoRA adapter: rank 4, alpha 8, rank-stabilized, trained on the base in int8; "
        "`dpo merge` makes a plain model\n"
    ) in card


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double"])
def test_merging_what_was_trained_on_a_quantized_base(
    config: RunConfig, tmp_path: Path, scheme: Any
) -> None:
    result = started(changed(config, quantize=scheme))
    merged: dict[str, dict[str, torch.Tensor]] = {}
    for name, options in (("exact", ["--quantize", scheme]), ("plain", ["--dtype", "bfloat16"])):
        out = str(tmp_path / name)
        arguments = ["--adapter", str(result.model), "--model", config.model, "--out", out]
        called("merge", *arguments, *options)
        merged[name] = load_file(f"{out}/model.safetensors")
    weight = "model.layers.0.mlp.up_proj.weight"
    assert merged["exact"][weight].dtype == torch.float32
    assert merged["plain"][weight].dtype == torch.bfloat16
    error = (merged["exact"][weight] - merged["plain"][weight].float()).norm()
    assert 0.03 < float(error / merged["exact"][weight].norm()) < 0.2  # that of nf4


def test_merge_refuses_a_model_another_base_and_a_folder_that_exists(
    config: RunConfig, tmp_path: Path, make_model_folder: Callable[..., Path]
) -> None:
    adapter = str(started(config).model)
    other = str(make_model_folder(tmp_path / "other", hidden_size=8))
    out = str(tmp_path / "merged")
    assert "is a model and not an adapter" in refused(
        "merge", "--adapter", config.model, "--out", out
    )
    message = refused("merge", "--adapter", adapter, "--model", other, "--out", out)
    assert "lora_A.weight has shape (4, 16), expected (4, 8)" in message
    assert "already exists" in refused("merge", "--adapter", adapter, "--out", config.model)
    assert not Path(out).exists()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"b_rate_ratio": 2.0}])
def test_option_without_an_adapter_is_refused(config: RunConfig, options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(InputError, match=rf"adapter\.{name} needs an adapter to train"):
        started(replace(config, adapter=AdapterConfig(**options)))


def test_new_adapter_upon_an_adapter_is_refused(config: RunConfig) -> None:
    model = str(started(config).model)
    with pytest.raises(InputError, match=r"adapter\.kind is lora, but .* is an adapter already"):
        started(replace(config, model=model, out=f"{config.out}-2"))


def test_base_of_a_model_is_refused(config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"adapter\.base is B, but .* is no adapter"):
        started(replace(config, adapter=AdapterConfig(base="B")))


def test_adapter_without_a_base_is_refused(config: RunConfig) -> None:
    folder = started(config).model
    entries = {**read_json(folder / CONFIG), "base_model_name_or_path": None}
    (folder / CONFIG).write_text(json.dumps(entries))
    with pytest.raises(
        InputError, match=r"is an adapter and names no base: name it by adapter\.base"
    ):
        started(replace(config, model=str(folder), adapter=AdapterConfig(), out=f"{config.out}-2"))


def test_dropout_of_an_adapter_that_is_trained_on_is_told(config: RunConfig) -> None:
    folder = started(config).model
    entries = {**read_json(folder / CONFIG), "lora_dropout": 0.05}
    (folder / CONFIG).write_text(json.dumps(entries))
    on = replace(config, model=str(folder), adapter=AdapterConfig(), out=f"{config.out}-2")
    assert "was trained with a dropout of 0.05; here is none" in said_by(on)


def test_pure_bfloat16_is_no_danger_to_an_adapter(config: RunConfig) -> None:
    assert "bfloat16 weights do not move" not in said_by(changed(config, dtype="bfloat16"))
    saved = load_file(Path(config.out) / "model" / WEIGHTS)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# --- methods whose reference is in memory ---------------------------------------------------------


@pytest.mark.parametrize("adapter", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("loss", "options"),
    [("sigmoid", {"reference_sync_every": 2}), ("tdpo2", {})],
    ids=["a reference that moves", "tdpo"],
)
def test_live_reference_is_other_adapters_for_the_same_base(
    config: RunConfig,
    tmp_path: Path,
    make_model_folder: Callable[..., Path],
    adapter: AdapterConfig,
    loss: str,
    options: dict[str, Any],
) -> None:
    untied = make_model_folder(tmp_path / "untied", tie_word_embeddings=False)
    config = replace(config, model=str(untied), adapter=adapter, loss=LossConfig(loss))
    config = changed(config, steps=6, save_every=2, keep=3, **options)
    started(config)
    losses = [line["loss"] for line in metrics(config.out) if "loss" in line]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-5)
    reference = load_file(Path(config.out) / "checkpoints/step-000002/reference.safetensors")
    assert {name.rpartition(".")[2] for name in reference} <= {"down", "up", "magnitude"}
    resumed = replace(config, out=str(tmp_path / "RESUMED"))
    checkpoint = str(Path(config.out) / "checkpoints/step-000002")
    started(changed(resumed, resume=checkpoint))
    assert weights(resumed.out) == weights(config.out)
