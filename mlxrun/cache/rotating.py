"""A cache that remembers the first tokens and a window of the last ones.

Keeping the first tokens as attention sinks: Xiao et al., 2023, arXiv:2309.17453. Positions stay
absolute: a token keeps the rotation it was stored with.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Self

import mlx.core as mx
import numpy as np

from mlxrun.cache.base import Mask
from mlxrun.cache.formats import PLAIN, Format
from mlxrun.cache.rows import RowCache
from mlxrun.cache.store import Store, bucket
from mlxrun.errors import CacheError, ParameterError


class RotatingCache(RowCache):
    """The first ``keep`` tokens and the last ``window``.

    A query at position p attends to positions below ``keep`` and to those above ``p - window``,
    itself included, whether tokens come one by one or many at once. The token at position p lives
    in slot p below ``keep``, else in slot ``keep + (p - keep) % window``; a decode step writes one
    slot and copies nothing.
    """

    functional = True

    def __init__(
        self, window: int, *, keep: int = 0, keys: Format = PLAIN, values: Format = PLAIN
    ) -> None:
        if window < 1:
            raise ParameterError("window", window, "at least 1")
        if keep < 0:
            raise ParameterError("keep", keep, "at least 0")
        super().__init__(keys, values)
        self.window, self.keep = window, keep

    @property
    def size(self) -> int:
        """Slots in use."""
        return self._held(max(self.offsets))

    def _slot(self, position: int) -> int:
        ring = self.keep + (position - self.keep) % self.window
        return position if position < self.keep else ring

    def _held(self, offset: int) -> int:
        return min(offset, self.keep + self.window)

    def slot_at(self, positions: mx.array) -> mx.array:
        ring = self.keep + (positions - self.keep) % self.window
        return mx.where(positions < self.keep, positions, ring)

    def held_at(self, offsets: mx.array) -> mx.array:
        return mx.minimum(offsets, self.keep + self.window)

    @property
    def layout(self) -> Hashable:
        return self.window, self.keep

    def _capacity(self, slots: int) -> int:
        return bucket(slots, self.keep + self.window)

    def _append(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        return self._append_one(tokens) if tokens[0].shape[2] == 1 else self._append_many(tokens)

    def _append_one(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        offset = self.offsets[0]
        slot, held = self._slot(offset), self._held(offset + 1)
        self._store.reserve(tokens, self._held(offset), self._capacity(held))
        self._store.write(slot, tokens)
        return self._store.view(held), None

    def _append_many(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        """Attend over what is stored and all that is new, then store what stays in reach."""
        offset = self.offsets[0]
        stored = self._positions()
        new = np.arange(offset, offset + tokens[0].shape[2])
        seen = list(tokens)
        if len(stored):
            held = self._store.view(len(stored))
            seen = [mx.concatenate([a, b], axis=2) for a, b in zip(held, tokens, strict=True)]
        known = np.concatenate([stored, new])
        after = offset + len(new)
        self._keep_near(seen, known, after)
        if after <= self.keep + self.window:  # nothing is out of reach yet
            return seen, "causal"
        return seen, mx.array(self._visible(new, known))

    def _visible(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Which key positions each query position sees, booleans (T, S)."""
        p, j = queries[:, None], keys[None, :]
        visible: np.ndarray = (j <= p) & ((j < self.keep) | (j > p - self.window))
        return visible

    def _keep_near(self, tokens: Sequence[mx.array], known: np.ndarray, after: int) -> None:
        """Keep of the given tokens those that later ones may still see, each in its slot."""
        near = known >= max(self.keep, after - self.window)
        staying = np.flatnonzero((known < self.keep) | near)
        order = mx.array(staying[np.argsort(self._slots(known[staying]))])
        self._store = Store()
        self._store.reserve(tokens, 0, self._capacity(len(staying)))
        self._store.write(0, [x[:, :, order] for x in tokens])

    def _slots(self, known: np.ndarray) -> np.ndarray:
        ring = self.keep + (known - self.keep) % self.window
        return np.where(known < self.keep, known, ring)

    def _positions(self) -> np.ndarray:
        """The position stored in each slot in use."""
        offset = self.offsets[0]
        first = max(self.keep, offset - self.window)
        held = np.concatenate([np.arange(min(self.keep, offset)), np.arange(first, offset)])
        return held[np.argsort(self._slots(held))]

    @property
    def kind(self) -> str:
        return f"{super().kind} {self.window} {self.keep}"

    def trim(self, n: int) -> int:
        # Rows with offsets of their own: none has dropped what the one with the fewest still has.
        if n > 0 and n <= min(self.offsets) and max(self.offsets) > self.keep + self.window:
            raise CacheError(
                f"cannot go back {n} tokens: the window of {self.window} has dropped what lay "
                "before them"
            )
        return super().trim(n)

    def empty(self) -> Self:
        return type(self)(self.window, keep=self.keep, keys=self.keys, values=self.values)
