from dataclasses import replace
from pathlib import Path

import pytest

from dpo.config import LossConfig, RunConfig
from dpo.model_card import write_model_card


def card(tmp_path: Path, config: RunConfig, *losses: float) -> str:
    names = ("eval/loss", "eval/rewards/accuracy", "eval/rewards/margin")
    write_model_card(tmp_path, config, [dict.fromkeys(names, loss) for loss in losses])
    return (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def config() -> RunConfig:
    loss = LossConfig("ipo", {"beta": 0.3})
    return RunConfig(model="owner/name", data="owner/pairs", out="RUN", loss=loss, revision="abc")


def test_card_names_base_data_method_and_revision(tmp_path: Path, config: RunConfig) -> None:
    text = card(tmp_path, config)
    assert text.startswith("---\nlibrary_name: transformers\nbase_model: owner/name\ntags: [dpo")
    assert "- base model: `owner/name`, revision `abc`\n" in text
    assert "- preference pairs: `owner/pairs`\n" in text
    assert "- loss: `ipo`, beta = 0.3\n" in text


def test_card_names_every_data_set(tmp_path: Path, config: RunConfig) -> None:
    text = card(tmp_path, replace(config, data=("owner/pairs", "more.jsonl")))
    assert "- preference pairs: `owner/pairs`, `more.jsonl`\n" in text


def test_card_shows_the_evaluations_before_and_after(tmp_path: Path, config: RunConfig) -> None:
    text = card(tmp_path, config, 0.5, 0.7, float("nan"))
    assert "| loss | 0.5000 | nan |\n" in text
    assert "| held-out pairs |" not in card(tmp_path, config)


def test_card_tells_nothing_of_the_folders_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "private" / "model"
    model.mkdir(parents=True)
    monkeypatch.chdir(model)
    for name in (str(model), "."):
        text = card(tmp_path, RunConfig(model=name, data=str(model.parent), out="RUN"))
        assert "# model, trained on preferences\n" in text
        assert "base_model" not in text
        assert str(tmp_path) not in text
