"""What caches of keys and values share: rows, formats, and going back.

Rows move together (one sequence, or a batch of equal lengths) until :meth:`RowCache.join` gives
each an offset of its own; then they move by one token at a time. A row joins and leaves without
disturbing the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Self

import mlx.core as mx

from mlxrun.cache.base import Cache, Mask, Named, Product, State
from mlxrun.cache.formats import PLAIN, Format, Seen, reads_packed
from mlxrun.cache.store import Store, copied, joined, places, positions
from mlxrun.errors import CacheError


class RowCache(Cache):
    """Keys and values in slots.

    Args:
        keys, values: how each is stored.

    Attributes:
        offsets: tokens seen by each row, or one number for all of them.
        functional: whether one more token of each row can be a pure function of its arrays; see
            :mod:`mlxrun.cache.functional`.
    """

    functional = False

    def __init__(self, keys: Format = PLAIN, values: Format = PLAIN) -> None:
        self.keys, self.values = keys, values
        self.offsets: list[int] = [0]
        self._store = Store()
        self._split = 0  # how many of the arrays hold keys

    @abstractmethod
    def _slot(self, position: int) -> int:
        """Where the token at a position lives."""

    @abstractmethod
    def _held(self, offset: int) -> int:
        """Slots in use once ``offset`` tokens were seen."""

    @abstractmethod
    def _capacity(self, slots: int) -> int:
        """How many slots to allocate where ``slots`` are needed."""

    @abstractmethod
    def _append(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        """Store tokens of rows that move together; what they attend to, and the mask."""

    def slot_at(self, positions: mx.array) -> mx.array:
        """As :meth:`_slot`, for many; where ``functional``."""
        raise NotImplementedError

    def held_at(self, offsets: mx.array) -> mx.array:
        """As :meth:`_held`, for many; where ``functional``."""
        raise NotImplementedError

    @property
    def layout(self) -> Hashable:
        """Equal for caches where tokens live in the same slots."""
        return None

    @property
    def fixed(self) -> list[mx.array]:
        """What queries meet besides :attr:`state`, and no step changes."""
        return []

    def bare(self) -> Self:
        """A cache of the same kind that holds nothing, nor what is ``fixed``."""
        return self.empty()

    def meet(
        self,
        product: Product,
        queries: mx.array,
        keys: Seen,
        values: Seen,
        mask: Mask,
        fixed: Sequence[mx.array],
    ) -> mx.array:
        """Let queries meet what their rows hold, and what is ``fixed``."""
        return meet(product, queries, keys, values, mask)

    def slots_after(self, tokens: int) -> int:
        """Slots in use once each row has so many more tokens, at most."""
        return self._held(max(self.offsets) + tokens)

    @property
    def capacity(self) -> int:
        """Slots of each row; the same in caches of one layout that move together."""
        return self._store.slots

    def make_room(self) -> None:
        """Have slots for one more token of each row."""
        need = self._capacity(self.slots_after(1))
        self._store.reserve(self._store.arrays, self.slots_after(0), need)

    def advance(self, arrays: Sequence[mx.array]) -> None:
        """Take over arrays into which one more token of each row was written."""
        self._store.arrays = list(arrays)
        self.offsets = [offset + 1 for offset in self.offsets]

    @property
    def offset(self) -> int:  # type: ignore[override]
        return min(self.offsets)

    @property
    def position(self) -> int | mx.array:
        return self.offsets[0] if len(self.offsets) == 1 else positions(tuple(self.offsets))

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        k, v, mask = self._remember(keys, values)
        return k.plain(), v.plain(), mask

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, product: Product
    ) -> mx.array:
        return self.meet(product, queries, *self._remember(keys, values), self.fixed)

    def _remember(self, keys: mx.array, values: mx.array) -> tuple[Seen, Seen, Mask]:
        packed = self.keys.pack(keys)
        self._split = len(packed)
        tokens = [*packed, *self.values.pack(values)]
        shown, mask = self._append_each(tokens) if len(self.offsets) > 1 else self._append(tokens)
        count = keys.shape[2]
        self.offsets = [offset + count for offset in self.offsets]
        return (
            Seen(self.keys, tuple(shown[: self._split]), keys.shape[1], keys.dtype),
            Seen(self.values, tuple(shown[self._split :]), values.shape[1], values.dtype),
            mask,
        )

    def _append_each(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        """Store one token of each row in its own slot."""
        if tokens[0].shape[2] != 1:
            raise CacheError("rows with offsets of their own move by one token at a time")
        held = tuple(self._held(offset + 1) for offset in self.offsets)
        slots, mask = places(tuple(self._slot(offset) for offset in self.offsets), held)
        used = max(self._held(offset) for offset in self.offsets)
        self._store.reserve(tokens, used, self._capacity(max(held)))
        self._store.write_each(slots, tokens)
        return self._store.view(max(held)), mask

    def trim(self, n: int) -> int:
        seen = min(self.offsets)
        if not 0 <= n <= seen:
            raise CacheError(f"cannot forget {n} of {seen} tokens")
        self.offsets = [offset - n for offset in self.offsets]
        return n

    @property
    def kind(self) -> str:
        return f"{type(self).__name__} {self.keys} {self.values}"

    def cut(self, start: int, stop: int) -> Named:
        return {}

    def snapshot(self) -> State | None:
        used = self._held(self.offsets[0])
        arrays = {str(i): copied(a, 0, used) for i, a in enumerate(self._store.arrays)}
        return State(arrays, {"offset": self.offsets[0]})

    def restore(self, tokens: Sequence[Named], state: State | None, length: int) -> None:
        assert state is not None
        self.offsets = [int(state.about["offset"])]
        self.trim(self.offsets[0] - length)
        self._fill([state.arrays], self._held(length))

    def _fill(self, parts: Sequence[Named], slots: int) -> None:
        """Take the first slots of arrays that lie one behind the other."""
        capacity = self._capacity(slots)
        self._store = Store([joined(parts, str(i), slots, capacity) for i in range(len(parts[0]))])

    def only(self, row: int) -> Self:
        """A cache that has just one of the rows, to be read."""
        other = self.empty()
        other.offsets, other._split = [self.offsets[row]], self._split
        other._store = Store([array[row : row + 1] for array in self._store.arrays])
        return other

    def fork(self) -> Self:
        other = self.empty()
        other.offsets, other._split = list(self.offsets), self._split
        other._store = self._store.fork()
        return other

    def empty(self) -> Self:
        """A cache of the same kind that remembers nothing."""
        return type(self)(self.keys, self.values)

    @property
    def state(self) -> list[mx.array]:
        return self._store.arrays

    def place(self, row: int, other: Self) -> None:
        """Put what another cache of one row remembers into a row of this one.

        Args:
            row: one of those that are there, or the next.
        """
        if not self._store.arrays:  # the first row decides on heads, widths and dtypes
            self.offsets, self._split = [], other._split
            self._store = Store([array[:0] for array in other._store.arrays])
        if row == len(self.offsets):
            self.add_rows(1)
        used, need = self._held(max(self.offsets)), self._held(other.offsets[0])
        self._store.reserve(self._store.arrays, used, self._capacity(need))
        self._store.put_row(row, other._store, need)
        self.offsets[row] = other.offsets[0]

    def add_rows(self, count: int) -> None:
        """Have more rows, which remember nothing; there is one already."""
        self.offsets.extend([0] * count)
        self._store.add_rows(count)

    def clear(self, row: int) -> None:
        """Forget what a row remembers; it stays, to be used again."""
        self.offsets[row] = 0

    def take_rows(self, rows: Sequence[int]) -> None:
        """Keep some rows, in that order."""
        self.offsets = [self.offsets[row] for row in rows]
        self._store.take_rows(rows)


def meet(product: Product, queries: mx.array, keys: Seen, values: Seen, mask: Mask) -> mx.array:
    """Queries (B, heads, T, D) and what they see, packed or not, as is faster."""
    if reads_packed(keys, values, queries):
        return product.stored(queries, keys, values, mask)
    return product(queries, keys.plain(), values.plain(), mask)
