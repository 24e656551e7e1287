"""A cache that keeps every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from mlxrun.cache.base import Mask, Named, State
from mlxrun.cache.formats import PLAIN, Format
from mlxrun.cache.rows import RowCache
from mlxrun.cache.slots import Layout, Line
from mlxrun.cache.store import bucket, copied
from mlxrun.errors import CacheError


class DenseCache(RowCache):
    """Every token since the start; the token at position p lies in slot p."""

    functional = True

    def __init__(
        self,
        keys: Format = PLAIN,
        values: Format = PLAIN,
        layout: Layout = Line(),  # noqa: B008
    ) -> None:
        super().__init__(layout, keys, values)

    def _capacity(self, slots: int) -> int:
        return bucket(slots)

    @property
    def by_token(self) -> bool:
        return True

    def cut(self, start: int, stop: int) -> Named:
        return {str(i): copied(a, start, stop) for i, a in enumerate(self._store.arrays)}

    def snapshot(self) -> State | None:
        return None

    def restore(self, tokens: Sequence[Named], state: State | None, length: int) -> None:
        if state is not None:
            raise CacheError("some of its tokens saw only a part of those before them")
        self.offsets, self.written = [length], [length]
        self._fill(tokens, length)

    def empty(self) -> Self:
        return type(self)(self.keys, self.values)

    def _append(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        start = self.layout.used(self.offsets[0])
        end = start + tokens[0].shape[2]
        self._store.reserve(tokens, start, self._capacity(end))
        self._store.write(start, tokens)
        return self._store.view(end), "causal" if end - start > 1 else None
