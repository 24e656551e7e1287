"""A cache of the first tokens and a window of the last ones.

Keeping the first tokens as attention sinks: Xiao et al., 2023, arXiv:2309.17453. Positions stay
absolute: a token keeps the rotation it was stored with.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np

from mlxrun.errors import CacheError, ParameterError
from mlxrun.kv_cache.attention import Mask
from mlxrun.kv_cache.base import Arrays, State
from mlxrun.kv_cache.dense import RowCache, Store, bucket, copied, joined, places
from mlxrun.kv_cache.formats import PLAIN, Format

# Tokens that can be truncated after the ring has wrapped around.
SLACK = 16


@dataclass(frozen=True)
class Ring:
    """The first ``keep`` tokens, then a ring of ``window + slack`` slots.

    A query attends to positions below ``keep`` and to those above its own minus ``window``. The
    slack keeps tokens that have left the window a little longer, so that a pass of up to
    ``slack + 1`` tokens overwrites nothing that its first query attends to, and up to ``slack``
    tokens can be truncated again.
    """

    window: int
    keep: int
    slack: int

    @property
    def size(self) -> int:
        """All slots, those of the first tokens included."""
        return self.keep + self.window + self.slack

    def slot(self, positions: Any) -> Any:
        ring = self.keep + (positions - self.keep) % (self.window + self.slack)
        if isinstance(positions, int):
            return positions if positions < self.keep else ring
        if not self.keep:
            return ring
        where = mx.where if isinstance(positions, mx.array) else np.where
        return where(positions < self.keep, positions, ring)

    def used(self, offset: int) -> int:
        return min(offset, self.size)

    def oldest(self, written: int) -> int:
        """The first position in the ring after ``written`` tokens."""
        return max(self.keep, written - self.window - self.slack)

    def visible(self, slots: Any, last: Any, queries: Any) -> Any:
        # The newest position that goes to a slot; below ``keep`` if there is none yet. The slot of
        # a truncated token stands for a position before any window.
        stored = last - (last - slots) % (self.window + self.slack)
        visible = (stored > queries - self.window) & (stored <= queries) & (stored >= self.keep)
        if not self.keep:
            return visible
        where = mx.where if isinstance(visible, mx.array) else np.where
        return where(slots < self.keep, slots <= queries, visible)


class RotatingCache(RowCache):
    """The first ``keep`` tokens and the last ``window``, in a ring; see :class:`Ring`.

    A query at position p attends to positions below ``keep`` and to those above ``p - window``,
    itself included, however tokens are divided into passes. A decode step writes one slot and
    copies nothing.

    Raises:
        ParameterError: ``window`` or ``keep`` is too small.
    """

    functional = True
    layout: Ring

    def __init__(
        self,
        window: int,
        *,
        keep: int = 0,
        slack: int = SLACK,
        keys: Format = PLAIN,
        values: Format = PLAIN,
    ) -> None:
        if window < 1:
            raise ParameterError("window", window, "at least 1")
        if keep < 0:
            raise ParameterError("keep", keep, "at least 0")
        super().__init__(Ring(window, keep, slack), keys, values)
        self.window, self.keep, self.slack = window, keep, slack

    def empty(self) -> Self:
        return type(self)(
            self.window, keep=self.keep, slack=self.slack, keys=self.keys, values=self.values
        )

    @property
    def size(self) -> int:
        """Slots in use."""
        return self.slots_after(0)

    @property
    def tokens_at_once(self) -> int:
        return max(1, self.slack)

    @property
    def rollback(self) -> int:
        return self.slack

    def _capacity(self, slots: int) -> int:
        return bucket(slots, self.layout.size)

    def _append(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        offset, count = self.offsets[0], tokens[0].shape[2]
        end = offset + count
        if count > self.tokens_at_once:
            return self._append_chunk(tokens)
        at = places(self.layout, (offset,), (count,), count)
        self._store.reserve(tokens, self.size, self._capacity(at.view))
        if count == 1:
            self._store.write(self.layout.slot(offset), tokens)
        else:
            self._store.write_each(at.slots, tokens)
        mask: Mask = at.mask
        if end <= self.keep + self.window:  # no token has left the window
            mask = "causal" if count > 1 else None
        return self._store.view(at.view), mask

    def _append_chunk(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        """Attend to the window and the new tokens, then store those that stay in the window."""
        offset, count = self.offsets[0], tokens[0].shape[2]
        end = offset + count
        # Not the slack: what is attended to must not depend on earlier truncation.
        stored = self._positions(offset - self.window + 1)
        if len(stored):
            pairs = zip(self._in_order(stored), tokens, strict=True)
            tokens = [mx.concatenate([old, new], axis=2) for old, new in pairs]
        known = np.concatenate([stored, np.arange(offset, end)])
        self._store_newest(tokens, known, end)
        if end <= self.keep + self.window:
            return list(tokens), "causal"
        queries = np.arange(offset, end)[:, None]
        in_window = (known < self.keep) | (known > queries - self.window)
        return list(tokens), mx.array((known <= queries) & in_window)

    def _positions(self, first: int) -> np.ndarray:
        """The positions below ``keep``, and those from ``first`` on."""
        offset = self.offsets[0]
        first = min(max(first, self.keep), offset)
        return np.concatenate([np.arange(min(self.keep, first)), np.arange(first, offset)])

    def _in_order(self, known: np.ndarray) -> list[mx.array]:
        """The tokens at some positions."""
        slots = self.layout.slot(known)
        if (slots == np.arange(len(slots))).all():
            return self._store.view(len(slots))
        return [array[:, :, mx.array(slots)] for array in self._store.arrays]

    def _store_newest(self, tokens: Sequence[mx.array], known: np.ndarray, end: int) -> None:
        """Replace what is stored by tokens at ``known`` positions, each in its slot."""
        fits = np.flatnonzero((known < self.keep) | (known >= self.layout.oldest(end)))
        source = np.zeros(self.layout.used(end), np.int64)
        source[self.layout.slot(known[fits])] = fits
        self._store = Store()
        self._store.reserve(tokens, 0, self._capacity(len(source)))
        self._store.write(0, [x[:, :, mx.array(source)] for x in tokens])

    def _check_truncation(self, row: int, length: int) -> None:
        first = max(self.keep, length - self.window + 1)  # that the next query attends to
        if length > self.keep and first < self.layout.oldest(self.longest(row)):
            raise CacheError(
                f"cannot go back {self.offsets[row] - length} tokens: the window of {self.window} "
                "has dropped what lay before them"
            )

    def truncate(self, row: int, n: int) -> None:
        super().truncate(row, n)
        if n and self.offsets[row] <= self.keep:  # the ring is empty again
            self.high_water[row] = self.offsets[row]

    @property
    def layout_key(self) -> str:
        return f"{super().layout_key} {self.window} {self.keep}"

    @property
    def batch_key(self) -> Hashable:
        return self.layout_key, self.slack

    def snapshot(self) -> State | None:
        arrays = {str(i): copied(a, 0, self.size) for i, a in enumerate(self._store.arrays)}
        metadata = {"offset": self.offsets[0], "written": self.longest(0), "slack": self.slack}
        return State(arrays, metadata)

    def restore(self, tokens: Sequence[Arrays], state: State | None, length: int) -> None:
        assert state is not None
        mine, metadata = self.layout, state.metadata
        # Files of version 1 are of rings without slack.
        self.layout = Ring(self.window, self.keep, int(metadata.get("slack", 0)))
        offset = int(metadata["offset"])
        self.offsets = [offset]
        oldest = self.layout.oldest(int(metadata.get("written", offset)))
        used, names = self.size, map(str, range(len(state.arrays)))
        self._store = Store([joined([state.arrays], name, used, used) for name in names])
        known = self._positions(oldest)
        ordered, self.layout = self._in_order(known), mine
        self._store_newest(ordered, known, offset)
        lost = oldest > self.keep
        self.high_water = [max(offset, oldest + self.window + self.slack if lost else 0)]
        self.truncate(0, offset - length)
