"""A jinja2 environment in which an untrusted template can neither escape nor run away.

On top of jinja2's immutable sandbox, every loop iteration, macro, call, filter and operator checks
a deadline, and no single step can take long: an operation whose result could be huge is bounded
before it runs, and values are bounded in size and depth. No signals and no tracing, so it works in
any thread. Syntax and filters are those of Hugging Face's chat templates (transformers,
``chat_template_utils.py``).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, Final

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mlxrun.text import growth
from mlxrun.text.extent import LimitError, Measures, Once, check_size

__all__ = ["RefusalError", "Sandbox"]

_KEEP: Final = "a value made"
"""Name of the filter that measures the values of literals and comparisons."""

_MAX_MADE: Final = 1_000_000_000
"""Bytes of all values that one rendering makes."""

_MAX_DATE_FORMAT: Final = 1_000
"""Characters of a date format."""


class RefusalError(Exception):
    """The template called ``raise_exception``; the message is its own."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; several threads may render at once.

    Args:
        seconds: time limit of a rendering.
        characters: output limit of a rendering, output into variables included.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, seconds: float, characters: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=self.printed,
            optimized=False,  # constants are computed under the clock, too
        )
        self._seconds = seconds
        self._characters = characters
        self._state = threading.local()
        self.filters["tojson"] = _tojson
        self.filters = {
            name: growth.sized(filter_, self.keep) for name, filter_ in self.filters.items()
        }
        self.filters[_KEEP] = self.keep
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace
        )

    def start(self) -> None:
        """Begin a rendering in this thread."""
        self._state.deadline = time.monotonic() + self._seconds
        self._state.printed = 0
        self._state.made = 0
        self._state.measures = Measures()

    def tick(self, characters: int = 0) -> str:
        """Check time, and output with so many more characters; prints nothing."""
        state = self._state
        if time.monotonic() > getattr(state, "deadline", float("inf")):
            raise LimitError(f"takes longer than {self._seconds:g} seconds")
        state.printed = getattr(state, "printed", 0) + characters
        if state.printed > self._characters:
            raise LimitError(f"prints more than {self._characters} characters")
        return ""

    def keep(self, value: Any) -> Any:
        """Measure a new value; iterators are exhausted into lists."""
        self.tick()
        if isinstance(value, str | list | tuple | dict):
            self._state.made += sys.getsizeof(value)
            if self._state.made > _MAX_MADE:
                raise LimitError(f"makes values of more than {_MAX_MADE} bytes in all")
        if isinstance(value, str):
            return value
        if isinstance(value, int):
            growth.check_bits(value.bit_length())
        elif isinstance(value, Iterator) and not isinstance(value, Once | LoopContext):
            value = Once(self._listed(value))
        self._state.measures.of(value)
        return value

    def _listed(self, items: Iterable[Any]) -> list[Any]:
        """The items of a lazy filter: nested iterators would overflow Python's stack."""
        found = []
        size = 0
        for item in items:
            self.tick()
            size += 1 + self._state.measures.of(item).size
            check_size(size)
            found.append(item)
        return found

    @pass_context  # so that jinja2 does not print constants while it compiles
    def printed(self, context: Any, value: Any) -> Any:
        """Measure a value that is printed."""
        self._state.measures.of(value)
        if isinstance(value, str):
            self.tick(len(value))
        return value

    def joined(self, *parts: Any) -> str:
        """The operator ``~``."""
        texts = [str(part) for part in parts]
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        check_size(sum(self._state.measures.of(v).size for v in (*args, *kwargs.values())))
        growth.check_method(obj, args, kwargs)
        return self.keep(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        growth.check_operation(operator, left, right)
        return self.keep(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()  # the key may be slow to hash
        return super().getitem(obj, argument)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _instrument(super()._parse(source, name, filename))


class _GenerationTag(Extension):
    """``{% generation %}``: marks the assistant's text for training; prints its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the block by its body, in a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=line)]


class _Namespace(Namespace):
    """``namespace()`` that keeps out of Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"the name {name!r} cannot be set on a namespace")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # it may hold itself, or another many times


def _instrument(template: nodes.Template) -> nodes.Template:
    """Insert the checks into loops, macros, ``~`` and literals."""
    for node in list(template.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        size = sum(len(data.data) for child in node.body for data in _texts(child))
        node.body.insert(0, nodes.ExprStmt(_call("tick", [nodes.Const(size)]), lineno=node.lineno))
    _replace(template)
    return template


def _texts(node: nodes.Node) -> list[nodes.TemplateData]:
    found = list(node.find_all(nodes.TemplateData))
    return [*found, node] if isinstance(node, nodes.TemplateData) else found


def _replace(node: nodes.Node) -> None:
    """Wrap the expressions below a node, inner ones first."""
    for child in node.iter_child_nodes():
        _replace(child)
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_checked(item) for item in value]
        elif isinstance(value, nodes.Expr):
            setattr(node, field, _checked(value))


def _checked(node: Any) -> Any:
    match node:
        case nodes.Concat():
            return _call("joined", node.nodes)
        case nodes.Tuple(ctx="store"):
            return node
        case (
            nodes.List()
            | nodes.Tuple()
            | nodes.Dict()
            | nodes.Compare()
            | nodes.Test()
            | nodes.Getitem(arg=nodes.Slice())
        ):
            return nodes.Filter(node, _KEEP, [], [], None, None, lineno=node.lineno)
    return node


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """A call of the environment's own method, which a template cannot rename."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _raise_exception(message: object) -> None:
    raise RefusalError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_DATE_FORMAT:
        raise LimitError(f"formats a date by more than {_MAX_DATE_FORMAT} characters")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
