"""Whole runs with an adapter: what they write, their reference, and how they go on."""

import io
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dpo import run
from dpo.adapter_config import AdapterConfig
from dpo.adapter_files import CONFIG, WEIGHTS, read_adapter
from dpo.adapters import Adapter
from dpo.config import RunConfig
from dpo.files import read_json
from dpo.progress import Console
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
    sections = {}
    for name, section in (("train", config.train), ("adapter", config.adapter)):
        names = options.keys() & {field.name for field in fields(section)}
        sections[name] = replace(section, **{name: options.pop(name) for name in names})
    return replace(config, **sections, **options)


def started(config: RunConfig) -> run.RunResult:
    return run.train(config, console=Console(io.StringIO()))


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
