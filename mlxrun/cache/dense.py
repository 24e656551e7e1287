"""A cache that remembers everything, in arrays that grow in buckets."""

from __future__ import annotations

from typing import Self

import mlx.core as mx

from mlxrun.cache.base import Cache, Mask
from mlxrun.errors import CacheError

# Smallest capacity; every further bucket doubles, so that growing costs O(1) copies per token.
BUCKET = 256


def bucket(tokens: int, limit: int | None = None) -> int:
    """The capacity that holds ``tokens``: 256, 512, 1024 ..., at most ``limit``."""
    capacity = BUCKET
    while capacity < tokens:
        capacity *= 2
    return capacity if limit is None else min(capacity, limit)


def grow(array: mx.array | None, like: mx.array, used: int, capacity: int) -> mx.array:
    """An array (B, H, capacity, D) that begins with the ``used`` tokens of ``array``."""
    b, h, _, d = like.shape
    if array is None or not used:
        return mx.zeros((b, h, capacity, d), like.dtype)
    more = mx.zeros((b, h, capacity - used, d), like.dtype)
    return mx.concatenate([array[:, :, :used], more], axis=2)


def handle(array: mx.array | None) -> mx.array | None:
    """Another name for the same values: assigning to a slice of one leaves the other alone."""
    return None if array is None else mx.array(array)


class DenseCache(Cache):
    """Every token since the beginning."""

    def __init__(self) -> None:
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        start, end = self.offset, self.offset + keys.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            capacity = bucket(end)
            self._keys = grow(self._keys, keys, start, capacity)
            self._values = grow(self._values, values, start, capacity)
        self._keys[:, :, start:end] = keys
        self._values[:, :, start:end] = values
        self.offset = end
        mask = "causal" if end - start > 1 else None
        return self._keys[:, :, :end], self._values[:, :, :end], mask

    def trim(self, n: int) -> int:
        if not 0 <= n <= self.offset:
            raise CacheError(f"cannot forget {n} of {self.offset} tokens")
        self.offset -= n
        return n

    def fork(self) -> Self:
        other = type(self)()
        other.offset = self.offset
        other._keys, other._values = handle(self._keys), handle(self._values)
        return other

    @property
    def state(self) -> list[mx.array]:
        return [array for array in (self._keys, self._values) if array is not None]
