"""Chat templates: a conversation as the text that a model was trained on.

Templates come from strangers: they run in jinja2's immutable sandbox, and their output is bounded.
What they render equals transformers' ``apply_chat_template``.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo.errors import InputError
from dpo.files import JSON
from dpo.pair import Message

CHATML = """\
{%- if tools %}{{- raise_exception('ChatML has no place for tools') }}{%- endif %}
{%- for message in messages %}
{%- if message['tool_calls'] %}
{{- raise_exception('ChatML has no place for tool calls') }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MAX_CHARACTERS = 10_000_000  # of one conversation; beyond it the template is taken to be broken

_CONTINUE = "\ue000continue\ue000"  # private use: no template and no text holds it


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the template in jinja2's language.
        name: what to call it in messages.
        variables: what it can name beside the conversation: ``bos_token`` and so on.

    Raises:
        InputError: the source is no valid template.
    """

    def __init__(self, source: str, *, name: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self.name = name
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InputError(f"{name}: not a valid template: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[JSON] | None = None,
        variables: Mapping[str, JSON] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: at least one; their null fields count as absent.
            tools: JSON schemas of the functions that the model may call.
            variables: what else the template can name, for this conversation alone.
            add_generation_prompt: end with what makes the model begin its answer.

        Raises:
            InputError: the template refuses the conversation, fails on it, or writes too much.
        """
        blocks, size = [], 0
        try:
            for block in self._template.generate(
                {**self._variables, **(variables or {})},
                messages=[
                    {key: value for key, value in message.items() if value is not None}
                    for message in messages
                ],
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
            ):
                blocks.append(block)
                size += len(block)
                if size > MAX_CHARACTERS:
                    raise InputError(f"writes more than {MAX_CHARACTERS} characters")
        except Exception as error:  # a template can raise anything
            raise InputError(f"{self.name}: {error}") from error
        return "".join(blocks)

    def render_to_continue(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[JSON] | None = None,
        variables: Mapping[str, JSON] | None = None,
    ) -> str:
        """Return the text of a conversation up to the end of its last message's content.

        Raises:
            InputError: as ``render``; or the last content is not text, or not in what is rendered.
        """
        content = messages[-1].get("content")
        if not isinstance(content, str):
            raise InputError("the last message of the prompt is to be continued, but is not text")
        open_message = {**messages[-1], "content": content + _CONTINUE}
        text = self.render([*messages[:-1], open_message], tools=tools, variables=variables)
        before, mark, _ = text.rpartition(_CONTINUE)
        if not mark:
            raise InputError(f"{self.name}: does not write the message to be continued")
        return before


class _Generation(Extension):
    """``{% generation %}``: marks what the assistant said, and changes nothing in the text."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


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
