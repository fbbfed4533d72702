"""The fenced blocks of the pages of this repository, and the commands in them.

Every test that checks a block takes it from here, so that ``test_pages.py`` can tell that none is
left unchecked.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
FOLDERS = ("dpo", "data", "eval", "bench", "tests")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(
        [*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))]
    )
]
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_OPERATORS = {"&&", ";", "|"}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        page: from the root of the repository.
        line: of its fence.
        language: behind the fence; may be empty.
        text: what is in it, without the indentation of the fence.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        """Say where it is."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a line of shell: its words, and the file that takes its output, if one does."""

    words: tuple[str, ...]
    output: str | None = None


def _blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, found[2], textwrap.dedent(found[3]))


BLOCKS = [block for page in PAGES for block in _blocks(page)]


def blocks(language: str, page: str | None = None) -> list[Block]:
    """Return the blocks of a language, of all pages or of one."""
    return [block for block in BLOCKS if block.language == language and page in (None, block.page)]


def commands_in_sentences(page: str) -> list[str]:
    """Return what a page writes as ```dpo ...``` outside of its blocks."""
    text = _BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return [" ".join(found.split()) for found in re.findall(r"`(dpo [^`]+)`", text)]


def commands(text: str) -> list[Command]:
    """Take apart the commands of some lines of shell.

    ``A=1 dpo x \\`` and ``  -y > out && b`` on two lines are ``dpo x -y``, whose output goes to
    ``out``, and ``b``: settings of the environment are left out.
    """
    return [command for line in _lines(text) for command in _simple(_words(line))]


def _lines(text: str) -> Iterator[str]:
    """Yield lines; one that ends within quotes goes on."""
    pending = ""
    for line in text.replace("\\\n", "").splitlines(keepends=True):
        pending += line
        try:
            shlex.split(pending, comments=True)
        except ValueError:
            continue
        yield pending
        pending = ""
    assert not pending, f"quotes that do not end: {pending}"


def _words(line: str) -> list[str]:
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    return list(words)


def _simple(words: list[str]) -> Iterator[Command]:
    begin = 0
    for end in [*(i for i, word in enumerate(words) if word in _OPERATORS), len(words)]:
        part = words[begin:end]
        begin = end + 1
        while part and re.match(r"\w+=", part[0]):
            part = part[1:]
        output = part[-1] if ">" in part[-2:-1] else None
        if part:
            yield Command(tuple(part[:-2] if output else part), output)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of dpo: the command, its name with those above it, and its arguments."""

    command: click.Command
    name: str
    arguments: list[str]


def call_of(words: Sequence[str]) -> Call:
    """Find the command that ``dpo data build --out x`` calls; of ``list|verify`` the first."""
    from dpo.cli import main

    command: click.Command = main
    name, arguments = words[0], list(words[1:])
    while isinstance(command, click.Group) and arguments and arguments[0][0] != "-":
        part = arguments.pop(0).partition("|")[0]
        found = command.get_command(click.Context(command), part)
        assert found is not None, f"there is no command {name} {part}"
        command, name = found, f"{name} {part}"
    return Call(command, name, arguments)


def understand(words: Sequence[str]) -> str:
    """Parse a call of dpo with all its options; nothing is done; returns the command's name."""
    call = call_of(words)
    assert call.name != words[0]
    call.command.make_context(call.name, call.arguments)
    return call.name
