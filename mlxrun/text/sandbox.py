"""A jinja2 environment in which a template of unknown origin can neither escape nor run away.

On top of jinja2's immutable sandbox every turn of a loop, every macro and every call looks at a
deadline, and what could make something huge out of something small is checked before it runs. It
works in any thread: there are no signals and no tracing. Syntax and filters are those that Hugging
Face's chat templates are written for (transformers, ``chat_template_utils.py``).
"""

from __future__ import annotations

import json
import threading
import time
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mlxrun.text import growth

__all__ = ["RefusalError", "Sandbox"]


class RefusalError(Exception):
    """The template called ``raise_exception``; the message is its own."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; several threads may render at once.

    Args:
        seconds: how long one rendering may take.
        characters: how much one rendering may print, counting what it prints into variables.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, seconds: float, characters: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=self.printed,
        )
        self._seconds = seconds
        self._characters = characters
        self._state = threading.local()
        self.filters["tojson"] = _tojson
        self.filters = {name: growth.sized(filter_) for name, filter_ in self.filters.items()}
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace
        )

    def start(self) -> None:
        """Begin a rendering in this thread."""
        self._state.deadline = time.monotonic() + self._seconds
        self._state.printed = 0

    def tick(self, characters: int = 0) -> str:
        """Check time and output, with that many characters more; prints nothing."""
        state = self._state
        if time.monotonic() > getattr(state, "deadline", float("inf")):
            raise growth.LimitError(f"takes longer than {self._seconds:g} seconds")
        state.printed = getattr(state, "printed", 0) + characters
        if state.printed > self._characters:
            raise growth.LimitError(f"prints more than {self._characters} characters")
        return ""

    def printed(self, value: Any) -> Any:
        """A value on its way to the output."""
        growth.check_nesting(value)
        if isinstance(value, str):
            self.tick(len(value))
        return value

    def joined(self, *parts: Any) -> str:
        """The operator ``~``."""
        for part in parts:
            growth.check_nesting(part)
        texts = [str(part) for part in parts]
        growth.check_size(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call something from a template."""
        self.tick()
        growth.check_method(obj, args, kwargs)
        return super().call(context, obj, *map(growth.counted, args), **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator that could make something huge."""
        growth.check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

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


def _instrument(template: nodes.Template) -> nodes.Template:
    """Make loops and macros tick, and ``~`` a call that checks sizes."""
    for node in list(template.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        size = sum(len(data.data) for child in node.body for data in _texts(child))
        node.body.insert(0, nodes.ExprStmt(_call("tick", [nodes.Const(size)]), lineno=node.lineno))
    _replace_concat(template)
    return template


def _texts(node: nodes.Node) -> list[nodes.TemplateData]:
    found = list(node.find_all(nodes.TemplateData))
    return [*found, node] if isinstance(node, nodes.TemplateData) else found


def _replace_concat(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Concat):
            setattr(node, field, _call("joined", value.nodes))
        elif isinstance(value, list):
            value[:] = [
                _call("joined", item.nodes) if isinstance(item, nodes.Concat) else item
                for item in value
            ]
    for child in node.iter_child_nodes():
        _replace_concat(child)


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """A call of one of the environment's own methods, which a template cannot rename."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _raise_exception(message: object) -> None:
    raise RefusalError(str(message))


def _strftime_now(format: str) -> str:
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
