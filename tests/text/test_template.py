"""Chat templates: what real ones need works as in transformers; what hostile ones try ends in an error, soon and small."""

# ruff: noqa: E501 - templates are long lines

from __future__ import annotations

import resource
import sys
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lamina.errors import CheckpointError, LaminaError
from lamina.text.template import ChatTemplate

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are "
    "helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = \
messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(\
'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and \
system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + \
content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}\
{% endif %}{% endfor %}"""
# In the manner of Qwen 3: namespace, a backwards slice, tool calls, thinking, macros, loop controls, generation marks.
TOOLS = """\
{%- macro fence(text, mark='`') -%}{{ mark * 3 }}{{ text }}{{ mark * 3 }}{%- endmacro -%}
{%- set ns = namespace(last=0, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" %}{% set ns.found = true %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- if tools %}
# Tools
{%- for tool in tools %}
{{ tool | tojson }} {{ tool.function.parameters.properties | dictsort | map(attribute=0) | join(', ') }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- generation %}{{ '<a>' ~ content | trim ~ '|' ~ reasoning }}{% endgeneration %}
        {%- for call in message.tool_calls or [] %}
{{ fence(call.function.name) }}{{ call.function.arguments | tojson(indent=2) }}
        {%- endfor %}
    {%- else %}
<{{ message.role | upper }}{{ loop.index }}{{ '!' if loop.last else ',' }}>{{ content | replace('a', 'b') | indent(2) }}
    {%- endif %}
{%- endfor %}
{{ "%s and %d" % (ns.last, 7) }} {{ "{} {}".format(1, 'x') }} {{ [1, 2, 3] | sum if false else 3 | string }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ undefined_name is defined }}
{{ dict(a=1).items() | list }} {{ messages | map(attribute='role') | unique | join('-') }} {{ (7 / 2) | round(1) }}
{%- if add_generation_prompt %}<a>{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "Be brief.\nAnd kind."},
    {"role": "user", "content": " What is <b>this</b> & that? 'quoted' é "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is."},
    {"role": "user", "content": "again"},
]
CALL = {"function": {"name": "look", "arguments": {"where": "Köln", "n": [1, 2.5, None, True]}}}
TOOL = {"function": {"name": "look", "parameters": {"properties": {"where": {}, "n": {"type": "array"}}}}}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", [CHATML, LLAMA2, TOOLS], ids=["chatml", "llama 2", "tools"])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
def test_equals_transformers(source: str, prompt: bool, tools: list | None):
    messages = list(MESSAGES)
    if source is TOOLS:
        messages += [{"role": "skip"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
        messages += [{"role": "assistant", "content": "x", "reasoning": "why"}]
    ours = ChatTemplate(source).render(messages, tools=tools, add_generation_prompt=prompt, **NAMES)
    theirs, _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=prompt, **NAMES
    )
    assert ours == theirs[0]


def test_is_quick():
    template = ChatTemplate(TOOLS)
    template.render(MESSAGES, add_generation_prompt=True)
    begun = time.process_time()
    for _ in range(10):
        template.render(MESSAGES * 5, add_generation_prompt=True)
    assert (time.process_time() - begun) / 10 < 0.02  # twice what is asked


def test_long_conversations_are_not_refused():
    messages = [{"role": "user", "content": "x" * 20_000}, {"role": "assistant", "content": "y" * 20_000}] * 100
    text = ChatTemplate(CHATML).render(messages, add_generation_prompt=True)
    assert len(text) > 4_000_000


DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = OP %}{% endfor %}{{ ns.x|length }}"
HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops that filter": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops over messages": "{% for a in messages %}{% for b in 'x' * 99999 %}{% for c in 'x' * 99999 %}{% endfor %}{% endfor %}{% endfor %}",
    "times": "{{ 'a' * 3000000000 }}",
    "times a list": "{{ ([0] * 3000000000)|length }}",
    "times from the right": "{{ 3000000000 * 'a' }}",
    "times in a set": "{% set x = 'a' * 1000000 %}{% set y = x * 1000000 %}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "power of power": "{{ (9 ** 60) ** 60 ** 60 }}",
    "negative power": "{{ 2.0 ** 99999 }}",
    "number": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "percent": "{{ '%3000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (3000000000, 1) }}",
    "format": "{{ '{:>3000000000}'.format(1) }}",
    "format nested": "{{ '{:>{}}'.format(1, 3000000000) }}",
    "format many": "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "center": "{{ 'a'.center(3000000000) }}",
    "center filter": "{{ 'a'|center(3000000000) }}",
    "ljust": "{{ 'a'.ljust(3000000000) }}",
    "zfill": "{{ 'a'.zfill(3000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(3000000000) }}",
    "indent": "{{ ('a\n' * 10000)|indent(3000000) }}",
    "round": "{{ 1.5|round(3000000000, 'ceil') }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "cycler": "{{ cycler('a') }}",
    "joiner": "{{ joiner('a') }}",
    "range": "{{ range(3000000000)|list }}",
    "ranges": "{{ range(99999)|map('string')|map('center', 99999)|list }}",
    "map of a large default": "{% set x = 'a' * 1000000 %}{{ range(99999)|map(attribute='y', default=x)|map('upper')|list }}",
    "join": "{{ ('a' * 1000000).join(range(99999)|map('string')) }}",
    "join filter": "{{ range(99999)|join('a' * 1000000) }}",
    "join of one large value": "{% set x = 'a' * 1000000 %}{{ range(99999)|map(attribute='y', default=x)|join }}",
    "replace": "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "replace method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace nothing": "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "doubling": DOUBLING.replace("OP", "ns.x ~ ns.x"),
    "doubling by plus": DOUBLING.replace("OP", "ns.x + ns.x"),
    "doubling by join": DOUBLING.replace("OP", "[ns.x, ns.x]|join"),
    "doubling by format": DOUBLING.replace("OP", "'%s%s' % (ns.x, ns.x)"),
    "doubling by a list": DOUBLING.replace("OP", "[ns.x, ns.x]"),
    "doubling by a dict": DOUBLING.replace("OP", "{'a': ns.x, 'b': ns.x}"),
    "doubling by a call of dict": DOUBLING.replace("OP", "dict(a=ns.x, b=ns.x)"),
    "doubling a list": DOUBLING.replace("'ab'", "[1]").replace("OP", "ns.x + ns.x"),
    "doubling by tojson": DOUBLING.replace("OP", "[ns.x, ns.x]|tojson"),
    "doubling by capture": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling by a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set x = 'ab' %}" + "{% set x = m(x) %}" * 60,
    "many large values": "{% set x = 'a' * 1000000 %}" + "".join(f"{{% set x{i} = x ~ {i} %}}" for i in range(2000)),
    "large output": "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "wide concatenation": "{% set x = 'a' * 1000000 %}{{ x" + " ~ x" * 5000 + " }}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "recursion that branches": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "backwards search": "{% for i in range(9999) %}{% if ('ab' * 400000).rfind('b' ~ 'ab' * 100000) %}{% endif %}{% endfor %}",
    "deep value": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "tojson indent": "{{ [[[[1]]]]|tojson(indent=3000000000) }}",
    "strftime": "{{ strftime_now('%3000000000d') }}",
    "batch": "{{ [1]|batch(3000000000, 1)|list }}",
    "slice": "{{ [1]|slice(3000000000)|list }}",
    "sum of lists": "{{ ([[0]] * 99999)|sum(start=[])|length }}",
    "urlize": "{{ ('http://a' * 9999)|urlize }}",
    "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "brackets": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "nested blocks": "{% for a in messages %}" * 200 + "{% endfor %}" * 200,
    "long": "x" * 65537,
    "syntax": "{% for %}",
    "unknown tag": "{% include 'x' %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "class by subscript": "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "globals": "{{ raise_exception.__globals__.sys }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "namespace of an environment": "{% set ns = namespace(__class__=1) %}",
    "underscore in a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "mutation": "{{ messages.append(1) }}",
    "attr": "{{ ''|attr('__class__') }}",
    "map attribute": "{{ ['']|map(attribute='__class__')|list }}{% if ['']|map(attribute='__class__')|first %}{{ 1/0 }}{% endif %}{{ raise_exception('safe') }}",
}  # fmt: skip


def most_memory() -> int:
    """Bytes this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.text.sandbox.SECONDS", 0.1)  # of the second that it has
    before, begun = most_memory(), time.process_time()
    with pytest.raises(LaminaError) as caught:
        ChatTemplate(HOSTILE[name]).render(MESSAGES, add_generation_prompt=True)
    assert time.process_time() - begun < 1.5  # compiling included; other processes do not count
    assert most_memory() - before < 400e6
    assert len(str(caught.value)) < 600


def test_errors_name_the_cause():
    with pytest.raises(LaminaError, match="chat template: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(MESSAGES)
    with pytest.raises(CheckpointError, match=r"m/x: line 2: .*unknown tag 'fro'"):
        ChatTemplate("\n{% fro x in y %}", "m/x").render(MESSAGES)
    with pytest.raises(LaminaError, match="fails on these messages: TypeError"):
        ChatTemplate("{{ 'a' + messages[0].missing }}{{ 1 + 'x' }}").render([{"role": "user", "missing": 1}])
    with pytest.raises(LaminaError, match=r"messages.content: a bytes; texts, numbers, lists and dicts"):
        ChatTemplate("x").render([{"role": "user", "content": b"x"}])
    with pytest.raises(LaminaError, match="messages: a str; each message is a dict"):
        ChatTemplate("x").render(["hello"])
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(LaminaError, match="more than 32 levels"):
        ChatTemplate("x").render([{"role": "user", "content": deep}])


def test_the_next_render_is_unharmed():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate("{% if messages|length > 2 %}" + loops + "{% endif %}ok")
    with pytest.raises(LaminaError, match="runs for longer than 1 s"):
        template.render(MESSAGES)
    assert template.render(MESSAGES[:1]) == "ok"


def test_large_values_add_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.text.sandbox.SECONDS", 60.0)
    monkeypatch.setattr("lamina.text.sandbox.TRAIL", 1 << 23)
    source = "{% set x = 'a' * 1000000 %}" + "".join(f"{{% set x{i} = x ~ {i} %}}" for i in range(20))
    with pytest.raises(CheckpointError, match="it makes too many large values"):
        ChatTemplate(source).render(MESSAGES)
