"""Chat templates: a conversation as the text that a model was trained on.

Templates come from strangers: they run in jinja2's immutable sandbox, in a process without secrets
(``dpo.template_process``), and their time, memory and output are bounded. What they render equals
transformers' ``apply_chat_template``.
"""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from threading import Lock

from dpo import template_process
from dpo.errors import InputError
from dpo.files import JSON
from dpo.pair import Message, plain_json
from dpo.template_process import MAX_SECONDS

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

_KEPT = ("TZ", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # of the environment
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
        self._process = subprocess.Popen(
            [sys.executable, "-P", template_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            process_group=0,  # Ctrl-C is for us, who may go on
            encoding="utf-8",
        )
        weakref.finalize(self, _end, self._process)
        self._lock = Lock()
        try:
            self._ask(source)
        except InputError as error:
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
        values = {
            **self._variables,
            **(variables or {}),
            "messages": [
                {key: value for key, value in message.items() if value is not None}
                for message in messages
            ],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._ask(values)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def _ask(self, request: object) -> str:
        """Send a line to the process, and return the text that it answers.

        Raises:
            InputError: the template raised an error, or has ended its process, now or before.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            line = json.dumps(request, default=plain_json) + "\n"
        except RecursionError as error:
            raise InputError(f"the conversation is too nested: {error}") from error
        with self._lock:
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                answer = ""
        if not answer.endswith("\n"):
            raise InputError(f"takes more than {MAX_SECONDS:g} s to render, or ends its process")
        content = json.loads(answer)
        if "error" in content:
            raise InputError(content["error"])
        text: str = content["text"]
        return text

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


def _environment() -> dict[str, str]:
    """Return the environment of the process: where modules are, and the hours of the day."""
    known = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return known | {name: os.environ[name] for name in _KEPT if name in os.environ}


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
