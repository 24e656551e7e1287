"""A cache of the first tokens and a window of the last ones.

Keeping the first tokens as attention sinks: Xiao et al., 2023, arXiv:2309.17453. Positions stay
absolute: a token keeps the rotation it was stored with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import mlx.core as mx
import numpy as np

from mlxrun.cache.base import Mask, Named, State
from mlxrun.cache.formats import PLAIN, Format
from mlxrun.cache.rows import RowCache
from mlxrun.cache.slots import Ring
from mlxrun.cache.store import Store, bucket, copied
from mlxrun.errors import CacheError, ParameterError

# Tokens that can be forgotten again after the ring has turned.
SLACK = 16


class RotatingCache(RowCache):
    """The first ``keep`` tokens and the last ``window``, in a ring; see :class:`Ring`.

    A query at position p attends to positions below ``keep`` and to those above ``p - window``,
    itself included, whether tokens come one by one or many at once. A decode step writes one slot
    and copies nothing.
    """

    functional = True
    layout: Ring

    def __init__(
        self, window: int, *, keep: int = 0, keys: Format = PLAIN, values: Format = PLAIN
    ) -> None:
        if window < 1:
            raise ParameterError("window", window, "at least 1")
        if keep < 0:
            raise ParameterError("keep", keep, "at least 0")
        super().__init__(Ring(window, keep, SLACK), keys, values)

    @property
    def window(self) -> int:
        return self.layout.window

    @property
    def keep(self) -> int:
        return self.layout.keep

    @property
    def size(self) -> int:
        """Slots in use."""
        return self.layout.used(max(self.written))

    @property
    def tokens_at_once(self) -> int:
        return self.layout.slack

    def slots_after(self, tokens: int) -> int:
        # Those of tokens that were rolled back lie among them.
        return self.layout.used(max(max(self.offsets) + tokens, *self.written))

    def _capacity(self, slots: int) -> int:
        return bucket(slots, self.layout.size)

    def _append(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        return self._append_one(tokens) if tokens[0].shape[2] == 1 else self._append_many(tokens)

    def _append_one(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        offset, layout = self.offsets[0], self.layout
        written = max(offset + 1, self.written[0])
        used = layout.used(written)
        self._store.reserve(tokens, layout.used(self.written[0]), self._capacity(used))
        self._store.write(layout.slot(offset), tokens)
        if written <= self.keep + self.window:  # nothing is out of sight
            return self._store.view(offset + 1), None
        shown = layout.visible(np.arange(used), offset, np.array([[offset]]))
        return self._store.view(used), mx.array(shown)

    def _append_many(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        """Attend over the stored and the new tokens, then store those that stay in reach."""
        offset = self.offsets[0]
        stored = self._positions()
        new = np.arange(offset, offset + tokens[0].shape[2])
        seen = list(tokens)
        if len(stored):
            held = self._stored(stored)
            seen = [mx.concatenate([a, b], axis=2) for a, b in zip(held, tokens, strict=True)]
        known = np.concatenate([stored, new])
        after = offset + len(new)
        self._store_near(seen, known, max(self.written[0], after))
        if after <= self.keep + self.window:  # nothing is out of reach yet
            return seen, "causal"
        p, j = new[:, None], known[None, :]
        return seen, mx.array((j <= p) & ((j < self.keep) | (j > p - self.window)))

    def _stored(self, known: np.ndarray) -> list[mx.array]:
        if self.written[0] <= self.layout.size:  # in order
            return self._store.view(len(known))
        slots = mx.array(self.layout.slot(known))
        return [array[:, :, slots] for array in self._store.arrays]

    def _store_near(self, tokens: Sequence[mx.array], known: np.ndarray, written: int) -> None:
        """Store those of the tokens at ``known`` positions that later ones may see."""
        layout = self.layout
        staying = np.flatnonzero((known < self.keep) | (known >= written - layout.size + self.keep))
        slots = np.full(layout.used(written), staying[0])
        slots[layout.slot(known[staying])] = staying
        self._store = Store()
        self._store.reserve(tokens, 0, self._capacity(len(slots)))
        self._store.write(0, [x[:, :, mx.array(slots)] for x in tokens])

    def _positions(self) -> np.ndarray:
        """The positions that are stored, ascending."""
        offset = self.offsets[0]
        first = max(self.keep, self.written[0] - self.layout.size + self.keep)
        return np.concatenate([np.arange(min(self.keep, offset)), np.arange(first, offset)])

    @property
    def kind(self) -> str:
        return f"{super().kind} {self.window} {self.keep}"

    def _check_truncation(self, row: int, length: int) -> None:
        written = self.written[row]
        if length and written > self.layout.size and written - length > self.layout.slack:
            raise CacheError(
                f"cannot go back {self.offsets[row] - length} tokens: the window of {self.window} "
                "has dropped what lay before them"
            )

    def snapshot(self) -> State | None:
        used = self.layout.used(self.written[0])
        arrays = {str(i): copied(a, 0, used) for i, a in enumerate(self._store.arrays)}
        about = {"offset": self.offsets[0], "written": self.written[0], "slack": self.layout.slack}
        return State(arrays, about)

    def restore(self, tokens: Sequence[Named], state: State | None, length: int) -> None:
        assert state is not None
        offset = int(state.about["offset"])
        if state.about.get("slack") == self.layout.slack:
            self.offsets, self.written = [offset], [int(state.about["written"])]
            self._fill([state.arrays], self.layout.used(self.written[0]))
        else:  # an older file's: a ring without slack
            ring = Ring(self.window, self.keep, 0)
            first = max(self.keep, offset - self.window)
            known = np.concatenate([np.arange(min(self.keep, offset)), np.arange(first, offset)])
            slots = mx.array(ring.slot(known))
            # Nothing can be forgotten of it once it has turned.
            written = offset + self.layout.slack if offset > ring.size else offset
            arrays = [state.arrays[str(i)][:, :, slots] for i in range(len(state.arrays))]
            self._store_near(arrays, known, written)
            self.offsets, self.written = [offset], [written]
        self.trim(offset - length)

    def empty(self) -> Self:
        return type(self)(self.window, keep=self.keep, keys=self.keys, values=self.values)
