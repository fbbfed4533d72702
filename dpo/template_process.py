"""The process in which a chat template runs: a program of its own, bounded by the system.

``dpo.templates`` starts it as a script and talks to it in lines of JSON. The first says what the
template is, each further one what to render; each answer has a ``text`` or an ``error``. A template
that takes too long is ended by the system with the process, wherever it is; one that takes too much
memory gets an error. Nothing is imported here but jinja2.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn, TextIO

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 10_000_000  # of one conversation; beyond it the template is taken to be broken
MAX_SECONDS = 1.0  # of a processor, for one conversation or to compile the template
MAX_BYTES = 2**29  # of memory in all, where the system bounds it


class _Generation(Extension):
    """``{% generation %}``: marks what the assistant said, and changes nothing in the text."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def main() -> None:
    """Answer lines until there are no more."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whoever starts us may ignore it
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # answers go into a pipe
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS has the limit and does not keep it
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    answer_all(sys.stdin, sys.stdout)


def answer_all(requests: TextIO, answers: TextIO) -> None:
    """Compile the template of the first line, and render each of the others."""
    template = None
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # whose signal ends the process
        try:
            request = json.loads(line)
            if template is None:
                template = _environment().from_string(request)
                answer = {"text": ""}
            else:
                answer = {"text": _render(template, request)}
        except MemoryError:
            answer = {"error": f"takes more than {MAX_BYTES // 2**20} MiB of memory"}
        except Exception as error:  # a template can raise anything
            answer = {"error": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _render(template: jinja2.Template, values: dict[str, Any]) -> str:
    blocks, size = [], 0
    for block in template.generate(values):
        blocks.append(block)
        size += len(block)
        if size > MAX_CHARACTERS:
            raise ValueError(f"writes more than {MAX_CHARACTERS} characters")
    return "".join(blocks)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is: jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str, /) -> str:
    return datetime.now().strftime(pattern)


if __name__ == "__main__":
    main()
