"""A jinja2 environment in which an untrusted template can neither escape nor run away.

On top of jinja2's immutable sandbox, every loop iteration, macro, call, filter and operator checks
a deadline, and no single step can take long: an operation whose result could be huge is bounded
before it runs, and values are bounded in size and depth. No signals and no tracing, so it works in
any thread. Syntax and filters are those of Hugging Face's chat templates (transformers,
``chat_template_utils.py``).
"""

from __future__ import annotations

import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["LimitError", "RefusalError", "Sandbox"]


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
        self.filters = {name: sized(filter_, self.keep) for name, filter_ in self.filters.items()}
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
            check_bits(value.bit_length())
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
        check_method(obj, args, kwargs)
        return self.keep(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operation(operator, left, right)
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


_MAX_BITS: Final = 100_000
"""Bits of a number; division is quadratic in them."""

_MAX_WORK: Final = 1_000_000_000
"""Characters that one method may compare."""

_MAX_SLOW: Final = 10_000
"""Characters and items given to a filter of quadratic cost."""

_MAX_NUMBER: Final = 100_000
"""The largest count or width that may be given to a method or a filter."""


class Once(Iterator[Any]):
    """A one-pass iterator over a known list."""

    __slots__ = ("_rest", "all")

    def __init__(self, items: list[Any]) -> None:
        self.all = items
        self._rest = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self._rest

    def __next__(self) -> Any:
        return next(self._rest)


_LISTS: Final = (list, tuple)
_PLAIN: Final = (str, list, tuple, dict, int, Once)

_NUMBER: Final = re.compile(r"\d+")


def check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise LimitError(f"makes a number of more than {_MAX_BITS} bits")


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse ``left operator right`` if the result would be huge."""
    if operator == "*":
        check_size(_weight(left) * right if _sized_by(left, right) else 0)
        check_size(_weight(right) * left if _sized_by(right, left) else 0)
        check_bits(_bits(left) + _bits(right))
    elif operator == "**":
        check_bits(_bits(left) * abs(right) if isinstance(right, int) else 0)
    elif operator == "+":
        check_size(_weight(left) + _weight(right))
    elif operator == "%" and isinstance(left, str):
        _check_fields(left, right if isinstance(right, tuple) else (right,))


def check_method(method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a method call of a string, list or number if the result would be huge."""
    method = getattr(method, "__wrapped__", method)  # the sandbox wraps str.format
    owner = getattr(method, "__self__", None)
    if not isinstance(owner, str | bytes | list | tuple | int):
        return
    values = [*args, *kwargs.values()]
    _check_numbers(values)
    name = method.__name__
    if name in ("encode", "to_bytes"):
        raise LimitError("makes bytes, of which no prompt has need")
    if not isinstance(owner, str):
        return
    if name in ("format", "format_map"):
        _check_fields(owner, values)
    elif name == "join" and args:
        _check_join(owner, args[0])
    elif name == "replace" and len(args) > 1:
        _check_replace(owner, args[0], args[1])
    elif name == "translate" and args:
        check_size(len(owner) * max(_lengths(args[0])))
    elif name == "expandtabs":
        check_size(owner.count("\t") * max([8, *(v for v in values if isinstance(v, int))]))
    elif name in _SEARCHES:
        _check_search(owner, values)


def sized(filter_: Callable[..., Any], keep: Callable[[Any], Any]) -> Callable[..., Any]:
    """A jinja2 filter that checks its arguments and passes its result through ``keep``."""

    @functools.wraps(filter_)  # keeps jinja2's marks of what the filter is passed first
    def checked(*args: Any, **kwargs: Any) -> Any:
        if name in _JOINS:
            args = tuple(list(v) if isinstance(v, Iterator | range) else v for v in args)
        values = [v for v in (*args, *kwargs.values()) if isinstance(v, _PLAIN)]
        _check_filter(name, values)
        result = filter_(*args, **kwargs)
        if isinstance(result, str):
            check_size(len(result))
        return keep(result)

    name = getattr(filter_, "__name__", "")
    return checked


def _check_filter(name: str, values: list[Any]) -> None:
    """Refuse plain arguments, the filtered value first, from which a filter would make too much."""
    options = values[1:]
    if name in _BY_COUNT:
        _check_numbers(options)
    if name == "do_indent" and values:
        check_size((str(values[0]).count("\n") + 1) * _largest(options, 4))
    elif name == "do_replace" and len(values) > 2:
        _check_replace(str(values[0]), str(values[1]), str(values[2]))
    elif name in _JOINS and values and isinstance(values[0], list | tuple):
        _check_join(str(values[1]) if len(values) > 1 else "", values[0])
    elif name == "do_format" and values:
        _check_fields(str(values[0]), options)
    elif name == "do_trim" and values:
        _check_search(str(values[0]), options)
    elif name == "_tojson" and values:
        _, items, depth = Measures().of(values[0])
        check_size(items * (depth + 1) * _largest(options, 1))
    elif name in _SLOW or (name == "do_sum" and any(isinstance(v, _LISTS) for v in options)):
        size = Measures().of(values).size
        if size > _MAX_SLOW:
            raise LimitError(f"gives a slow filter more than {_MAX_SLOW} characters or items")


_JOINS: Final = ("do_join", "sync_do_join")
_SLOW: Final = ("do_pprint", "do_striptags", "do_urlize", "do_wordwrap")
_SEARCHES: Final = ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip")
_BY_COUNT: Final = (
    "do_center",
    "do_indent",
    "do_slice",
    "sync_do_slice",
    "do_batch",
    "do_round",
    "do_wordwrap",
    "do_truncate",
    "_tojson",
)


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise LimitError(f"gives a method the number {value}, more than {_MAX_NUMBER}")


def _check_fields(pattern: str, values: Iterable[Any]) -> None:
    """Bound the result of a format string."""
    values = list(values)
    widths = [number.group() for number in _NUMBER.finditer(pattern)]
    if any(len(width) > 5 for width in widths):
        raise LimitError("formats with a field that is too wide")
    check_size(sum(map(int, widths)))
    if "*" in pattern or "{:{" in pattern:
        _check_numbers(values)
    fields = pattern.count("{") + pattern.count("%")
    check_size(len(pattern) + fields * Measures().of(values).size)


def _check_join(separator: str, items: Any) -> None:
    items = items.all if isinstance(items, Once) else items
    if isinstance(items, list | tuple):
        check_size(sum(_weight(item) + len(separator) for item in items))
    elif isinstance(items, str):
        check_size(len(items) * (len(separator) + 1))
    else:  # nobody knows how many
        check_size(_MAX_NUMBER * len(separator))


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_search(text: str, values: Iterable[Any]) -> None:
    if len(text) * _largest([v for v in values if isinstance(v, str)], 1) > _MAX_WORK:
        raise LimitError("searches a long text for a long one")


def _largest(values: Iterable[Any], default: int) -> int:
    """The largest of numbers and lengths, also within tuples."""
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return max([default, *(v if isinstance(v, int) else _weight(v) for v in flat)])


def _lengths(table: Any) -> list[int]:
    values = table.values() if isinstance(table, dict) else table
    return [1, *(_weight(value) for value in values)]


def _weight(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _sized_by(value: Any, count: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple) and isinstance(count, int)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


MAX_SIZE: Final = 4_000_000
"""Characters of a string, or characters and items of a value, that one operation may make."""

_MAX_DEPTH: Final = 100
"""Levels of nesting; Python hashes tuples and frees generators by unguarded recursion."""

_MAX_HELD: Final = 1_000_000
"""Items of measured values that are kept alive."""


_EMPTY: Final[dict[Any, Any]] = {}
_ITEMS: Final = type(_EMPTY.items())
_VIEWS: Final = (type(_EMPTY.keys()), type(_EMPTY.values()))


class LimitError(Exception):
    """The template exceeds a limit; the message completes "the chat template ..."."""


class Extent(NamedTuple):
    """A value as a tree: characters and items, items alone, depth."""

    size: int
    items: int
    depth: int


_LEAF: Final = Extent(1, 1, 0)


class Measures:
    """The extents of one rendering's (immutable) values."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Extent]] = {}  # the value too, so that its id stays its
        self._held = 0

    def of(self, value: Any, room: int = _MAX_DEPTH) -> Extent:
        """The extent of a value of at most ``room`` levels; raises LimitError."""
        if isinstance(value, str | bytes):
            return Extent(len(value), 1, 0)
        parts = _parts(value)
        if parts is None:
            return _LEAF
        found = self._known.get(id(value))
        extent = self._sum(parts, room) if found is None else found[1]
        if extent.depth > room:
            raise LimitError(f"nests values more than {_MAX_DEPTH} deep")
        if found is None and isinstance(value, list | tuple | dict | Once):
            self._keep(value, extent)
        return extent

    def _sum(self, parts: Iterable[Iterable[Any]], room: int) -> Extent:
        if room == 0:
            raise LimitError(f"nests values more than {_MAX_DEPTH} deep")
        size = items = depth = 0
        for part in parts:
            for item in part:
                extent = self.of(item, room - 1)
                size += 1 + extent.size
                items += 1 + extent.items
                depth = max(depth, extent.depth)
                if size > MAX_SIZE:
                    check_size(size)
        return Extent(size, items, depth + 1)

    def _keep(self, value: Any, extent: Extent) -> None:
        self._held += 1 + len(value.all if isinstance(value, Once) else value)
        if self._held > _MAX_HELD:
            self._known.clear()
            self._held = 0
        self._known[id(value)] = value, extent


def check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise LimitError(f"makes a value of more than {MAX_SIZE} characters or items")


def _parts(value: Any) -> list[Iterable[Any]] | None:
    """The items of a container; None for anything else."""
    if isinstance(value, list | tuple):
        return [value]
    if isinstance(value, dict):
        return [value.keys(), value.values()]
    if isinstance(value, Once):
        return [value.all]
    if isinstance(value, _VIEWS):
        return [value]
    if isinstance(value, _ITEMS):
        return list(value)
    return None
