"""Every fenced block of every page is checked, by its language.

Python runs as it stands, in a folder that has what the pages name: ``M``, ``pairs.jsonl`` and so
on. The commands of a block of shell run one after another in such a folder, in this process, those
of dpo with the options of ``SMALLER`` behind; programs that are only parsed are those of ``PARSED``
and of the functions in ``PROGRAMS`` that say so. JSON and TOML are read by our readers, text is
compared with what is printed. What another test checks is in ``ELSEWHERE``. A page or block that is
none of these fails, and so does a program that is not in ``PROGRAMS``.
"""

import argparse
import gzip
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dpo.adapter_files import save_adapter
from dpo.adapters import Adapter, add_adapter
from dpo.cli import main
from dpo.data.stores import open_store
from dpo.models import load_model
from dpo.preferences import read_pairs
from tests.bench.rows import row as bench_row
from tests.pages import (
    BLOCKS,
    PAGES,
    ROOT,
    Block,
    Command,
    blocks,
    call_of,
    commands,
    commands_in_sentences,
    understand,
)

Words = tuple[str, ...]

ELSEWHERE = {  # what takes its blocks by ``blocks(language, page)``
    "tests/test_api.py::test_page_says_the_names_and_signatures_that_there_are": (
        ("text", "dpo/API.md"),
        ("pycon", "dpo/API.md"),
    ),
    "tests/test_data_page.py::test_row_is_read_whole_and_its_layout_is_named_as_on_the_page": (
        ("json", "dpo/DATA.md"),
    ),
    "tests/test_howto.py::test_diffs_of_the_pages_apply_and_work": (("diff",),),
    "tests/test_models.py::test_architecture_that_the_readme_adds_equals_that_of_transformers": (
        ("python", "dpo/models/README.md"),
    ),
    "tests/data/test_kinds_readme.py::test_an_example_runs": (("python", "data/kinds/README.md"),),
    "tests/eval/test_eval_readme.py::test_the_example_of_evaluating_runs": (
        ("python", "eval/README.md"),
    ),
}
PARSED = {  # commands of dpo that are not run
    "dpo demo": "takes minutes; tests/eval/test_demo.py runs it, smaller",
    "dpo bench": "takes minutes; tests/bench/test_bench_cli.py runs a tiny scenario",
}
_SMALL = "--device cpu --threads 1 --quiet --tokens-per-micro-batch 512"
SMALLER = {
    "dpo data simulate": "--decisions 1500",
    "dpo train": f"{_SMALL} --batch-size 16",
    "dpo sweep": f"{_SMALL} --batch-size 16 --steps 1",
    "dpo train-policy": "--epochs 1",
    "dpo generate": "--max-new-tokens 3",
    "dpo plan": "--print-config",  # it rehearses for ten seconds; tests/test_planner.py plans
}
SLOW = ("dpo train-policy",)  # blocks with such a command take more than a few seconds
SHOWN = {  # what prints the texts of a page
    "dpo/PLANNER.md": "plan --model M --data pairs.jsonl --device cpu --tokens-per-micro-batch 64",
}
OPTIONS = tuple(shlex.split("--model M --data pairs.jsonl --out out"))  # what ``...`` stands for


def of_language(language: str) -> list[Any]:
    """Return the blocks of a language that are checked here, for ``parametrize``."""
    taken = {each for all_of_one in ELSEWHERE.values() for each in all_of_one}
    return [
        pytest.param(block, id=str(block), marks=[pytest.mark.slow] if is_slow(block) else [])
        for block in blocks(language)
        if not {(language,), (language, block.page)} & taken
    ]


def is_slow(block: Block) -> bool:
    return block.language == "sh" and any(name in block.text for name in SLOW)


# --- what the pages name -------------------------------------------------------------------------

MODELS = (
    "model",
    "M",
    "MODEL",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-8B",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)
PAIRS = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " no"} for n in range(40)]
MADE = """
dpo data simulate extraction --out feedback.db
dpo data build extraction --feedback feedback.db --out dataset --split-by group
dpo train --model M --data pairs.jsonl --out RUN
dpo score --model RUN/model --reference M --data pairs.jsonl --out scores.jsonl
"""
COPIES = {"data": "dataset", "before.jsonl": "scores.jsonl", "after.jsonl": "scores.jsonl"}


@pytest.fixture(scope="module")
def stand_ins(
    tmp_path_factory: pytest.TempPathFactory, make_model_folder: Callable[..., Path]
) -> Path:
    """A folder with everything that the pages name, small."""
    folder = tmp_path_factory.mktemp("pages")
    for name in MODELS:
        make_model_folder(folder / name, max_position_embeddings=2048)
    (folder / "MODEL/extraction_metadata.json").write_text('{"policy": "extraction"}')
    model = load_model(folder / "model")
    add_adapter(model, Adapter())
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter", base="model")
    for name in ("pairs.jsonl", "more.jsonl", "held.jsonl"):
        write_lines(folder / name, PAIRS)
    write_lines(folder / "answers.jsonl", (answer(pair, n % 3 > 0) for n, pair in enumerate(PAIRS)))
    write_lines(folder / "hh.jsonl", map(dialogues, PAIRS))
    (folder / "hh.jsonl.gz").write_bytes(gzip.compress((folder / "hh.jsonl").read_bytes()))
    for name in ("old.json", "new.json"):
        bench = {"format": 2, "commit": None, "rows": [bench_row()]}
        (folder / name).write_text(json.dumps(bench), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        for command in commands(MADE):
            do(command)
    for name, source in COPIES.items():
        copy = shutil.copytree if (folder / source).is_dir() else shutil.copy
        copy(folder / source, folder / name)
    return folder


def write_lines(path: Path, rows: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answer(pair: Mapping[str, str], is_good: bool) -> Mapping[str, object]:
    """One side of a pair as a row of its own."""
    side = "chosen" if is_good else "rejected"
    return {"prompt": pair["prompt"], "completion": pair[side], "label": is_good}


def dialogues(pair: Mapping[str, str]) -> Mapping[str, str]:
    """A pair as the files of HH hold it."""
    before = f"\n\nHuman: {pair['prompt']}\n\nAssistant:"
    return {side: before + pair[side] for side in ("chosen", "rejected")}


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.fixture
def folder(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, made the current folder."""
    copy = shutil.copytree(stand_ins, tmp_path / "copy")
    enter(copy, monkeypatch)
    return copy


# --- programs ------------------------------------------------------------------------------------


def do(command: Command) -> str:
    """Do a command; its output goes where the line says, and is returned."""
    program = command.words[0].rpartition("/")[2]
    assert program in PROGRAMS, f"say in PROGRAMS how {program} is checked"
    printed = PROGRAMS[program](command.words)
    if command.output:
        Path(command.output).write_text(printed, encoding="utf-8")
    return printed


def _dpo(words: Words) -> str:
    """Run it, or only parse it; ``...`` stands for ``OPTIONS``."""
    is_short = "..." in words
    words = ("dpo", *(word for word in words[1:] if word != "..."))
    if is_short:
        words += OPTIONS
    name = understand(words)
    if name in PARSED:
        return ""
    words = (*words, *shlex.split(SMALLER.get(name, "")))
    if "--out" in words:  # a stand-in of that name
        _remove(Path(words[words.index("--out") + 1]))
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
    return result.stdout


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _torchrun(words: Words) -> str:
    """Parse its own part; run dpo's in one process, which ranks could share."""
    from torch.distributed.run import get_args_parser

    split = words.index("-m")
    launcher = [word for word in words[1:split] if word != "..."]
    get_args_parser().parse_args([*launcher, *words[split:]])
    if words[split + 1] != "dpo":
        return _python(("python", *words[split:]))
    alone = shlex.split("--parallel data --tensor-ranks 1") if words[split + 2] == "train" else []
    return _dpo((*words[split + 1 :], *alone))


def _python(words: Words) -> str:
    """Run code; of a module or file parse the arguments, all that they do takes minutes."""
    match words[1:]:
        case ("-c", code):
            exec(compile(code, "page", "exec"), {"__name__": "page"})
        case ("-m", "pytest", *_):
            _pytest(words[2:])
        case ("-m", module, *_):
            _parse(lambda: runpy.run_module(module, run_name="__main__"), words[2:])
        case (file, *_):
            _parse(lambda: runpy.run_path(str(ROOT / file), run_name="__main__"), words[1:])
    return ""


class _Parsed(BaseException):
    """A program has taken its arguments; no program catches this."""


def _parse(start: Callable[[], object], words: Words) -> None:
    """Start a program and leave it when it has parsed its arguments, or has shown its help."""
    parse = argparse.ArgumentParser.parse_args

    def leave(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that a module runs once more
        patch.setattr(sys, "argv", list(words))
        patch.setattr(argparse.ArgumentParser, "parse_args", leave)
        with pytest.raises((_Parsed, SystemExit)) as left:
            start()
    assert not getattr(left.value, "code", 0), f"refused: {shlex.join(words)}"


def _pytest(words: Words) -> str:
    """Look for the files: these tests run in it."""
    named = [word for before, word in pairwise(words) if before not in ("-k", "-m", "-n")]
    assert all((ROOT / word).exists() for word in named if not word.startswith("-")), words
    return ""


def _pip(words: Words) -> str:
    """Look for files and extras: it needs the network, and the check does it."""
    assert words[1] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for target in (word for word in words[2:] if word not in ("-e", "-r")):
        path, _, extras = target.rstrip("]").partition("[")
        assert (ROOT / path).exists()
        assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])
    return ""


def _tool(words: Words) -> str:
    """Look for the line in the check, which takes longer than a test may."""
    check = (ROOT / ".ci/run").read_text(encoding="utf-8").replace("format --check", "format")
    assert f"{shlex.join(words)}\n" in check
    return ""


def _run(words: Words) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


PROGRAMS: Mapping[str, Callable[[Words], str]] = {
    "dpo": _dpo,
    "torchrun": _torchrun,
    "python": _python,
    "python3": _python,
    "pytest": _pytest,
    "pip": _pip,
    "ruff": _tool,
    "mypy": _tool,
    "pyright": _tool,
    "head": _run,
    "tail": _run,
}


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of_language("python"))
@pytest.mark.usefixtures("folder")
def test_python_runs_as_it_stands(block: Block) -> None:
    with warnings.catch_warnings():
        if "peft" in block.text:
            warnings.simplefilter("ignore")  # its own, and transformers'
        exec(compile(block.text, str(block), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("block", of_language("sh"))
@pytest.mark.usefixtures("folder")
def test_commands_do_what_they_say(block: Block) -> None:
    for command in commands(block.text):
        do(command)


@pytest.mark.parametrize("block", of_language("json"))
def test_json_is_a_decision_or_a_pair(block: Block, tmp_path: Path) -> None:
    row = json.loads(block.text)
    write_lines(tmp_path / "rows.jsonl", [row])
    if "policy" in row:
        with open_store(tmp_path / "rows.jsonl") as store:
            assert len(list(store.decisions())) == 1
    else:
        assert len(read_pairs(tmp_path / "rows.jsonl")) == 1


@pytest.mark.parametrize("block", of_language("toml"))
def test_toml_is_a_config(block: Block, folder: Path) -> None:
    (folder / "run.toml").write_text(block.text, encoding="utf-8")
    needed = zip(OPTIONS[::2], OPTIONS[1::2], strict=True)
    missing = [each for each in needed if each[0][2:] not in tomllib.loads(block.text)]
    _dpo(("dpo", "train", "--config", "run.toml", *chain(*missing), "--print-config"))


@pytest.mark.slow
@pytest.mark.parametrize("block", of_language("text"))
@pytest.mark.usefixtures("folder")
def test_text_is_what_is_printed_but_for_numbers(block: Block) -> None:
    result = CliRunner().invoke(main, shlex.split(SHOWN[block.page]))
    printed = {"...", *forms(result.stdout)}
    assert [form for form in forms(block.text) if form not in printed] == []


def forms(text: str) -> list[str]:
    """Lines with ``#`` for each number, time and answer, and one blank for several."""
    return [
        " ".join(re.sub(r"\d[\d,.e+]*( s| min| h)?\b|\b(none|yes|no)\b", "#", line).split())
        for line in text.splitlines()
    ]


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_have_the_options_that_are_named(page: str) -> None:
    for text in commands_in_sentences(page):
        call = call_of(text.split())
        every = call.command.get_params(click.Context(call.command))
        options = {name for option in every for name in option.opts}
        named = {word for word in call.arguments if word.startswith("--")}
        assert named <= options, text


# --- nothing is left out -------------------------------------------------------------------------


def test_every_block_is_checked() -> None:
    here = {"python", "sh", "json", "toml", "text"}
    taken = {each for all_of_one in ELSEWHERE.values() for each in all_of_one}
    left = [
        str(block)
        for block in BLOCKS
        if block.language not in here
        and not {(block.language,), (block.language, block.page)} & taken
    ]
    assert left == [], "a language that nothing reads"


@pytest.mark.parametrize("test", ELSEWHERE)
def test_what_is_checked_elsewhere_takes_its_blocks_from_here(test: str) -> None:
    path, name = test.split("::")
    source = (ROOT / path).read_text(encoding="utf-8")
    assert f"\ndef {name}(" in source
    for asked in ELSEWHERE[test]:
        assert f"blocks({', '.join(map(json.dumps, asked))})" in source
        assert blocks(*asked)


def test_every_page_and_fence_is_found() -> None:
    fences = 0
    for page in PAGES:
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        fences += sum(line.strip().startswith(("```", "~~~")) for line in lines)
    assert fences == 2 * len(BLOCKS)
    if (ROOT / ".git").exists():
        tracked = subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True)
        assert sorted(PAGES) == sorted(tracked.split())


@pytest.mark.parametrize(
    "line",
    [
        "dpo train --model M --data pairs.jsonl --out run --learnig-rate 1",
        "dpo train --model M --data pairs.jsonl --out run --dtype half",
        "dpo bench --suite none-of-them",
        "dpo eval absent.jsonl",
        "torchrun --nprocs 8 -m dpo train ...",
        "python tests/fuzz.py --outputs 1",
        "pip install '.[absent]'",
        "pytest absent.py",
    ],
)
@pytest.mark.usefixtures("folder")
def test_wrong_command_is_seen(line: str) -> None:
    (command,) = commands(line)
    with pytest.raises((AssertionError, SystemExit, click.ClickException)):
        do(command)
