"""A cache that remembers everything."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxrun.cache.base import Mask, Named, State
from mlxrun.cache.rows import RowCache
from mlxrun.cache.store import bucket, copied
from mlxrun.errors import CacheError


class DenseCache(RowCache):
    """Every token since the beginning; the token at position p lives in slot p."""

    functional = True

    def _slot(self, position: int) -> int:
        return position

    def _held(self, offset: int) -> int:
        return offset

    def _capacity(self, slots: int) -> int:
        return bucket(slots)

    def slot_at(self, positions: mx.array) -> mx.array:
        return positions

    def held_at(self, offsets: mx.array) -> mx.array:
        return offsets

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
        self.offsets = [length]
        self._fill(tokens, length)

    def _append(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        start = self._slot(self.offsets[0])
        end = start + tokens[0].shape[2]
        self._store.reserve(tokens, start, self._capacity(end))
        self._store.write(start, tokens)
        return self._store.view(end), "causal" if end - start > 1 else None
