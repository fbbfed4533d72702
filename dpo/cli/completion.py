"""``dpo completion``, and what the values of options can be completed to."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from dpo.settings import known_options

SHELLS = ("bash", "zsh", "fish")

_FILES = {"data", "eval_data"}
_FOLDERS = {"model", "reference", "out", "reference_cache.dir", "train.resume", "adapter.base"}


@click.command
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes a shell complete the commands, options and values of dpo.

    SHELL reads it where its examples below put it, or at once: eval "$(dpo completion bash)".
    """
    found = get_completion_class(shell)
    assert found is not None
    root = click.get_current_context().find_root().command
    click.echo(found(root, {}, "dpo", "_DPO_COMPLETE").source())


def complete_value(key: str, incomplete: str) -> list[CompletionItem]:
    """Complete the value of a key of the config: choices, losses, files and folders."""
    if key in _FILES | _FOLDERS:
        return [CompletionItem(incomplete, type="file" if key in _FILES else "dir")]
    return [CompletionItem(value) for value in _values(key) if value.startswith(incomplete)]


def complete_assignment(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete ``KEY=VALUE`` of ``--set``."""
    key, equals, value = incomplete.partition("=")
    if not equals:
        keys = [name for name in known_options() if name.startswith(incomplete)]
        return [CompletionItem(f"{name}=", help=known_options()[name].help) for name in keys]
    return [CompletionItem(f"{key}={item}") for item in _values(key) if item.startswith(value)]


def _values(key: str) -> Iterator[str]:
    if key == "loss.name":
        yield from names_in_table("dpo.losses", "LOSSES")
    elif key in known_options():
        option = known_options()[key]
        yield from option.choices or option.words
        if option.kind is bool:
            yield from ("true", "false")


def names_in_table(module: str, table: str) -> list[str]:
    """Read the keys of a dict literal from its source: importing it would import torch."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table:
            assert isinstance(node.value, ast.Dict)
            return [str(ast.literal_eval(key)) for key in node.value.keys if key is not None]
    raise AssertionError(f"{module} has no {table}")
