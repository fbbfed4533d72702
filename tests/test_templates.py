import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest

from dpo.errors import InputError
from dpo.preferences import JSON, Message
from dpo.template_process import MAX_CHARACTERS
from dpo.templates import CHATML, ChatTemplate
from dpo.tokenizer import Tokenizer, byte_tokenizer

# Templates in the manner of well-known models, each in its own words.
HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|header|>' ~ message.role ~ '<|/header|>\\n\\n' ~ message.content | trim ~ '<|turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}
"""
ALTERNATING = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate: user, assistant, user, ...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TOOLS = """\
{%- if tools %}
{{ '<|im_start|>system' }}
You may call:
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
{{ tools[0] | tojson(indent=2) }}<|im_end|>
{% endif %}
{% for message in messages %}
<|im_start|>{{ message.role }}{{ '' if 'name' in message else ' unnamed' }}
    {% if message.tool_calls is defined %}
{% for call in message.tool_calls %}
<call>{{ call.function | tojson }}</call>
{% endfor %}
{% else %}
{{ message.content }}
{% endif %}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CONTROLS = """\
{%- set found = namespace(first=none) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if found.first is none -%}{%- set found.first = message.content -%}{%- endif -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{ message.content ~ eos_token }}{%- endgeneration -%}
        {%- break -%}
    {%- endif -%}
    {{ '<' ~ message.role | upper ~ '>' ~ message.content }}
{%- endfor -%}
{{ found.first[:3] }} {{ messages | length }} {{ messages | map(attribute='role') | join(',') }}"""

TALK: Sequence[Message] = (
    {"role": "user", "content": " What is <2+2> & 'x'? é\n"},
    {"role": "assistant", "content": "4 "},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes.", "name": None},
)
WITH_SYSTEM: Sequence[Message] = ({"role": "system", "content": "Be brief."}, *TALK)
TOOL: JSON = {
    "type": "function",
    "function": {"name": "add", "description": "Adds <a> & b, é", "parameters": {"type": "object"}},
}
CALLING: Sequence[Message] = (
    {"role": "user", "content": "2+2?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
    },
    {"role": "tool", "content": "4", "name": "add"},
    {"role": "assistant", "content": "It is 4."},
)
SOURCES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "alternating": ALTERNATING,
    "tools": TOOLS,
    "controls": CONTROLS,
}


def make_tokenizer(source: str) -> Tokenizer:
    return byte_tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>", chat_template=source)


def make_template(source: str) -> ChatTemplate:
    return ChatTemplate(source, name="mine", variables={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_text_equals_that_of_transformers(
    name: str, add_generation_prompt: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(SOURCES[name]).save(folder)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    template = make_template(SOURCES[name])
    conversations: list[tuple[Sequence[Message], list[JSON] | None]] = [
        (TALK, None),
        (TALK[:1], None),
        (WITH_SYSTEM, None),
    ]
    if name == "tools":
        conversations += [(CALLING, [TOOL, TOOL]), (CALLING[:3], [TOOL])]

    for messages, tools in conversations:
        expected = oracle.apply_chat_template(
            list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        assert (
            template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
            == expected
        )


@pytest.mark.parametrize("name", ["chatml", "alternating"])
def test_text_to_continue_equals_that_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    make_tokenizer(SOURCES[name]).save(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)

    expected = oracle.apply_chat_template(
        list(TALK[:2]), tokenize=False, continue_final_message=True
    )

    assert make_template(SOURCES[name]).render_to_continue(TALK[:2]) == expected
    assert expected.endswith("4 ")


def test_chatml_joins_text_parts() -> None:
    parts: Message = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    assert make_template(CHATML).render([parts]) == "<|im_start|>user\nab<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "tools", "what"), [(TALK, [TOOL], "tools"), (CALLING, None, "tool calls")]
)
def test_chatml_leaves_nothing_out_silently(
    messages: Sequence[Message], tools: list[JSON] | None, what: str
) -> None:
    with pytest.raises(InputError, match=f"ChatML has no place for {what}"):
        make_template(CHATML).render(messages, tools=tools)


def test_date_of_today_is_at_hand() -> None:
    text = make_template("{{ strftime_now('%Y') }}").render(TALK)
    assert abs(int(text) - datetime.now().year) <= 1


def test_markup_of_generation_changes_nothing() -> None:
    marked = "a{% generation %}b{% set x = 1 %}{% endgeneration %}c{{ x }}"
    assert make_template(marked).render(TALK) == "abc"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("{{ raise_exception('no such role') }}", "mine: no such role"),
        ("{{ messages[0].content + 1 }}", "mine: can only concatenate str"),
        ("{{ missing.name }}", "mine: 'missing' is undefined"),
        ("{{ 1 // 0 }}", "mine: integer division or modulo by zero"),
        (
            "{{ messages.append(1) }}",
            "mine: access to attribute 'append' of 'list' object is unsafe",
        ),
        ("{{ ''.__class__.__mro__ }}", "mine: access to attribute '__class__' of 'str' object is"),
        ("{{ range(1000000000) }}", "mine: Range too big"),
    ],
)
def test_failing_template_is_named(source: str, fault: str) -> None:
    with pytest.raises(InputError, match=re.escape(fault)):
        make_template(source).render(TALK)


def test_output_is_bounded() -> None:
    row = "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}"
    source = "{% for i in range(99999) %}" + row + "{% endfor %}"
    with pytest.raises(InputError, match=f"mine: writes more than {MAX_CHARACTERS} characters"):
        make_template(source).render(TALK)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% generation %}", "{{ 1 | none_such }}"])
def test_invalid_template_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="mine: not a valid template: "):
        make_template(source)


def test_message_that_is_no_text_cannot_be_continued() -> None:
    with pytest.raises(InputError, match="is to be continued, but is not text"):
        make_template(CHATML).render_to_continue([{"role": "assistant", "content": []}])


def test_message_that_the_template_leaves_out_cannot_be_continued() -> None:
    with pytest.raises(InputError, match="mine: does not write the message to be continued"):
        make_template("nothing").render_to_continue(TALK)
