"""Templates whose single steps would hang, crash or fill the memory: each is refused soon."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runaway import refusal

from mlxrun.tokenizer import ChatTemplate
from mlxrun.tokenizer.sandbox import Extent, LimitError, Measures


def render(source: str) -> str:
    return ChatTemplate(source, max_seconds=0.5).render([{"role": "user", "content": "hi"}])


def grown(step: str, end: str, first: str = "[1]", turns: int = 50_000) -> str:
    """A template that sets ``ns.x`` to ``step`` many times, and then prints ``end``."""
    return (
        f"{{% set ns = namespace(x={first}, y={first}) %}}{{% for i in range({turns}) %}}"
        f"{{% set ns.x = {step} %}}{{% set ns.y = {step.replace('ns.x', 'ns.y')} %}}{{% endfor %}}"
        f"{{{{ {end} }}}}"
    )


SHARED = [
    *(
        grown("[ns.x, ns.x]", end, turns=60)
        for end in ("ns.x == ns.y", "ns.x < ns.y", "ns.x in [ns.y]", "ns.x is eq(ns.y)")
    ),
    grown("(ns.x, ns.x)", "{ns.x: 1} | length", first="1", turns=60),
    grown("{1: ns.x, 2: ns.x}", "ns.x == ns.y", turns=60),
    grown("cycler(ns.x, ns.x).items", "ns.x == ns.y", turns=60),
    grown("{}.fromkeys([1, 2], ns.x)", "ns.x == ns.y", turns=60),
    grown("[ns.x, ns.x] | map('list') | list", "ns.x == ns.y", turns=60),
    "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}"
    "{{ varargs == varargs }}{% endif %}{% endmacro %}{{ f(60) }}",
]

DEEP = [
    grown("ns.x | batch(1)", "ns.x | list"),
    grown("[ns.x] | map('list')", "ns.x | list"),
    grown("[ns.x] | batch(1)", "ns.x | list"),
    grown("{1: ns.x}.items()", "ns.x | list"),
    grown("(" * 11 + "ns.x" + ",)" * 11, "{ns.x: 1} | length", first="1"),
]

SINGLE = [
    "{{ ('\\t' * 30000).expandtabs(100000) | length }}",
    "{{ ('a ' * 200000) | wordwrap(10, wrapstring='x' * 100000) | length }}",
    "{{ ('a' * 3000000) | wordwrap(1) | length }}",
    "{{ ('a\\n' * 100000) | indent('x' * 100000) }}",
    "{{ ([[1, 2, 3, 4]] * 100000) | sum(start=[]) | length }}",
    "{{ strftime_now('%c' * 1900000) | length }}",
    "{{ ('<!---->' * 500000) | striptags }}",
    "{{ ('a' * 4000000).rfind('b' + 'a' * 2000000) }}",
    "{{ ('a' * 4000000) | trim('b' * 4000000) }}",
    "{{ [[[[1] * 1000] * 100]] | tojson(indent=100000) }}",
    "{{ 10 ** 1000000 // 7 ** 500000 }}",
    "{{ ('{0:>99999}' * 40000).format(1) | length }}",
    "{{ ('{0:>99999}' * 40000).format_map({'0': 1}) | length }}",
    "{{ ('%.99999f' * 4000) | format(*([1.5] * 4000)) | length }}",
    "{{ ('\\t' * 40000).encode().expandtabs(100000) | length }}",
    "{{ (2).to_bytes(1000000000) | length }}",
    "{{ 1.5 | round(1000000000000, 'floor') }}",
    "{{ ([1] * 1000000) | select('in', [2] * 1000000) | list }}",
    "{{ {'a': [1] * 1000} | tojson(indent=1000000000000) }}",
]

MANY = [
    "{% set ns = namespace(x=none) %}{% for i in range(99999) %}"
    "{% set ns.x = namespace(before=ns.x, text='a' * 3900000) %}{% endfor %}",
    "{% set a = [[1] * 999] * 999 %}{% set b = [[1] * 999] * 999 %}" + "{{ a == b }}" * 9000,
    "{% set a = 'a' * 4000000 %}" + "{% set b = a | upper %}" * 5000,
    "{% set a = [1] * 1900000 %}" + "{% set b = a[:] %}" * 5000,
    "{% for i in range(99999) %}{% for j in range(99) %}{{ 'a' | center(90000) }}"
    "{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", SHARED + DEEP + SINGLE + MANY)
def test_no_step_of_a_template_takes_long(source: str) -> None:
    assert "fails" not in str(refusal(render, source)), "refused by a limit, not by an accident"


def test_lazy_filters_give_iterators() -> None:
    odd = "{% set x = [1, 2, 3] | select('odd') %}"
    assert render(odd + "{% for i in x %}{{ i }}{% endfor %}{{ x | list }}") == "13[]"
    assert render("{{ 'yes' if [] | select else 'no' }}") == "yes"
    assert render("{{ [1, 2] | map('string') | reverse | join('-') }}") == "2-1"
    assert render("{% for a, b in {1: 2}.items() %}{{ a }}{{ b }}{% endfor %}") == "12"


def test_namespaces_may_hold_each_other() -> None:
    assert render("{% set a = namespace() %}{% set a.b = a %}{{ a.b.b }}") == "<Namespace>"


values = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


def tree(value: Any) -> Extent:
    """The extent, counted without a memo."""
    if isinstance(value, str):
        return Extent(len(value), 0)
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list | tuple):
        return Extent(1, 0)
    parts = [tree(item) for item in value]
    return Extent(
        sum(1 + part.size for part in parts), 1 + max((part.depth for part in parts), default=0)
    )


@given(st.lists(values, max_size=4))
def test_a_value_is_measured_as_a_tree(made: list[Any]) -> None:
    measures = Measures()
    for value in (*made, [made, made], *made):
        assert measures.of(value) == tree(value)


def test_sharing_does_not_hide_size_or_depth() -> None:
    measures = Measures()
    wide: list[Any] = []
    with pytest.raises(LimitError, match="more than 4000000"):
        for _ in range(60):
            wide = [wide, wide]
            measures.of(wide)
    deep: tuple[Any, ...] = ()
    with pytest.raises(LimitError, match="deep"):
        for _ in range(200):
            deep = (deep,)
            measures.of(deep)
