"""Several caches in one forward pass, and caches as values for a compiled step.

Tokens go through a model as rows of one token each, whichever sequence they belong to, so that no
matrix product is padded; only attention groups them by cache. That is the selective batching of
Orca (Yu et al., OSDI 2022).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp
from mlxrun.kv_cache.base import StepCache
from mlxrun.kv_cache.dense import RowCache, positions, put_tokens
from mlxrun.kv_cache.formats import StoredKV

LayerArrays = list[mx.array]

# Slots by which the view of a compiled step grows: smaller ones read less in vain, and are compiled
# more often.
VIEW = 64


class Part(NamedTuple):
    """Adjacent tokens that go to one cache, row by row.

    Attributes:
        rows: R of the cache.
        tokens: T of each row; the most if ``counts`` differ.
        counts: how many each row gets; None if all get T.
    """

    cache: StepCache
    rows: int
    tokens: int
    counts: tuple[int, ...] | None = None


class BatchCache(StepCache):
    """One layer's caches during a forward pass over tokens (N, 1).

    Args:
        parts: in the order of the tokens.
        position: of each token, (N,).
    """

    def __init__(self, parts: Sequence[Part], position: mx.array) -> None:
        self._parts, self._position = parts, position

    @property
    def position(self) -> mx.array:
        return self._position

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, op: AttentionOp
    ) -> mx.array:
        if len(self._parts) == 1 and self._parts[0].tokens == 1 and not self._parts[0].counts:
            return self._parts[0].cache.attend(queries, keys, values, op)
        outputs, start = [], 0
        for part in self._parts:
            end = start + (part.rows * part.tokens if part.counts is None else sum(part.counts))
            q, k, v = (x[start:end] for x in (queries, keys, values))  # (N, H, 1, D)
            if end > start:
                outputs.append(_attend_part(part, q, k, v, op))
            start = end
        return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]

    @property
    def state(self) -> LayerArrays:
        return [array for part in self._parts for array in part.cache.state]


def _attend_part(
    part: Part, queries: mx.array, keys: mx.array, values: mx.array, op: AttentionOp
) -> mx.array:
    """Attention of one part's tokens (N, H, 1, D), the same shape."""
    cache, rows, tokens, counts = part
    if counts is None or min(counts) == tokens:
        q, k, v = (_by_row(x, rows) for x in (queries, keys, values))
        return _by_token(cache.attend(q, k, v, op))
    assert isinstance(cache, RowCache)
    padded, valid = _padding(counts)
    q, k, v = (_by_row(x[padded], rows) for x in (queries, keys, values))
    return _by_token(cache.attend(q, k, v, op, counts))[valid]


def _by_row(x: mx.array, rows: int) -> mx.array:
    """(R T, H, 1, D) to (R, H, T, D)."""
    if x.shape[0] == rows:
        return x
    return x.reshape(rows, -1, x.shape[1], x.shape[3]).swapaxes(1, 2)


def _by_token(x: mx.array) -> mx.array:
    """(R, H, T, D) to (R T, H, 1, D)."""
    rows, heads, tokens, width = x.shape
    return x if tokens == 1 else x.swapaxes(1, 2).reshape(rows * tokens, heads, 1, width)


@lru_cache(maxsize=16)
def _padding(counts: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """The token at each place of (R, T), any one as padding; and the places that are tokens."""
    ends, step = np.cumsum(counts)[:, None], np.arange(max(counts))
    tokens = np.minimum(ends - np.array(counts)[:, None] + step, ends[-1] - 1)
    valid = np.flatnonzero(step < np.array(counts)[:, None])
    return mx.array(tokens.reshape(-1)), mx.array(valid)


class DecodeRows:
    """Rows with a cache per layer, as a compiled step takes them.

    Args:
        caches: one per layer, each ``functional`` and not empty.

    Attributes:
        views: slots that the prepared step attends over, by layout of a layer.
    """

    def __init__(self, caches: Sequence[RowCache]) -> None:
        self.caches = caches
        self.views: dict[Hashable, int] = {}
        self._tokens = 1
        self._kinds = tuple((cache.layout_key, cache.layout) for cache in caches)
        self._by_layout = {cache.layout: cache for cache in caches}

    @staticmethod
    def possible(caches: Sequence[object]) -> bool:
        """Whether a step over these caches can be a pure function."""
        return all(isinstance(c, RowCache) and c.functional and c.state for c in caches)

    @property
    def key(self) -> Hashable:
        """Equal if the same compiled function serves the prepared step."""
        first, views = self.caches[0], tuple(self.views.values())
        return self._kinds, len(first.offsets), first.capacity, views, self._tokens

    def templates(self) -> list[RowCache]:
        """Caches like these without tokens, for a compiled function to keep."""
        return [cache.template() for cache in self.caches]

    @property
    def offsets(self) -> mx.array:
        """Tokens so far of each row, (R,)."""
        return positions(tuple(self.caches[0].offsets))

    def prepare(self, tokens: int = 1) -> None:
        """Make room for T more tokens of each row.

        Raises:
            CacheError: a cache cannot take that many in one step.
        """
        most = min(cache.tokens_at_once for cache in self._by_layout.values())
        if tokens > most:
            raise CacheError(f"these caches take {most} tokens of a row in a step, not {tokens}")
        self._tokens = tokens
        slots = {layout: cache.slots_after(tokens) for layout, cache in self._by_layout.items()}
        if any(count > self._by_layout[layout].capacity for layout, count in slots.items()):
            for cache in self.caches:
                cache.make_room(tokens)
        self.views = {layout: -(-count // VIEW) * VIEW for layout, count in slots.items()}

    @property
    def arrays(self) -> list[LayerArrays]:
        return [cache.arrays for cache in self.caches]

    @property
    def fixed(self) -> list[LayerArrays]:
        """Arrays that all rows share, which no step changes."""
        return [cache.fixed for cache in self.caches]

    def advance(self, arrays: Sequence[LayerArrays], tokens: int = 1) -> None:
        """Take over the arrays that a step of T tokens per row returned."""
        offsets = [offset + tokens for offset in self.caches[0].offsets]
        for cache, own in zip(self.caches, arrays, strict=True):
            cache.advance(own, offsets)


class DecodeSlots(StepCache):
    """One layer's rows within a compiled step; :attr:`arrays` then has the step's tokens as well.

    Nothing here depends on how many tokens a row has: offsets are arrays, and the view changes only
    at a bucket's edge. So a step is compiled once for all tokens up to that edge.

    Args:
        like: the cache whose rows they are: its layout, formats and attention.
        arrays: of the cache.
        fixed: shared by its rows.
        position: of each row's first new token, (R,).
        view: slots to attend over, or the capacity if that is less.
        places: slots and masks of this step, shared by layers of one layout.
        spreads: slots broadcast to each shape of tokens, shared likewise.
    """

    def __init__(
        self,
        like: RowCache,
        arrays: LayerArrays,
        fixed: LayerArrays,
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
        self, queries: mx.array, keys: mx.array, values: mx.array, op: AttentionOp
    ) -> mx.array:
        like = self._like
        packed = like.keys.pack(keys)
        slots, mask = self._place(keys.shape[2])
        tokens = [*packed, *like.values.pack(values)]
        self.arrays = [
            put_tokens(array, self._spread(slots, x.shape), x)
            for array, x in zip(self.arrays, tokens, strict=True)
        ]
        view = tuple(array[:, :, : self._view] for array in self.arrays)
        split = len(packed)
        return like.attend_stored(
            op,
            queries,
            StoredKV(like.keys, view[:split], keys.shape[1], keys.dtype),
            StoredKV(like.values, view[split:], values.shape[1], values.dtype),
            mask,
            self._fixed,
        )

    @property
    def state(self) -> LayerArrays:
        return self.arrays

    def _place(self, tokens: int) -> tuple[mx.array, mx.array]:
        """Slots of each row's T tokens, (R, 1, T, 1), and the mask, (R, 1, T, view)."""
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
        key = (self._like.layout, self._view, shape)
        if key not in self._spreads:
            self._spreads[key] = mx.broadcast_to(slots, shape)
        return self._spreads[key]
