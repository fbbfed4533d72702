"""The README's examples run as they stand, in a folder that has what they name."""

import json
import re
from pathlib import Path

import pytest

from dpo.models import init_model, parse_config, save_model
from dpo.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"```sh\n(.*?)\n```", README, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a tiny model and pairs.jsonl, made the current one."""
    tokenizer = byte_tokenizer()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    (tmp_path / "model").mkdir()
    save_model(init_model(parse_config(config)), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " no"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs_as_it_stands(example: str) -> None:
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def test_the_first_two_commands_are_one_line_each_and_need_only_python_and_git() -> None:
    make = "python3 -m venv .venv && .venv/bin/pip install "
    assert COMMANDS[0] == f"{make}. && .venv/bin/dpo demo"
    assert COMMANDS[1] == f"{make}-e '.[test]' && .venv/bin/python -m pytest -n auto"


def test_check_runs_the_second_command_as_it_stands() -> None:
    """The pattern by which ``.ci/run`` finds the line in the README finds just that line."""
    check = (ROOT / ".ci/run").read_text(encoding="utf-8")
    found = re.search(r"test_command=\$\(grep -m 1 '(.*)' README\.md\)", check)
    assert found is not None
    assert re.findall(found[1], README, flags=re.MULTILINE) == [COMMANDS[1]]
    assert 'bash -c "$test_command"' in check


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
