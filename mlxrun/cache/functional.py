"""Caches as values: T more tokens for each row, arrays in and arrays out.

Nothing here depends on how many tokens a row holds. Offsets are arrays, and what is attended over
is a view whose length changes only at a bucket's edge: a step made of this can be compiled once and
run for every token up to that edge.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import mlx.core as mx

from mlxrun.cache.base import Product
from mlxrun.cache.formats import Seen
from mlxrun.cache.passing import Passing
from mlxrun.cache.rows import RowCache
from mlxrun.cache.store import positions, written

Arrays = list[mx.array]

# Slots by which what is attended over grows: fewer are read in vain, more are recorded for.
VIEW = 64


class Rows:
    """Some rows with a cache per layer, from one step to the next.

    Args:
        caches: of which :attr:`RowCache.functional` is true, and which hold something.

    Attributes:
        views: slots that the step sees for which :meth:`prepare` was called, by layout of a layer.
    """

    def __init__(self, caches: Sequence[RowCache]) -> None:
        self.caches = caches
        self.views: dict[Hashable, int] = {}
        self._kinds = tuple((cache.kind, cache.layout) for cache in caches)
        self._alike = {cache.layout: cache for cache in caches}

    @staticmethod
    def possible(caches: Sequence[object]) -> bool:
        """Whether a step over such caches can be a pure function."""
        return all(isinstance(c, RowCache) and c.functional and c.state for c in caches)

    @property
    def kind(self) -> Hashable:
        """Equal where the same recording serves the step that is prepared."""
        first = self.caches[0]
        return self._kinds, len(first.offsets), first.capacity, tuple(self.views.values())

    def bare(self) -> list[RowCache]:
        """Caches like these that hold nothing, for a recording to keep."""
        return [cache.bare() for cache in self.caches]

    @property
    def offsets(self) -> mx.array:
        """Tokens seen by each row, (rows,)."""
        return positions(tuple(self.caches[0].offsets))

    def prepare(self, tokens: int = 1) -> None:
        """Make room for more tokens of each row."""
        slots = {layout: cache.slots_after(tokens) for layout, cache in self._alike.items()}
        if any(count > self._alike[layout].capacity for layout, count in slots.items()):
            for cache in self.caches:
                cache.make_room(tokens)
        self.views = {layout: -(-count // VIEW) * VIEW for layout, count in slots.items()}

    @property
    def arrays(self) -> list[Arrays]:
        """What each layer's cache holds."""
        return [cache.state for cache in self.caches]

    @property
    def fixed(self) -> list[Arrays]:
        """What each layer's rows share, which no step changes."""
        return [cache.fixed for cache in self.caches]

    def advance(self, arrays: Sequence[Arrays], tokens: int = 1) -> None:
        """Take over what a step of some tokens of each row returned."""
        for cache, own in zip(self.caches, arrays, strict=True):
            cache.advance(own, tokens)


class Slots(Passing):
    """One layer's rows within a step; afterwards :attr:`arrays` holds the step's tokens as well.

    Args:
        like: the cache whose rows they are: where tokens live, and how they are stored.
        arrays: what it holds.
        fixed: what its rows share.
        position: of each row's first token, (rows,).
        view: slots to attend over, or the capacity if that is less.
        places: of this step's tokens, for layers that place them alike.
        spreads: the same places for each number of the tokens, by their shape.
    """

    def __init__(
        self,
        like: RowCache,
        arrays: Arrays,
        fixed: Arrays,
        position: mx.array,
        view: int,
        places: dict[Hashable, tuple[mx.array, mx.array]],
        spreads: dict[Hashable, mx.array],
    ) -> None:
        self._like, self.arrays, self._fixed, self._position = like, arrays, fixed, position
        self._view = min(view, int(arrays[0].shape[2]))
        self._places, self._spreads = places, spreads

    @property
    def position(self) -> mx.array:
        return self._position

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, product: Product
    ) -> mx.array:
        like = self._like
        packed = like.keys.pack(keys)
        slots, mask = self._place(keys.shape[2])
        tokens = [*packed, *like.values.pack(values)]
        self.arrays = [
            written(array, self._spread(slots, token.shape), token)
            for array, token in zip(self.arrays, tokens, strict=True)
        ]
        shown = tuple(array[:, :, : self._view] for array in self.arrays)
        split = len(packed)
        return like.meet(
            product,
            queries,
            Seen(like.keys, shown[:split], keys.shape[1], keys.dtype),
            Seen(like.values, shown[split:], values.shape[1], values.dtype),
            mask,
            self._fixed,
        )

    @property
    def state(self) -> Arrays:
        return self.arrays

    def _place(self, tokens: int) -> tuple[mx.array, mx.array]:
        """Slots of each row's T tokens, (rows, 1, T, 1), and the mask, (rows, 1, T, view)."""
        layout = self._like.layout
        key = (layout, self._view)
        if key not in self._places:
            queries = self._position[:, None, None, None]
            if tokens > 1:
                queries = queries + mx.arange(tokens)[:, None]
            mask = layout.visible(mx.arange(self._view), queries[:, :, -1:], queries)
            self._places[key] = layout.slot(queries), mask
        return self._places[key]

    def _spread(self, slots: mx.array, shape: tuple[int, ...]) -> mx.array:
        """The slots for each number of the tokens, made once for all layers alike."""
        key = (self._like.layout, self._view, shape)
        if key not in self._spreads:
            self._spreads[key] = mx.broadcast_to(slots, shape)
        return self._spreads[key]
