"""Which beginnings sequences hold together by now.

A beginning lives as long as some cache has it. Where the prefix tree can, it holds the very same
arrays, so that what all have in common is in memory once.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

import mlx.core as mx

from mlxrun.cache.base import Memory, Named
from mlxrun.cache.branch import Beginning, BranchCache
from mlxrun.cache.dense import DenseCache
from mlxrun.cache.store import joined

Tree = tuple[object, ...]
Tokens = tuple[int, ...]


class Beginnings:
    """Those that are alive, by their tokens and by the kinds of memory that hold them."""

    def __init__(self) -> None:
        self._alive: WeakValueDictionary[tuple[Tree, Tokens], Beginning] = WeakValueDictionary()

    def get(self, tree: Tree, tokens: Sequence[int]) -> Beginning | None:
        """The beginning that is just these tokens, if it is alive."""
        return self._alive.get((tree, tuple(tokens)))

    def lengths(self, tree: Tree, tokens: Sequence[int]) -> list[int]:
        """Of those that some tokens begin with, the longest first."""
        given = tuple(tokens)
        alive = [first for known, first in self._alive if known == tree]
        return sorted((len(x) for x in alive if given[: len(x)] == x), reverse=True)

    def add(self, tree: Tree, tokens: Sequence[int], parts: Sequence[Named]) -> Beginning:
        """Let what some tokens left in each memory be held together."""
        beginning = Beginning(len(tokens), parts)
        mx.async_eval(beginning.arrays)  # type: ignore[no-untyped-call]
        self._alive[tree, tuple(tokens)] = beginning
        return beginning


def sharing(memory: Memory) -> bool:
    """Whether a memory can hold its first tokens together with others.

    What a window has dropped, a pattern leaves out or a group of tokens holds is not the same for
    all that begin alike; and what shares a beginning already keeps to it.
    """
    return type(memory) is DenseCache


def whole(segments: Sequence[Sequence[Named]], like: Sequence[Memory]) -> list[Named]:
    """What successive segments left in the memories that share, each as one part; else nothing.

    A single segment is taken as it is, not copied.
    """
    return [
        _chained(parts) if sharing(memory) else {}
        for memory, parts in zip(like, zip(*segments, strict=True), strict=True)
    ]


def branches(beginning: Beginning, like: Sequence[Memory]) -> list[Memory]:
    """Memories that hold a beginning together with others, where they can; else those given."""
    return [
        BranchCache(beginning, layer, memory.keys, memory.values)
        if isinstance(memory, DenseCache) and sharing(memory)
        else memory
        for layer, memory in enumerate(like)
    ]


def _chained(parts: Sequence[Named]) -> Named:
    if len(parts) == 1:
        return parts[0]
    length = sum(next(iter(part.values())).shape[2] for part in parts)
    return {name: joined(parts, name, length, length) for name in parts[0]}
