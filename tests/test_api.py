"""The public names: their examples run, and ``dpo/API.md`` says what they are.

``python -m tests.test_api`` writes the page anew, for a change that is meant.
"""

import ast
import difflib
import doctest
import importlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dpo
from dpo.data.simulate import simulate
from dpo.data.stores import open_store
from tests.pages import blocks

PAGE = Path(__file__).parents[1] / "dpo/API.md"
GROUPS = {
    "Pairs and tokens": (
        "PreferencePair", "read_pairs", "write_pairs", "load_tokenizer", "tokenize_pairs",
    ),
    "Models and training": (
        "load_model", "TrainConfig", "Trainer", "losses", "ReferenceCache", "reference_log_probs",
    ),
    "Log-probs and rewards": ("collate", "completion_log_probs", "score_pairs"),
    "From feedback to a policy": (
        "build_extraction_dataset", "build_retrieval_dataset", "build_consolidation_dataset",
        "PolicyTrainingConfig", "train_extraction_policy", "train_retrieval_policy",
        "train_consolidation_policy", "LanguageModelPolicy",
    ),
    "Is it better?": (
        "evaluate_policy", "compare_policies", "compute_confidence_interval",
        "format_evaluation_report", "format_comparison_report",
    ),
}  # fmt: skip


class _WithoutHelp(ast.NodeTransformer):
    """Leaves of ``Annotated[int, "help"]`` the type."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated":
            assert isinstance(node.slice, ast.Tuple)
            return node.slice.elts[0]
        return node


def signatures(name: str) -> Iterator[str]:
    """How a public name and its public methods are called, as in the source."""
    found = getattr(dpo, name)
    if inspect.ismodule(found):
        yield f"{name}: {', '.join(found.__all__)}"
        return
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(found))).body
    if isinstance(node, ast.FunctionDef):
        yield name + _arguments(node)
        return
    assert isinstance(node, ast.ClassDef)
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    made = [name + _arguments(item) for item in methods if item.name == "__init__"]
    by_name = ["*"] if "kw_only=True" in map(ast.unparse, _decorators(node)) else []
    yield from made or [f"{name}({', '.join([*by_name, *_fields(node)])})"]
    yield from (f"{name}.{item.name}{_arguments(item)}" for item in methods if item.name[0] != "_")


def _arguments(node: ast.FunctionDef) -> str:
    """Arguments and result, without ``self``."""
    arguments = node.args
    if arguments.args and arguments.args[0].arg == "self":
        del arguments.args[0]
    result = "" if node.name == "__init__" or node.returns is None else ast.unparse(node.returns)
    return f"({ast.unparse(arguments)})" + (f" -> {result}" if result else "")


def _decorators(node: ast.ClassDef) -> list[ast.keyword]:
    return [
        key for call in node.decorator_list if isinstance(call, ast.Call) for key in call.keywords
    ]


def _fields(node: ast.ClassDef) -> list[str]:
    return [
        ast.unparse(_WithoutHelp().visit(item))
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    ]


def example(name: str) -> str:
    """The lines of a docstring's examples."""
    return "".join(
        textwrap.indent(f">>> {part.source}", "").replace("\n", "\n... ")[: -len("... ")]
        + part.want
        for part in doctest.DocTestParser().get_examples(inspect.getdoc(getattr(dpo, name)) or "")
    )


def page() -> str:
    lines = [
        PAGE.read_text(encoding="utf-8").partition("\n## ")[0].rstrip() + "\n"
    ]  # written by hand
    for group, names in GROUPS.items():
        lines.append(f"## {group}\n")
        for name in names:
            found = getattr(dpo, name)
            first = (inspect.getdoc(found) or "").split("\n\n")[0].replace("\n", " ")
            home = importlib.import_module(dpo._HOMES[name]).__name__
            of = f"`{home}`" if home != "dpo" else f"`{found.__name__}`"
            lines.append(f"### {name}\n\n{first.replace('``', '`')} ({of})\n")
            lines.append("```text\n" + "\n".join(signatures(name)) + "\n```\n")
            lines.append(f"```pycon\n{example(name)}```\n")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_model_folder: Callable[..., Path]
) -> Path:
    """What the examples name."""
    folder = tmp_path_factory.mktemp("api")
    make_model_folder(folder / "model", max_position_embeddings=1024)
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " no"} for n in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_store(folder / "feedback.db", create=True) as store:
        for policy in ("extraction", "retrieval", "consolidation"):
            store.record_decisions(simulate(policy, 600, 0, situations=60))
    return folder


@pytest.mark.parametrize("name", sorted(dpo._HOMES))
def test_example_of_a_public_name_runs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    text = inspect.getdoc(getattr(dpo, name)) or ""
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert examples.examples
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert result.failed == 0, "".join(said)


def test_every_public_name_is_in_one_group() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(dpo._HOMES)


def test_page_says_the_names_and_signatures_that_there_are() -> None:
    names = sorted(dpo._HOMES)
    written, found = PAGE.read_text(encoding="utf-8").splitlines(), page().splitlines()
    changes = list(difflib.unified_diff(written, found, "written", "found", lineterm="", n=0))
    assert changes == [], "meant? then: python -m tests.test_api"
    assert len(blocks("text", "dpo/API.md")) == len(blocks("pycon", "dpo/API.md")) == len(names)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
