"""The table of options of ADAPTERS.md is complete."""

import re
from pathlib import Path

from dpo.cli.options import ConfigFlag
from dpo.cli.train import train

PAGE = (Path(__file__).parents[1] / "dpo/ADAPTERS.md").read_text(encoding="utf-8")


def test_table_of_options_is_complete() -> None:
    flags = {flag.key: flag.opts[0] for flag in train.params if isinstance(flag, ConfigFlag)}
    expected = {
        key.removeprefix("adapter."): flag for key, flag in flags.items() if "adapter." in key
    }
    assert dict(re.findall(r"^\| `(\w+)` \| `(--[\w-]+)` \|", PAGE, re.MULTILINE)) == expected
