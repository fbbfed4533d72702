from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dpo.adapter_files import save_adapter
from dpo.adapters import Adapter, add_adapter
from dpo.config import LossConfig, RunConfig
from dpo.model_card import licence_of, write_model_card
from dpo.models import load_model
from dpo.train_config import TrainConfig


def card(tmp_path: Path, config: RunConfig, *losses: float) -> str:
    names = ("eval/loss", "eval/rewards/accuracy", "eval/rewards/margin")
    write_model_card(tmp_path, config, [dict.fromkeys(names, loss) for loss in losses])
    return (tmp_path / "README.md").read_text(encoding="utf-8")


def metadata(folder: Path) -> object:
    """What the Hub reads of a card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def config() -> RunConfig:
    loss = LossConfig("ipo", {"beta": 0.3})
    return RunConfig(model="owner/name", data="owner/pairs", out="RUN", loss=loss, revision="abc")


def test_card_names_base_data_method_and_revision(tmp_path: Path, config: RunConfig) -> None:
    text = card(tmp_path, config)
    assert metadata(tmp_path) == {
        "library_name": "transformers",
        "base_model": "owner/name",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "datasets": ["owner/pairs"],
        "tags": ["dpo", "preference-optimization"],
    }
    assert "- base model: `owner/name`, revision `abc`\n" in text
    assert "- preference pairs: `owner/pairs`\n" in text
    assert "- loss: `ipo`, beta = 0.3, [arXiv:2310.12036](https://arxiv.org/abs/2310.12036)" in text
    assert "https://arxiv.org/abs/2305.18290" in text


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


def test_card_tells_options_and_hardware_but_nothing_of_the_machine(
    tmp_path: Path, config: RunConfig
) -> None:
    train = TrainConfig(warmup_steps=7, threads=3, rates={"embed": 0.1})
    write_model_card(tmp_path, replace(config, train=train), [], hardware="a CPU (x86_64)")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for line in (
        "| `train.warmup_steps` | `7` |", "| `train.learning_rate` | `1e-06` |",
        "| `train.rates` | `{'embed': 0.1}` |", "| `train.seed` | `0` |",
        "| `tokenize.truncation` | `error` |", "- trained on a CPU (x86_64)",
    ):  # fmt: skip
        assert f"{line}\n" in text
    assert text.count("`train.seed`") == 1
    assert "threads" not in text


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# M", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        (
            '---\r\ntags:\r\n- license\r\nlicense: "apache-2.0"\r\n---\r\n',
            {"license": "apache-2.0"},
        ),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense: 3\n---\n", {"license": "3"}),
        ("---\nlicense: !!python/object/apply:os.system [false]\n---\n", {}),
        ("---\n" + "[" * 50000 + "\n---\n", {}),
        ("# only text", {}),
    ],
)
def test_licence_of_the_base_is_carried_over(
    tmp_path: Path, config: RunConfig, card: str, licence: dict[str, object]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(card, encoding="utf-8", newline="")
    assert licence_of(base) == licence
    write_model_card(tmp_path, config, [], base_folder=base)
    told = metadata(tmp_path)
    assert isinstance(told, dict)
    assert {key: told[key] for key in told if key.startswith("license")} == licence


def test_base_without_a_card_has_no_licence(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == {}


def test_card_of_an_adapter_names_base_and_library(
    tmp_path: Path, config: RunConfig, make_model_folder: Callable[..., Path]
) -> None:
    policy = load_model(make_model_folder(tmp_path / "model"))
    add_adapter(policy, Adapter())
    (tmp_path / "adapter").mkdir()
    save_adapter(policy, tmp_path / "adapter", base="owner/base", base_revision="abc")
    write_model_card(tmp_path / "adapter", config, [])
    told = metadata(tmp_path / "adapter")
    assert isinstance(told, dict)
    assert (told["library_name"], told["base_model"]) == ("peft", "owner/base")
    assert told["base_model_relation"] == "adapter"
    text = (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    assert "from peft import AutoPeftModelForCausalLM" in text


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_use_in_the_card_runs_as_it_stands(
    model_folder: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model_card(tmp_path, config, [])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    exec(code.replace('"OWNER/NAME"', repr(str(model_folder))), {})
    assert capsys.readouterr().out.startswith("Hello")


def test_card_shows_intervals_where_standard_errors_are_known(
    tmp_path: Path, config: RunConfig
) -> None:
    end = {"eval/loss": 0.5, "eval/loss_se": 0.1}
    write_model_card(tmp_path, config, [{"eval/loss": 0.7}, end])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| loss | 0.7000 | 0.5000 [0.304, 0.696] |\n" in text
