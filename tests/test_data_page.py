"""Every example of ``dpo/DATA.md`` is read or runs as it stands, in the words of the page."""

import re
from pathlib import Path

import pytest

from dpo.pair_rows import FIELDS
from dpo.preferences import LoadedPairs, load_pairs
from dpo.settings import read_settings, resolve
from dpo.tokenizer import byte_tokenizer

PAGE = (Path(__file__).parents[1] / "dpo/DATA.md").read_text(encoding="utf-8")
ROWS = re.findall(r"(?:`--columns ([^`]*)`\.\n\n)?```json\n(.*?)```", PAGE, flags=re.DOTALL)
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
CONFIGS = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)


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


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_runs_as_it_stands(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer().save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "DATA.md", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("text", CONFIGS)
def test_config_is_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    config = resolve(read_settings(tmp_path / "run.toml")).config
    assert config.sources == ("chats.jsonl", "maths.jsonl")


def test_there_are_examples_of_each_kind() -> None:
    assert len(ROWS) > 12
    assert len([columns for columns, _ in ROWS if columns]) == 2
    assert PROGRAMS
    assert CONFIGS
