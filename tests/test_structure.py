"""What keeps the tree in order: who imports whom, what is light, what never appears."""

import ast
import json
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dpo": ROOT / "dpo",
    "dpo.data": ROOT / "data",
    "dpo.eval": ROOT / "eval",
    "dpo.bench": ROOT / "bench",
}


# A line may import the lines above it; modules that are not named stand where their imports allow.
LAYERS = (
    ("dpo.errors",),
    ("dpo.files",),
    ("dpo.preferences", "dpo.tokenizer"),
    ("dpo.batching", "dpo.models", "dpo.losses"),
    ("dpo.log_probs",),
    ("dpo.reference", "dpo.checkpoint", "dpo.metrics", "dpo.optim"),
    ("dpo.trainer",),
    ("dpo.config", "dpo.run"),
    ("dpo.cli",),
)
NO_TORCH = (
    "dpo", "dpo.cli", "dpo.cli.options", "dpo.config", "dpo.errors", "dpo.files", "dpo.preferences",
    "dpo.progress", "dpo.report", "dpo.settings", "dpo.templates", "dpo.tokenization",
    "dpo.tokenizer", "dpo.train_config", "dpo.data", "dpo.eval", "dpo.bench",
)  # fmt: skip


def source_files(folder: Path) -> Iterator[Path]:
    """All Python files below a folder but those behind links."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py":
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from source_files(path)


def module_name(package: str, folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


FILES = {
    module_name(package, folder, path): path
    for package, folder in PACKAGES.items()
    for path in source_files(folder)
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


@cache
def imports(name: str) -> set[str]:
    """Modules of this project that a module imports, at once or later, for types or not."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {item if item in FILES else node.module for item in inner}
    return found & set(FILES)


def reached(name: str) -> set[str]:
    """Everything that a module imports, directly or not; the package's own public names apart."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        new = imports(waiting.pop()) - seen - {"dpo"}
        seen |= new
        waiting += new
    return seen


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def engine() -> list[str]:
    others = ("dpo.data", "dpo.eval", "dpo.bench", "dpo.cli")
    return [
        name
        for name in FILES
        if name not in {"dpo", "dpo.__main__"} and not any(is_in(name, other) for other in others)
    ]


# --- imports ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_imports_point_down(layer: int) -> None:
    above = {name for names in LAYERS[layer + 1 :] for name in names}
    wrong = {
        (module, target)
        for module in FILES
        for name in LAYERS[layer]
        if is_in(module, name)
        for target in reached(module)
        if any(is_in(target, upper) for upper in above)
    }
    assert wrong == set()


def test_no_module_reaches_itself() -> None:
    assert [name for name in FILES if name != "dpo" and name in reached(name)] == []


def test_engine_imports_neither_data_nor_eval_nor_bench_nor_cli() -> None:
    outside = ("dpo.data", "dpo.eval", "dpo.bench", "dpo.cli")
    wrong = {
        (name, target)
        for name in engine()
        for target in imports(name)
        if any(is_in(target, package) for package in outside)
    }
    assert wrong == set()


def test_data_imports_of_the_engine_only_what_needs_no_torch() -> None:
    wrong = {
        (name, target)
        for name in FILES
        if is_in(name, "dpo.data")
        for target in imports(name)
        if not is_in(target, "dpo.data")
        and target
        not in {
            *("dpo.errors", "dpo.files", "dpo.pair", "dpo.pair_rows", "dpo.preferences"),
            "dpo.progress",
            *("dpo.tokenization", "dpo.tokenizer"),  # what a model reads is checked with them
        }
    }
    assert wrong == set()


def test_eval_and_data_import_neither_bench_nor_cli() -> None:
    wrong = {
        (name, target)
        for name in FILES
        if is_in(name, "dpo.data") or is_in(name, "dpo.eval")
        for target in imports(name)
        if is_in(target, "dpo.bench") or is_in(target, "dpo.cli")
    }
    assert wrong == set()


def test_data_does_not_import_eval() -> None:
    wrong = [name for name in FILES if is_in(name, "dpo.data") and "dpo.eval" in str(imports(name))]
    assert wrong == []


# --- what is light ------------------------------------------------------------------------------


def cpu_seconds(*arguments: str) -> float:
    """Least CPU time of three runs of Python."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.parametrize("arguments", [("-c", "import dpo"), ("-m", "dpo", "--help")])
def test_import_and_help_take_less_than_0_3_seconds(arguments: tuple[str, ...]) -> None:
    assert cpu_seconds(*arguments) < 0.3


def test_modules_that_promise_it_do_not_import_torch() -> None:
    code = (
        "import importlib, json, sys\n"
        f"for name in {NO_TORCH!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'psycopg', 'matplotlib'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert json.loads(output.stdout) == []


# --- public names -------------------------------------------------------------------------------


def test_public_names_and_their_types_come_from_one_place() -> None:
    import dpo

    declared = {
        alias.name: node.module
        for block in TREES["dpo"].body
        if isinstance(block, ast.If)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == dpo._HOMES


def test_public_names_exist() -> None:
    import dpo

    assert [name for name in dpo._HOMES if getattr(dpo, name).__name__.split(".")[-1] != name] == []
    assert set(dpo._HOMES) <= set(dir(dpo))


def test_unknown_public_name_is_an_attribute_error() -> None:
    import dpo

    with pytest.raises(AttributeError, match="module 'dpo' has no attribute 'Trainr'"):
        _ = dpo.Trainr


# --- the tree -----------------------------------------------------------------------------------


def test_every_package_is_listed_in_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = [name for name, path in FILES.items() if path.name == "__init__.py"]
    assert sorted(settings["tool"]["setuptools"]["packages"]) == sorted(packages)


def test_every_module_lies_in_a_package() -> None:
    assert [path for path in FILES.values() if not (path.parent / "__init__.py").exists()] == []


def test_nothing_reads_or_writes_pickles() -> None:
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {"torch.load", "torch.save", "numpy.load", "np.load", "numpy.save", "np.save"}
    found = [
        (name, ast.unparse(node))
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and modules & {alias.name for alias in node.names})
        or (isinstance(node, ast.ImportFrom) and node.module in modules)
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in calls)
    ]
    assert found == []


def test_nothing_evaluates_text_as_code() -> None:
    found = [
        (name, ast.unparse(node))
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"eval", "exec", "compile"}
    ]
    assert found == []


def test_pages_hold_neither_tracebacks_nor_paths_of_a_machine() -> None:
    folders = ("dpo", "data", "eval", "bench", "tests")
    pages = [
        *ROOT.glob("*.md"),
        *(page for name in folders for page in (ROOT / name).rglob("*.md")),
    ]
    assert len(pages) > 10
    unwanted = re.compile(r"Traceback \(most recent call last\)|(?<![\w.])/(?:tmp|home|root|work)/")
    assert [page for page in pages if unwanted.search(page.read_text(encoding="utf-8"))] == []
