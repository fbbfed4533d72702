"""The page of losses says what the code does."""

from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from dpo.losses import LOSSES

PAGE = (Path(__file__).parents[1] / "dpo/losses/README.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| ") and (cells := [cell.strip() for cell in line.strip("|").split(" | ")])
}


def test_table_has_every_loss_once_in_order() -> None:
    assert [name for name in ROWS if name not in ("name", "---")] == list(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_table_says_the_options_with_their_defaults_and_ranges(name: str) -> None:
    expected = []
    for field in fields(LOSSES[name]):
        default = field.default
        shown = (
            "none" if default is None else default if isinstance(default, str) else f"{default:g}"
        )
        limits = getattr(field.type, "__metadata__", None)
        said = f"in {limits[0]}" if limits else f"of {', '.join(get_args(field.type))}"
        assert limits or get_origin(field.type) is Literal
        expected.append(f"`{field.name}` {shown} {said}")
    assert ROWS[name][1] == ("; ".join(expected) or "none")


@pytest.mark.parametrize("name", LOSSES)
def test_table_says_what_is_read_and_the_paper(name: str) -> None:
    loss = LOSSES[name]
    reads = [*(["reference"] if loss.needs_reference else []), *sorted(loss.reads)]
    assert ROWS[name][2] == (", ".join(reads) or "-")
    paper = ROWS[name][4].strip(" |")
    assert paper == "-" or f"arXiv:{paper}" in (loss.__doc__ or "")
