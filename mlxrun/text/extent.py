"""Sizes of a template's values, as trees.

Comparing, hashing and printing a value are uninterruptible and walk its whole tree, even if a list
that holds one list twice costs no memory. So every value is measured when it is made; as a
sandbox's values are immutable, once is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

__all__ = ["MAX_SIZE", "Extent", "LimitError", "Measures", "Once", "check_size"]

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
