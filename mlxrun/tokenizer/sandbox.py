"""A jinja2 environment in which an untrusted template can neither escape nor run away.

jinja2's immutable sandbox keeps a template from Python's internals. Here every loop iteration,
macro, call, filter and operator also checks a deadline. A single operation cannot be interrupted,
so none may take long: only known methods of built-in types can be called, operations with a result
larger than their operands are checked before they run, and every new value is measured. No signals
and no tracing, so it works in any thread. Syntax and filters are those of Hugging Face's chat
templates (transformers, ``chat_template_utils.py``).
"""

from __future__ import annotations

import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MappingView, Sized
from datetime import datetime
from itertools import chain
from typing import Any, Final, NamedTuple
from typing import cast as typed

from jinja2 import Environment, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["LimitError", "RefusalError", "Sandbox"]

MAX_SIZE: Final = 4_000_000  # characters of a string, or characters and items of a container
MAX_DEPTH: Final = 100  # levels of nesting; Python hashes tuples by unguarded recursion
_MAX_MADE: Final = 1_000_000_000  # bytes of all values of one rendering
_MAX_BITS: Final = 100_000  # of a number; division is quadratic in them
_MAX_NUMBER: Final = 100_000  # the largest count or width
_MAX_COMPARED: Final = 1_000_000_000  # characters that one search may compare
_MAX_CONCATENATED: Final = 10_000  # items of lists that one ``sum`` may add; it is quadratic
_MAX_DATE_FORMAT: Final = 1_000  # characters

# Methods of built-in types that a template may call.
_METHODS: Final[dict[type, frozenset[str]]] = {
    str: frozenset((
        "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index",
        "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower",
        "isnumeric", "isprintable", "isspace", "istitle", "isupper", "join", "ljust", "lower",
        "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
        "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
        "swapcase", "title", "upper", "zfill",
    )),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(),
    float: frozenset(("is_integer",)),
}  # fmt: skip
# Methods and filters with a count or width, and those that search in quadratic time.
_COUNTED: Final = {"batch", "center", "indent", "ljust", "rjust", "round", "truncate", "zfill"}
_SEARCHES: Final = {"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim"}
# Filters of quadratic cost, of no use in a prompt.
_SLOW_FILTERS: Final = ("pprint", "striptags", "urlize", "wordwrap")
# Filters that _Instrument inserts; no template can name them.
_KEEP, _JOINED, _TICK = "a new value", "the operator ~", "a loop or macro"

_CONTAINERS: Final = (list, tuple, dict, MappingView)
_PASSED: Final = (Environment, Context, EvalContext)  # by jinja2, to some filters
_LIST_ITERATOR: Final[type] = type(iter(list[Any]()))
_NUMBER: Final = re.compile(r"\d+")


class RefusalError(Exception):
    """The template called ``raise_exception``; the message is its own."""


class LimitError(Exception):
    """The template exceeds a limit; the message completes "the chat template ..."."""


class Extent(NamedTuple):
    """A value as a tree: characters and items, and levels of nesting."""

    size: int
    depth: int


class Measures:
    """The extents of one rendering's values.

    Comparing, hashing and printing walk a value's whole tree, even if a list that holds one list
    twice costs no memory. Values are immutable, so each is measured once.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Extent]] = {}  # the value too, so that its id stays its

    def of(self, value: Any) -> Extent:
        if isinstance(value, str):
            return Extent(len(value), 0)
        if not isinstance(value, _CONTAINERS):
            return Extent(1, 0)
        if id(value) in self._known:
            return self._known[id(value)][1]
        size = depth = 0
        items: Any = chain(value, value.values()) if isinstance(value, dict) else value
        for item in items:
            extent = self.of(item)
            size += 1 + extent.size
            depth = max(depth, extent.depth)
            check_size(size)
        if depth >= MAX_DEPTH:
            raise LimitError(f"nests values more than {MAX_DEPTH} deep")
        self._known[id(value)] = value, Extent(size, depth + 1)
        return Extent(size, depth + 1)


def check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise LimitError(f"makes a value of more than {MAX_SIZE} characters or items")


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
            finalize=self._printed,
            optimized=False,  # constants are computed under the clock, too
        )
        self._seconds = seconds
        self._characters = characters
        self._state = threading.local()
        filters = {**self.filters, "tojson": self._tojson}
        self.filters = {
            name: self._checked(name, filter_)
            for name, filter_ in filters.items()
            if name not in _SLOW_FILTERS
        }
        self.filters |= {_KEEP: self._keep, _JOINED: self._joined, _TICK: self.tick}
        self.tests = {name: self._checked(name, test) for name, test in self.tests.items()}
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

    def tick(self, characters: int = 0) -> None:
        """Check the time, and the size of the output with so many more characters."""
        if time.monotonic() > self._state.deadline:
            raise LimitError(f"takes longer than {self._seconds:g} seconds")
        self._state.printed += characters
        if self._state.printed > self._characters:
            raise LimitError(f"prints more than {self._characters} characters")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for type_, methods in _METHODS.items():
            if isinstance(obj, type_):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        check_size(sum(self._size(value) for value in (*args, *kwargs.values())))
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str) and method.__name__ == "join" and args:
            args = _listed_arguments(args)
            self._check("join", args[0], [owner])
        elif isinstance(owner, str):
            self._check(method.__name__, owner, [*args, *kwargs.values()])
        return self._keep(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    check_size(len(value) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        return self._keep(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()  # the key may be slow to hash
        return super().getitem(obj, argument)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return typed("nodes.Template", _Instrument().visit(super()._parse(source, name, filename)))

    def _size(self, value: Any) -> int:
        return int(self._state.measures.of(value).size)

    def _keep(self, value: Any) -> Any:
        """Measure a new value; iterators become those of a list."""
        self.tick()
        if isinstance(value, int):
            _check_bits(value.bit_length())
        elif isinstance(value, Iterator) and not isinstance(value, _LIST_ITERATOR | LoopContext):
            return iter(self._listed(value))
        elif isinstance(value, str | list | tuple | dict):
            self._state.made += sys.getsizeof(value)
            if self._state.made > _MAX_MADE:
                raise LimitError(f"makes values of more than {_MAX_MADE} bytes in all")
        check_size(self._size(value))
        return value

    def _listed(self, items: Iterator[Any]) -> list[Any]:
        """The items of a lazy filter: nested iterators would overflow Python's stack."""
        found = []
        size = 0
        for item in items:
            self.tick()
            size += 1 + self._size(item)
            check_size(size)
            found.append(item)
        return found

    @pass_context  # so that jinja2 does not print constants while it compiles
    def _printed(self, context: Any, value: Any) -> Any:
        size = self._size(value)
        if isinstance(value, str):
            self.tick(size)
        return value

    def _joined(self, parts: list[Any]) -> str:
        texts = [str(part) for part in parts]
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def _checked(self, name: str, function: Any) -> Callable[..., Any]:
        """A filter or a test that checks its arguments first and its value afterwards."""

        @functools.wraps(function)  # keeps jinja2's marks of the first argument
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            if name == "join":
                args = _listed_arguments(args)
            value, *options = (v for v in (*args, *kwargs.values()) if not isinstance(v, _PASSED))
            self._check(name, value, options)
            return self._keep(function(*args, **kwargs))

        return checked

    def _check(self, name: str, value: Any, options: list[Any]) -> None:
        """Refuse a filter, or a method of a text, whose result or time outgrows its arguments."""
        if name in _COUNTED:
            _check_numbers(options)
        if name == "join":
            count = len(value) if isinstance(value, Sized) else 0
            check_size(self._size(value) + count * len(str(options[0] if options else "")))
        elif name == "indent":
            width = options[0] if options else 4
            width = len(width) if isinstance(width, str) else width
            check_size(len(str(value).splitlines()) * width)
        elif name == "sum" and any(isinstance(option, list | tuple) for option in options):
            if self._size(value) > _MAX_CONCATENATED:
                raise LimitError(f"concatenates lists of more than {_MAX_CONCATENATED} items")
        elif name in ("format", "format_map"):
            self._check_format(str(value), options)
        elif name == "replace" and len(options) > 1:
            text, old, new = (str(each) for each in (value, *options[:2]))
            check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        elif name in _SEARCHES:
            longest = max((len(option) for option in options if isinstance(option, str)), default=1)
            if self._size(value) * longest > _MAX_COMPARED:
                raise LimitError("searches a long text for a long one")

    def _check_format(self, pattern: str, values: Iterable[Any]) -> None:
        values = list(values)
        widths = _NUMBER.findall(pattern)
        if any(len(width) > 5 for width in widths):
            raise LimitError("formats with a field that is too wide")
        check_size(sum(map(int, widths)))
        if "*" in pattern or "{:{" in pattern:
            _check_numbers(values)
        fields = pattern.count("{") + pattern.count("%")
        check_size(len(pattern) + fields * sum(map(self._size, values)))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if indent is None:  # bounded by the value's size, and in C
            return encoder.encode(value)
        _check_numbers([len(indent) if isinstance(indent, str) else indent])
        return "".join(self._listed(encoder.iterencode(value)))


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


class _Instrument(NodeTransformer):
    """Inserts checks into loops and macros, and around ``~``, literals, comparisons and slices."""

    def _body(self, node: Any) -> Any:
        node = self.generic_visit(node)
        size = sum(len(data.data) for child in node.body for data in _texts(child))
        tick = nodes.ExprStmt(_filter(nodes.Const(size), _TICK), lineno=node.lineno)
        node.body.insert(0, tick)
        return node

    def _new_value(self, node: Any) -> Any:
        return _filter(self.generic_visit(node), _KEEP)

    visit_For = visit_Macro = visit_CallBlock = _body  # noqa: N815
    visit_List = visit_Dict = visit_Compare = _new_value  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> Any:  # noqa: N802
        return self.generic_visit(node) if node.ctx == "store" else self._new_value(node)

    def visit_Getitem(self, node: nodes.Getitem) -> Any:  # noqa: N802
        sliced = isinstance(node.arg, nodes.Slice)
        return self._new_value(node) if sliced else self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> Any:  # noqa: N802
        parts = self.generic_visit(node).nodes  # type: ignore[attr-defined]
        return _filter(nodes.List(parts, lineno=node.lineno), _JOINED)


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _texts(node: nodes.Node) -> Iterable[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else node.find_all(nodes.TemplateData)


def _listed_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(list(value) if isinstance(value, Iterator) else value for value in args)


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise LimitError(f"makes a number of more than {_MAX_BITS} bits")


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise LimitError(f"counts to {value}, more than {_MAX_NUMBER}")


def _raise_exception(message: object) -> None:
    raise RefusalError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_DATE_FORMAT:
        raise LimitError(f"formats a date by more than {_MAX_DATE_FORMAT} characters")
    return datetime.now().strftime(format)
