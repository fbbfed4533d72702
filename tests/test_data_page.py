"""Every row of ``dpo/DATA.md`` is read, in the words of the page."""

import re
from pathlib import Path

import pytest

from dpo.pair_rows import FIELDS
from dpo.preferences import LoadedPairs, load_pairs
from tests.pages import ROOT, Block, blocks

PAGE = (ROOT / "dpo/DATA.md").read_text(encoding="utf-8")
LINES = PAGE.splitlines()


def columns_before(block: Block) -> str:
    """What the sentence that ends two lines above a block says of ``--columns``."""
    found = re.search(r"`--columns ([^`]*)`\.$", LINES[block.line - 3])
    return found[1] if found else ""


ROWS = [(columns_before(block), block.text) for block in blocks("json", "dpo/DATA.md")]


def read(folder: Path, columns: str, rows: str) -> LoadedPairs:
    path = folder / "rows.jsonl"
    path.write_text(rows, encoding="utf-8")
    return load_pairs(path, columns=dict(part.split("=") for part in columns.split(",") if part))


@pytest.mark.parametrize(("columns", "rows"), ROWS, ids=range(len(ROWS)))
def test_row_is_read_whole_and_its_layout_is_named_as_on_the_page(
    tmp_path: Path, columns: str, rows: str
) -> None:
    loaded = read(tmp_path, columns, rows)
    assert loaded.ignored_columns == ()
    assert f"*{loaded.format}*" in " ".join(PAGE.split())


def test_page_shows_every_field_and_layout(tmp_path: Path) -> None:
    assert [name for name in FIELDS if name not in PAGE] == []
    assert len({read(tmp_path, *found).format for found in ROWS}) == 11


def test_there_are_examples_of_each_kind() -> None:
    assert len(ROWS) > 12
    assert len([columns for columns, _ in ROWS if columns]) == 2
