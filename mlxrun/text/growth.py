"""Bounds on the results of a template's operations.

A single operation such as ``"x" * 10**9`` cannot be interrupted, so its result is bounded before it
runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from mlxrun.text.extent import LimitError, Measures, Once, check_size

__all__ = ["check_bits", "check_method", "check_operation", "sized"]

_MAX_BITS: Final = 100_000
"""Bits of a number; division is quadratic in them."""

_MAX_WORK: Final = 1_000_000_000
"""Characters that one method may compare."""

_MAX_SLOW: Final = 10_000
"""Characters and items given to a filter of quadratic cost."""

_MAX_NUMBER: Final = 100_000
"""The largest count or width that may be given to a method or a filter."""

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
