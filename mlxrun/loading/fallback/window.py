"""Forgetting what lies behind a window, with mlx-lm's caches.

The same promise as :class:`mlxrun.cache.rotating.RotatingCache`: a query at position p attends to
positions below ``keep`` and to those above ``p - window``, however many tokens come at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from mlxrun.errors import CacheError

Mask = mx.array | str | None


class WindowCache(RotatingKVCache):
    """mlx-lm's rotating cache, with masks that know of the tokens that are kept.

    Args:
        window: last tokens to remember.
        keep: first tokens to remember besides.
    """

    def __init__(self, window: int, keep: int) -> None:
        super().__init__(max_size=window + keep, keep=keep)  # type: ignore[no-untyped-call]

    def make_mask(self, n: int, window_size: int | None = None, return_array: bool = False) -> Mask:
        """What n new tokens attend to: None for all, ``"causal"``, or booleans (n, S)."""
        window, keep = self.max_size - self.keep, self.keep
        if window_size is not None and window_size < window:  # the layer's own window is narrower
            window, keep = window_size, 0
        new = np.arange(self.offset, self.offset + n)
        positions = np.concatenate([self._stored(), new]) if n > 1 else self._slots()
        p, j = new[:, None], positions[None, :]
        visible = (j <= p) & ((j < keep) | (j > p - window))
        if n == 1 and visible.all():
            return None
        if n > 1 and not return_array and self.offset + n <= window + keep:
            return "causal"
        return mx.array(visible)

    def _stored(self) -> np.ndarray:
        """Positions that a pass over many tokens finds stored, in order of time."""
        held = 0
        if self.keys is not None:
            wrapped = self._idx < self.offset and self._idx != self.keys.shape[2]
            held = self.keys.shape[2] if wrapped else self._idx
        kept = min(self.keep, self.offset)
        # One slot of the window is the query's own.
        rest = min(held - kept, self.max_size - 1 - kept)
        return np.concatenate([np.arange(kept), np.arange(self.offset - rest, self.offset)])

    def _slots(self) -> np.ndarray:
        """Position in each slot once one more token is stored."""
        end = self.offset + 1
        if end <= self.max_size:
            return np.arange(end)
        ring = self.max_size - self.keep
        slot = self.keep if self._idx >= self.max_size else self._idx
        order = (np.arange(ring) - (slot - self.keep) - 1) % ring
        return np.concatenate([np.arange(self.keep), end - ring + order])


def windowed(entry: Any, window: int, make: Callable[[], WindowCache]) -> Any:
    """An empty cache like an empty one of mlx-lm's, that remembers no more than a window.

    States and narrower windows of a layer's own stay what they are.

    Args:
        window: last tokens to remember.
        make: what takes the place of a cache that remembers more.

    Raises:
        CacheError: a cache of this kind cannot forget.
    """
    if isinstance(entry, ArraysCache):
        return entry
    if isinstance(entry, CacheList):
        if sum(isinstance(part, KVCache) for part in entry.caches) > 1:
            raise CacheError("this model's layers remember in several ways and cannot forget")
        parts = (windowed(part, window, make) for part in entry.caches)
        return CacheList(*parts)  # type: ignore[no-untyped-call]
    if isinstance(entry, RotatingKVCache | ChunkedKVCache):
        own = entry.max_size if isinstance(entry, RotatingKVCache) else entry.chunk_size
        if own <= window:
            return entry
    if isinstance(entry, KVCache | RotatingKVCache):
        return make()
    raise CacheError(
        f"some layers of this model remember by a {type(entry).__name__}, which cannot forget all "
        f"but {window} tokens"
    )
