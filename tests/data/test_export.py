"""Exports: every format keeps every pair, and other tools read it."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.builder import build_extraction_dataset
from dpo.data.dataset_files import load_dataset, write_dataset
from dpo.data.export import EXPORTERS, export_pairs
from dpo.data.kinds.extraction import EXTRACTION
from dpo.data.simulate import simulate
from dpo.data.stores import open_store
from dpo.errors import InputError
from dpo.files import verify_manifest
from dpo.pair import PreferencePair, Tokens
from dpo.preferences import read_pairs, write_pairs
from dpo.progress import Console

TRICKY = [
    "plain",
    "=1+1",
    " \t@SUM(A1)",
    "-2",
    "'quoted",
    'a "quote", a comma; and\nlines\r\n',
    "\uff1dfull width",
    "emoji \N{SNOWMAN} and \u2028",
]
TEXT_PAIRS = [PreferencePair(f"{text} {i}", text, f"other {text}") for i, text in enumerate(TRICKY)]
CHAT_PAIRS = [
    PreferencePair(
        ({"role": "user", "content": text},),
        ({"role": "assistant", "content": text},),
        ({"role": "assistant", "content": f"not {text}"},),
    )
    for text in TRICKY
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of simulated decisions."""
    folder = tmp_path_factory.mktemp("export")
    with open_store(folder / "feedback.jsonl", create=True) as store:
        store.record_decisions(simulate("extraction", 400, 0, situations=20))
    built = build_extraction_dataset(folder / "feedback.jsonl", split_by="group")
    write_dataset(built, folder / "dataset", min_pairs=1)
    return folder / "dataset"


def export(pairs: list[PreferencePair], folder: Path, format_name: str) -> Path:
    write_pairs(pairs, folder / "pairs.jsonl")
    export_pairs(folder / "pairs.jsonl", folder / "out", format_name=format_name)
    return folder / "out"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [TEXT_PAIRS, CHAT_PAIRS], ids=["text", "chat"])
@pytest.mark.parametrize(
    ("format_name", "file_name"),
    [
        ("jsonl", "train.jsonl"),
        ("huggingface", "train.jsonl"),
        ("openai", "train.jsonl"),
        ("parquet", "train.parquet"),
    ],
)
def test_exported_pairs_read_back_as_they_were(
    pairs: list[PreferencePair], format_name: str, file_name: str, tmp_path: Path
) -> None:
    expected = pairs
    if format_name == "openai" and pairs is TEXT_PAIRS:  # this format knows messages alone
        expected = [as_messages(pair) for pair in pairs]
    assert read_pairs(export(pairs, tmp_path, format_name) / file_name) == expected


UNPAIRED = [PreferencePair("p", "good", None), PreferencePair("p", None, "bad", weight=2.0)]


@pytest.mark.parametrize(
    ("format_name", "file_name"),
    [("jsonl", "train.jsonl"), ("huggingface", "train.jsonl"), ("parquet", "train.parquet")],
)
def test_exported_unpaired_answers_read_back_as_they_were(
    format_name: str, file_name: str, tmp_path: Path
) -> None:
    assert read_pairs(export(UNPAIRED, tmp_path, format_name) / file_name) == UNPAIRED


def test_demonstrations_of_unpaired_answers_are_the_good_ones(tmp_path: Path) -> None:
    out = export(UNPAIRED, tmp_path, "prompt-completion")
    assert rows(out / "train.jsonl") == [{"prompt": "p", "completion": "good"}]


def test_format_of_pairs_alone_refuses_unpaired_answers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the format openai holds pairs alone, and a row has one"):
        export(UNPAIRED, tmp_path, "openai")


GIVEN = [
    PreferencePair(Tokens((1, 2)), Tokens((3,)), Tokens((4,))),
    PreferencePair(Tokens((1, 2)), Tokens((3,)), Tokens((5,))),
]


@pytest.mark.parametrize(
    ("format_name", "file_name"), [("jsonl", "train.jsonl"), ("parquet", "train.parquet")]
)
def test_exported_token_ids_read_back_as_they_were(
    format_name: str, file_name: str, tmp_path: Path
) -> None:
    assert read_pairs(export(GIVEN, tmp_path, format_name) / file_name) == GIVEN


@pytest.mark.parametrize("format_name", ["openai", "chat", "prompt-completion"])
def test_format_of_texts_refuses_token_ids(format_name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this format holds texts, and a row holds token ids"):
        export(GIVEN, tmp_path, format_name)


def as_messages(pair: PreferencePair) -> PreferencePair:
    return PreferencePair(
        ({"role": "user", "content": str(pair.prompt)},),
        ({"role": "assistant", "content": str(pair.chosen)},),
        ({"role": "assistant", "content": str(pair.rejected)},),
    )


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=25)
@given(prompt=TEXTS, chosen=TEXTS)
def test_csv_gives_back_any_text_and_no_cell_begins_a_formula(
    prompt: str, chosen: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    texts = [prompt, chosen, f"{chosen}."]
    out = export(
        [PreferencePair(prompt, chosen, f"{chosen}.")], tmp_path_factory.mktemp("csv"), "csv"
    )
    with (out / "train.csv").open(encoding="utf-8", newline="") as file:
        header, cells = csv.reader(file)
    assert header == ["prompt", "chosen", "rejected"]
    assert [cell[1:] if cell.lstrip()[:1] == "'" else cell for cell in cells] == texts
    assert not any(cell.lstrip().startswith(("=", "+", "-", "@")) for cell in cells)


def test_csv_disarms_formulas_behind_blanks_and_in_full_width(tmp_path: Path) -> None:
    with (export(TEXT_PAIRS, tmp_path, "csv") / "train.csv").open(
        "r", -1, "utf-8", newline=""
    ) as file:
        cells = [row["chosen"] for row in csv.DictReader(file)]
    disarmed = [text for text, cell in zip(TRICKY, cells, strict=True) if cell == f"'{text}"]
    assert disarmed == ["=1+1", " \t@SUM(A1)", "-2", "'quoted", "\uff1dfull width"]


def test_csv_holds_conversations_and_optional_fields_as_json(tmp_path: Path) -> None:
    pair = PreferencePair(
        ({"role": "user", "content": 'hi, "you"'},),
        ({"role": "assistant", "content": "yes"},),
        ({"role": "assistant", "content": "no"},),
        weight=0.5,
    )
    with (export([pair], tmp_path, "csv") / "train.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert json.loads(row["prompt"]) == [{"role": "user", "content": 'hi, "you"'}]
    assert row["weight"] == "0.5"


# --- other tools ---------------------------------------------------------------------------------


def test_datasets_loads_the_huggingface_export(dataset: Path, tmp_path: Path) -> None:
    export_pairs(dataset, tmp_path / "hf", format_name="huggingface")
    loaded = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))
    assert {split: rows.column_names for split, rows in loaded.items()} == {
        "train": ["prompt", "chosen", "rejected"],
        "test": ["prompt", "chosen", "rejected"],
    }
    pairs = read_pairs(dataset / "extraction_dpo_train.jsonl")
    assert loaded["train"]["chosen"][:] == [pair.chosen for pair in pairs]


def test_datasets_loads_the_data_set_folder_itself(dataset: Path, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(str(dataset), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "eval"}


@pytest.mark.slow
def test_trl_trains_on_the_huggingface_export_as_it_is(
    peers_python: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    export_pairs(dataset, tmp_path / "hf", format_name="huggingface")
    script = Path(__file__).parent / "trl_step.py"
    command = [str(peers_python), str(script), str(model_folder), str(tmp_path / "hf")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=offline).stdout
    found = json.loads(printed.splitlines()[-1])
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert found["pairs"] == {
        "train": len(read_pairs(dataset / "extraction_dpo_train.jsonl")),
        "test": len(read_pairs(dataset / "extraction_dpo_eval.jsonl")),
    }


def test_openai_rows_have_the_published_fields(dataset: Path, tmp_path: Path) -> None:
    export_pairs(dataset, tmp_path / "out", format_name="openai")
    row = rows(tmp_path / "out" / "train.jsonl")[0]
    assert list(row) == ["input", "preferred_output", "non_preferred_output"]
    assert list(row["input"]) == ["messages", "tools", "parallel_tool_calls"]
    assert [message["role"] for message in row["preferred_output"]] == ["assistant"]


# --- what is exported ----------------------------------------------------------------------------


def test_chat_export_holds_only_actions_with_a_reward_above_zero(
    dataset: Path, tmp_path: Path
) -> None:
    rewards: dict[tuple[str, str], list[float]] = {}
    for row in load_dataset(dataset).train:
        key = (EXTRACTION.render_prompt(row.state), EXTRACTION.render_action(row.action))
        rewards.setdefault(key, []).append(row.reward)
    means = {key: sum(values) / len(values) for key, values in rewards.items()}
    export_pairs(dataset, tmp_path / "out", format_name="chat")
    exported = [
        tuple(message["content"] for message in row["messages"])
        for row in rows(tmp_path / "out" / "train.jsonl")
    ]
    best = {prompt: max(means[key] for key in means if key[0] == prompt) for prompt, _ in means}
    assert {prompt for prompt, _ in exported} == {key for key, mean in best.items() if mean > 0}
    assert all(means[key] == best[key[0]] for key in exported)
    assert "reward" not in (tmp_path / "out" / "train.jsonl").read_text("utf-8")


def test_both_splits_of_a_data_set_are_exported(dataset: Path, tmp_path: Path) -> None:
    report = export_pairs(dataset, tmp_path / "out", format_name="jsonl")
    assert set(report.file_bytes) == {"README.md", "manifest.json", "train.jsonl", "eval.jsonl"}
    assert report.file_bytes["train.jsonl"] == (tmp_path / "out/train.jsonl").stat().st_size


@pytest.mark.parametrize("format_name", EXPORTERS)
def test_same_source_gives_the_same_bytes(format_name: str, dataset: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_pairs(dataset, tmp_path / name, format_name=format_name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "README.md" in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_fields_that_a_format_cannot_hold_are_told(tmp_path: Path) -> None:
    write_pairs([PreferencePair("p", "a", "b", weight=0.5)], tmp_path / "pairs.jsonl")
    for format_name, notes in (
        ("openai", ["1 pairs have a weight, which the format openai cannot hold"]),
        ("jsonl", []),
    ):
        report = export_pairs(
            tmp_path / "pairs.jsonl", tmp_path / format_name, format_name=format_name
        )
        assert report.notes == notes


# --- refusals ------------------------------------------------------------------------------------


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no format 'xml', only huggingface, openai"):
        export_pairs(tmp_path, tmp_path / "out", format_name="xml")


def test_existing_folder_is_kept_unless_replacing(dataset: Path, tmp_path: Path) -> None:
    export_pairs(dataset, tmp_path / "out", format_name="csv")
    with pytest.raises(InputError, match="already exists"):
        export_pairs(dataset, tmp_path / "out", format_name="jsonl")
    export_pairs(dataset, tmp_path / "out", format_name="jsonl", replace_folder=True)
    assert not (tmp_path / "out" / "train.csv").exists()


def test_replacing_never_removes_the_source_or_other_files(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds the source"):
        export_pairs(dataset, dataset.parent, format_name="csv", replace_folder=True)
    with pytest.raises(InputError, match="holds the source"):
        export_pairs(dataset, dataset, format_name="csv", replace_folder=True)
    export_pairs(dataset, tmp_path / "out", format_name="csv")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds mine\.txt, which is not in its manifest"):
        export_pairs(dataset, tmp_path / "out", format_name="csv", replace_folder=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "out" / "train.csv").exists()


@pytest.mark.parametrize("format_name", EXPORTERS)
def test_every_export_lists_its_files_and_says_that_data_is_simulated(
    dataset: Path, tmp_path: Path, format_name: str
) -> None:
    export_pairs(dataset, tmp_path / "out", format_name=format_name)
    assert verify_manifest(tmp_path / "out") == []
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert {*listed, "manifest.json"} == {path.name for path in (tmp_path / "out").iterdir()}
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "400 of 400 examples were simulated: nobody observed them" in card
    assert "Split by group (seed 0)" in card


def test_damaged_data_set_is_refused(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "copy")
    (tmp_path / "copy" / "extraction_dpo_eval.jsonl").unlink()
    with pytest.raises(InputError, match=r"extraction_dpo_eval\.jsonl: no such file"):
        export_pairs(tmp_path / "copy", tmp_path / "out", format_name="csv")


def test_nothing_is_written_when_the_source_is_bad(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n", "utf-8")
    with pytest.raises(InputError, match="missing"):
        export_pairs(tmp_path / "pairs.jsonl", tmp_path / "out", format_name="csv")
    assert not (tmp_path / "out").exists()


def test_parquet_without_pyarrow_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'dpo-engine\[parquet\]'"):
        export(TEXT_PAIRS, tmp_path, "parquet")


@pytest.mark.parametrize("name", EXPORTERS)
def test_progress_counts_what_is_read_and_written(name: str, tmp_path: Path) -> None:
    write_pairs(TEXT_PAIRS, tmp_path / "pairs.jsonl")
    log = io.StringIO()
    out = tmp_path / "out"
    export_pairs(tmp_path / "pairs.jsonl", out, format_name=name, console=Console(log))
    read, written = log.getvalue().splitlines()
    assert read.startswith(f"read {len(TEXT_PAIRS)} [")
    assert written.startswith(("write 100% 8/8 [", "write 8 ["))
    assert written.endswith("rows/s]")
