"""What mlx-lm's caches hold, apart from them: by token where that works, else as values.

A plain cache keeps its tokens apart. Whatever else there is, windows and recurrent states, has
attributes that are arrays, numbers, and lists of those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from mlxrun.cache.base import Named
from mlxrun.cache.store import copied, joined
from mlxrun.errors import CacheError

_SIZES = ("max_size", "keep", "chunk_size")
_PAIR = ("keys", "values")


def parts(entries: Sequence[Any]) -> list[Any]:
    """The caches of a model, those within others included."""
    return [part for entry in entries for part in _within(entry)]


def _within(entry: Any) -> Iterator[Any]:
    if isinstance(entry, CacheList):
        for part in entry.caches:
            yield from _within(part)
    else:
        yield entry


def check_window(entry: Any) -> None:
    """Refuse a cache that remembers no whole number of tokens.

    Raises:
        ValueError: it does.
    """
    for name in ("max_size", "chunk_size"):
        size = vars(entry).get(name, 1)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"a layer that remembers {size} tokens")


def kind(entry: Any) -> str:
    """What two caches share if one can take over what the other held; empty: none can."""
    if not isinstance(entry, KVCache | RotatingKVCache | ChunkedKVCache | ArraysCache):
        return ""
    sizes = [f"{name}={vars(entry)[name]}" for name in _SIZES if name in vars(entry)]
    return " ".join([type(entry).__name__, *sizes])


def by_token(entry: Any) -> bool:
    """Whether a cache keeps its tokens apart."""
    return isinstance(entry, KVCache)


def cut(entry: Any, start: int, stop: int) -> Named:
    """Copies of what tokens left in a cache that keeps them apart."""
    if entry.keys is None:  # of a layer that reads another's
        return {}
    return {name: copied(getattr(entry, name), start, stop) for name in _PAIR}


def put(entry: Any, tokens: Sequence[Named], prefix: str, length: int) -> None:
    """Make an empty cache hold what tokens left, in successive parts."""
    if f"{prefix}keys" not in tokens[0]:
        return
    for name in _PAIR:
        setattr(entry, name, joined(tokens, f"{prefix}{name}", length, length))
    entry.offset = length


def taken(value: Any, arrays: Named, prefix: str) -> Any:
    """A value as JSON has it, its arrays copied beside it under names.

    Raises:
        CacheError: it holds what is neither.
    """
    if isinstance(value, mx.array):
        name = f"{prefix}{len(arrays)}"
        # Rows of their own: a state may be a slice that holds on to a whole pass.
        arrays[name] = value[mx.arange(value.shape[0])] if value.ndim else mx.array(value)
        return {"array": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [taken(part, arrays, prefix) for part in value]
    raise CacheError(f"a cache holds a {type(value).__name__}, which cannot be kept")


def given(value: Any, arrays: Named) -> Any:
    """What :func:`taken` was given; its arrays are handles to write through."""
    if isinstance(value, dict):
        return mx.array(arrays[value["array"]])
    return [given(part, arrays) for part in value] if isinstance(value, list) else value
