"""A cache that remembers the first tokens and a window of the last ones.

Keeping the first tokens as attention sinks: Xiao et al., 2023, arXiv:2309.17453. Positions stay
absolute: a token keeps the rotation it was stored with.
"""

from __future__ import annotations

from typing import Self

import mlx.core as mx
import numpy as np

from mlxrun.cache.base import Cache, Mask
from mlxrun.cache.dense import bucket, grow, handle
from mlxrun.errors import CacheError, ParameterError


class RotatingCache(Cache):
    """The first ``keep`` tokens and the last ``window``.

    A query at position p attends to positions below ``keep`` and to those above ``p - window``,
    itself included, whether tokens come one by one or many at once. The token at position p lives
    in slot p below ``keep``, else in slot ``keep + (p - keep) % window``; a decode step writes one
    slot and copies nothing.
    """

    def __init__(self, window: int, *, keep: int = 0) -> None:
        if window < 1:
            raise ParameterError("window", window, "at least 1")
        if keep < 0:
            raise ParameterError("keep", keep, "at least 0")
        self.window, self.keep = window, keep
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def size(self) -> int:
        """Slots in use."""
        return min(self.offset, self.keep + self.window)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        if keys.shape[2] == 1:
            return self._append_one(keys, values)
        return self._append_many(keys, values)

    def _append_one(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        slot = int(self._slots(np.array([self.offset]))[0])
        self._reserve(keys, values, slot + 1)
        assert self._keys is not None and self._values is not None
        self._keys[:, :, slot : slot + 1] = keys
        self._values[:, :, slot : slot + 1] = values
        self.offset += 1
        return self._keys[:, :, : self.size], self._values[:, :, : self.size], None

    def _append_many(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        """Attend over what is stored and all that is new, then store what stays in reach."""
        stored = self._positions()
        new = np.arange(self.offset, self.offset + keys.shape[2])
        if self._keys is not None and self._values is not None and len(stored):
            keys = mx.concatenate([self._keys[:, :, : len(stored)], keys], axis=2)
            values = mx.concatenate([self._values[:, :, : len(stored)], values], axis=2)
        positions = np.concatenate([stored, new])
        self.offset += len(new)
        self._store(keys, values, positions)
        if self.offset <= self.keep + self.window:  # nothing is out of reach yet
            return keys, values, "causal"
        return keys, values, mx.array(self._visible(new, positions))

    def _visible(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Which key positions each query position sees, booleans (T, S)."""
        p, j = queries[:, None], keys[None, :]
        visible: np.ndarray = (j <= p) & ((j < self.keep) | (j > p - self.window))
        return visible

    def _store(self, keys: mx.array, values: mx.array, positions: np.ndarray) -> None:
        """Keep of the given tokens those that later ones may still see, each in its slot."""
        near = positions >= max(self.keep, self.offset - self.window)
        staying = np.flatnonzero((positions < self.keep) | near)
        order = mx.array(staying[np.argsort(self._slots(positions[staying]))])
        capacity = bucket(len(staying), self.keep + self.window)
        self._keys = grow(keys[:, :, order], keys, len(staying), capacity)
        self._values = grow(values[:, :, order], values, len(staying), capacity)

    def _slots(self, positions: np.ndarray) -> np.ndarray:
        ring = self.keep + (positions - self.keep) % self.window
        return np.where(positions < self.keep, positions, ring)

    def _positions(self) -> np.ndarray:
        """The position stored in each slot in use."""
        first = max(self.keep, self.offset - self.window)
        held = np.concatenate(
            [np.arange(min(self.keep, self.offset)), np.arange(first, self.offset)]
        )
        return held[np.argsort(self._slots(held))]

    def _reserve(self, keys: mx.array, values: mx.array, slots: int) -> None:
        if self._keys is None or self._values is None or slots > self._keys.shape[2]:
            capacity = bucket(slots, self.keep + self.window)
            used = self.size
            self._keys = grow(self._keys, keys, used, capacity)
            self._values = grow(self._values, values, used, capacity)

    def trim(self, n: int) -> int:
        if not 0 <= n <= self.offset:
            raise CacheError(f"cannot forget {n} of {self.offset} tokens")
        if n and self.offset > self.keep + self.window:
            raise CacheError(
                f"cannot go back {n} tokens: the window of {self.window} has dropped what lay "
                "before them"
            )
        self.offset -= n
        return n

    def fork(self) -> Self:
        other = type(self)(self.window, keep=self.keep)
        other.offset = self.offset
        other._keys, other._values = handle(self._keys), handle(self._values)
        return other

    @property
    def state(self) -> list[mx.array]:
        return [array for array in (self._keys, self._values) if array is not None]
