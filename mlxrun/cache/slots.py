"""Which slot of a cache holds the token at a position, and which slots a query attends to.

The arithmetic is the same for Python integers, numpy arrays (masks made by the host) and MLX arrays
(within a compiled step).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np


class Layout(Protocol):
    """A rule of slots; equal for caches whose tokens lie in the same slots."""

    def __hash__(self) -> int: ...

    def slot(self, positions: Any) -> Any:
        """The slots of tokens at some positions."""

    def used(self, offset: int) -> int:
        """Slots in use after ``offset`` tokens."""

    def visible(self, slots: Any, last: Any, queries: Any) -> Any:
        """Which slots queries attend to, booleans by broadcasting.

        Args:
            slots: numbers of slots.
            last: position of the newest token that is stored.
            queries: positions of the queries, at most ``last``.
        """


@dataclass(frozen=True)
class Line:
    """Tokens in order of position, from position ``start`` in slot 0 on."""

    start: int = 0

    def slot(self, positions: Any) -> Any:
        return positions - self.start if self.start else positions

    def used(self, offset: int) -> int:
        return max(0, offset - self.start)

    def visible(self, slots: Any, last: Any, queries: Any) -> Any:
        return slots <= self.slot(queries)


@dataclass(frozen=True)
class Ring:
    """The first ``keep`` tokens, then a ring of ``window + slack`` slots.

    A query attends to positions below ``keep`` and to those above its own minus ``window``. The
    slack keeps tokens that are out of sight a little longer, so that a pass of up to ``slack + 1``
    tokens overwrites nothing that its first query sees, and up to ``slack`` tokens can be forgotten
    again.
    """

    window: int
    keep: int
    slack: int

    @property
    def size(self) -> int:
        """Slots of the whole ring, the first tokens' included."""
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

    def visible(self, slots: Any, last: Any, queries: Any) -> Any:
        # The newest position whose slot this is; below ``keep`` where there is none yet.
        stored = last - (last - slots) % (self.window + self.slack)
        shown = (stored > queries - self.window) & (stored <= queries) & (stored >= self.keep)
        if not self.keep:
            return shown
        where = mx.where if isinstance(shown, mx.array) else np.where
        return where(slots < self.keep, slots <= queries, shown)
