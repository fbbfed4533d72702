"""The examples of ADAPTERS.md run as they stand, and its table of options is complete."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.adapter_files import save_adapter
from dpo.adapters import Adapter, add_adapter
from dpo.cli.options import ConfigFlag
from dpo.cli.train import train
from dpo.models import load_model

PAGE = (Path(__file__).parents[1] / "dpo/ADAPTERS.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs_as_it_stands(
    example: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_model_folder: Callable[..., Path],
) -> None:
    base = load_model(make_model_folder(tmp_path / "model"))
    add_adapter(base, Adapter())
    (tmp_path / "adapter").mkdir()
    save_adapter(base, tmp_path / "adapter", base="model")
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " no"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "ADAPTERS.md", "exec"), {"__name__": "page"})


def test_table_of_options_is_complete() -> None:
    flags = {flag.key: flag.opts[0] for flag in train.params if isinstance(flag, ConfigFlag)}
    expected = {
        key.removeprefix("adapter."): flag for key, flag in flags.items() if "adapter." in key
    }
    assert dict(re.findall(r"^\| `(\w+)` \| `(--[\w-]+)` \|", PAGE, re.MULTILINE)) == expected
