"""Checks that keep a template from making something huge out of something small.

A single operation such as ``"x" * 10**9`` cannot be interrupted, so its result is bounded before it
runs. Knows the operations, not jinja2's environment.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

__all__ = [
    "LimitError",
    "check_method",
    "check_nesting",
    "check_operation",
    "check_size",
    "counted",
    "sized",
]

MAX_SIZE: Final = 4_000_000
"""Characters of a string, items of a list or bits of a number that one operation may make."""

_MAX_NUMBER: Final = 100_000
"""The largest count or width that may be given to a method or a filter."""

_PLAIN: Final = (str, list, tuple, dict, int)

_WIDE_FIELD: Final = re.compile(r"\d{6,}")


class LimitError(Exception):
    """The template exceeds a limit; the message says which, after "the chat template"."""


def check_size(size: int) -> None:
    """Refuse a value of that many characters, items or bits."""
    if size > MAX_SIZE:
        raise LimitError(f"makes a value of more than {MAX_SIZE} characters or items")


def counted(value: Any) -> Any:
    """The value; an iterator stops where what it gives would be huge as a list or a text."""
    return _counted(value) if isinstance(value, Iterator) else value


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    size = 0
    for item in items:
        size += 1 + _weight(item)
        check_size(size)
        yield item


def check_nesting(value: Any) -> None:
    """Refuse a list or dict that would be huge as text; it may hold the same list many times."""
    if not isinstance(value, list | tuple | dict):
        return
    count = 0
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        count += len(item) if isinstance(item, str | list | tuple | dict) else 1
        check_size(count)
        if isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse ``left operator right`` if the result would be huge."""
    if operator == "*":
        check_size(_weight(left) * right if _sized_by(left, right) else 0)
        check_size(_weight(right) * left if _sized_by(right, left) else 0)
        check_size(_bits(left) + _bits(right))
    elif operator == "**":
        check_size(_bits(left) * abs(right) if isinstance(right, int) else 0)
    elif operator == "+":
        check_size(_weight(left) + _weight(right))
    elif isinstance(left, str):
        _check_fields(left, right if isinstance(right, tuple) else (right,))


def check_method(method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of a string's, list's or number's own method if the result would be huge."""
    method = getattr(method, "__wrapped__", method)  # the sandbox wraps str.format
    owner = getattr(method, "__self__", None)
    if not isinstance(owner, str | bytes | list | tuple | int):
        return
    values = [*args, *kwargs.values()]
    _check_numbers(values)
    name = method.__name__
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


def sized(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A jinja2 filter with its arguments and its result checked."""

    @functools.wraps(filter_)  # keeps jinja2's marks of what the filter is passed first
    def checked(*given: Any, **kwargs: Any) -> Any:
        args = [counted(value) for value in given]
        if name in _JOINS:
            args = [list(v) if isinstance(v, Iterator | range) else v for v in args]
        values = [v for v in (*args, *kwargs.values()) if isinstance(v, _PLAIN)]
        for value in values:
            check_nesting(value)
        if name in _BY_COUNT:
            _check_numbers(values[1:])
        if name == "do_indent" and values:
            lines = str(values[0]).count("\n") + 1
            check_size(lines * max([4, *(v for v in values[1:] if isinstance(v, int))]))
        elif name == "do_replace" and len(values) > 2:
            _check_replace(str(values[0]), str(values[1]), str(values[2]))
        elif name in _JOINS and values and isinstance(values[0], list | tuple):
            _check_join(str(values[1]) if len(values) > 1 else "", values[0])
        elif name == "do_format" and values:
            _check_fields(str(values[0]), values[1:])
        result = filter_(*args, **kwargs)
        check_size(len(result) if isinstance(result, str | list | tuple | dict) else 0)
        return result

    name = getattr(filter_, "__name__", "")
    return checked


_JOINS: Final = ("do_join", "sync_do_join")
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
    """Bound what a format string makes of its values."""
    values = list(values)
    if _WIDE_FIELD.search(pattern):
        raise LimitError("formats with a field that is too wide")
    if "*" in pattern or "{" in pattern:
        _check_numbers(value for value in values if "{:{" in pattern or "*" in pattern)
    for value in values:
        check_nesting(value)
    fields = pattern.count("{") + pattern.count("%")
    check_size(len(pattern) + fields * sum(_weight(value) for value in values))


def _check_join(separator: str, items: Any) -> None:
    if isinstance(items, list | tuple):
        check_size(sum(_weight(item) + len(separator) for item in items))
    elif isinstance(items, str):
        check_size(len(items) * (len(separator) + 1))
    else:  # nobody knows how many
        check_size(_MAX_NUMBER * len(separator))


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _lengths(table: Any) -> list[int]:
    values = table.values() if isinstance(table, dict) else table
    return [1, *(_weight(value) for value in values)]


def _weight(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _sized_by(value: Any, count: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple) and isinstance(count, int)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0
