"""Chat templates: the same output as transformers', and templates that misbehave."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from runaway import refusal

from mlxrun.errors import TemplateError
from mlxrun.tokenizer import ChatTemplate

CALL = {"name": "weather", "arguments": {"city": "Paris", "days": 2}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello <b>&amp; 'you'</b>", "thinking": "hm"},
        {"role": "user", "content": "  ünï 🦙\n\n x "},
    ],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}],
        },
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"t": 20}'},
        {"role": "assistant", "content": "<think>a</think>20"},
        {"role": "user", "content": "thanks"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "2"}]}],
]
SCHEMA = {
    "name": "weather",
    "description": "Weather <of> a città",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "where"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": SCHEMA}]


def test_same_as_transformers(oracle: Path) -> None:
    """Wherever transformers renders, the text is equal; where it fails, so do we, but for a system
    message that the template refuses."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    compared = 0
    for path in sorted((oracle / "templates").glob("*.jinja")):
        source = path.read_text("utf-8")
        template = ChatTemplate(source, "<s>", "</s>")

        def rendered(messages: list[dict[str, Any]], tools: Any, source: str = source) -> str:
            (text,), _ = utils.render_jinja_template(
                [messages],
                tools=tools,
                chat_template=source,
                add_generation_prompt=tools is None,
                bos_token="<s>",
                eos_token="</s>",
            )
            return str(text)

        for messages in CONVERSATIONS:
            for tools in (None, TOOLS):
                try:
                    expected = rendered(messages, tools)
                    if messages == CONVERSATIONS[-1] and (
                        "one" not in expected or re.search("['\"]one['\"]", expected)
                    ):  # the text is lost, or the list is printed as it is
                        expected = rendered([{"role": "user", "content": "one\n2"}], tools)
                except Exception:
                    continue
                found = template.render(messages, tools is None, tools)
                assert found == expected, path.name
                compared += 1
    assert compared > 200


def render(source: str, messages: list[dict[str, Any]] | None = None, **more: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>", max_seconds=0.5).render(messages or [], **more)


def test_variables_and_tags() -> None:
    assert render("{{ bos_token }}{{ x }}{{ eos_token }}", x=1) == "<s>1</s>"
    assert render("{% generation %}a{% endgeneration %}") == "a"
    assert (
        render("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert render("{{ {'b': '<ü>', 'a': 1} | tojson }}") == '{"b": "<ü>", "a": 1}'
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{{ 'a' ~ 1 ~ none ~ missing }}") == "a1None"


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
)


def test_a_refused_system_message_joins_the_first_user_message() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert render(GEMMA, messages) == "user:Be kind.\n\nHi;"
    with pytest.raises(TemplateError, match="refuses: no system"):
        render(GEMMA, messages[:1])


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "2"}]
FOR_PARTS = "{% for p in m.content %}<{{ p.text }}>{% endfor %}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{{ m.content }}", "one\n2"),
        ("{{ 'user: ' + m.content }}", "user: one\n2"),
        ("{{ m.content | trim }}", "one\n2"),
        ("{{ m.content | tojson }}", '"one\\n2"'),
        ("{{ m['content'].strip() }}", "one\n2"),
        (FOR_PARTS, "<one><2>"),
        ("{% if m.content is string %}{{ m.content }}{% else %}" + FOR_PARTS + "{% endif %}",
         "<one><2>"),
        ("{{ raise_exception('no') if messages | length == 1 else m.content }}", "one\n2x"),
    ],
)  # fmt: skip
def test_text_parts_are_joined_where_a_string_is_printed(content: str, expected: str) -> None:
    source = "{% for m in messages %}" + content + "{% endfor %}"
    messages = [{"role": "user", "content": PARTS}]
    if expected.endswith("x"):
        messages.append({"role": "assistant", "content": "x"})
    assert render(source, messages) == expected


def test_other_parts_are_left_to_the_template() -> None:
    image = {"role": "user", "content": [{"type": "image"}, *PARTS]}
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.type }} {% endfor %}{% endfor %}"
    assert render(parts, [image]) == "image text text "


DOUBLE = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}"
    "{{ ns.x }}"
)
TWICE = "{%% for i in range(99999) %%}{%% for j in range(999) %%}%s{%% endfor %%}{%% endfor %%}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        DOUBLE % ("'a'", "ns.x + ns.x"),
        DOUBLE % ("'a'", "ns.x ~ ns.x"),
        DOUBLE % ("[]", "[ns.x, ns.x]"),
        TWICE % ("x" * 999),
        "{% set x %}" + TWICE % ("x" * 999) + "{% endset %}",
        "{{ 'a' * 10**9 }}",
        "{{ [0] * 10**9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**10) }}",
        "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
        "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
        "{{ ('a' * 10**6).join(['b'] * 10**6) }}",
        "{{ [1] | batch(10**10, 0) | list }}",
        "{{ range(10**10) | list }}",
        "{{ range(100000) | join('a' * 10000) }}",
        "{{ range(100000) | map('string') | join('a' * 10000) }}",
        "{{ ('a' * 10000).join(range(100000) | map('string')) }}",
        "{{ ([('a' * 10**6)] * 10**4) | map('upper') | list | length }}",
        "{{ ''.join(([('a' * 10**6)] * 10**4) | map('upper')) | length }}",
    ],
)  # fmt: skip
def test_a_template_that_runs_away_is_stopped(source: str) -> None:
    """In any thread, and within a few times its limit."""
    assert "\n" not in str(refusal(render, source))


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{", "{% for x in y %}", "{% unknown %}", "{{ 1 +* 2 }}", "{{ x | nofilter }}"],
)
def test_a_template_that_does_not_parse(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


def test_deep_nesting() -> None:
    for source in ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "{% if 1 %}" * 3000, "{{ -" * 9000):
        with pytest.raises(TemplateError):
            ChatTemplate(source)


def test_a_template_that_is_too_long() -> None:
    with pytest.raises(TemplateError, match="256000"):
        ChatTemplate("x" * 300_000)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.encode }}{{ {}.fromkeys }}{{ (1).to_bytes }}{{ [].extend }}",
        "{{ missing.x.y }}",
        "{{ 1 / 0 }}",
        "{{ cycler.__init__.__globals__ }}{{ namespace.__init__.__globals__.os }}",
    ],
)
def test_templates_that_fail_or_reach_out(source: str) -> None:
    try:
        text = render(source)
    except TemplateError as reason:
        assert "\n" not in str(reason)
    else:
        assert text == ""  # jinja2 hides what is unsafe as undefined


def test_messages_that_are_none() -> None:
    with pytest.raises(TemplateError, match="must be a mapping"):
        render("{{ messages }}", ["hello"])  # type: ignore[list-item]
