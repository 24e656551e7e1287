"""Keys and values of rows, each with an offset of its own.

A pass appends the same number of tokens to every row (:meth:`RowCache.attend`), or a number of its
own to each (:meth:`RowCache.attend_ragged`), and any row can be rolled back by itself
(:meth:`RowCache.truncate`). A row joins and leaves without disturbing the others.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from mlxrun.cache.base import Cache, Mask, Named, Product
from mlxrun.cache.formats import PLAIN, Format, Seen, reads_packed
from mlxrun.cache.slots import Layout
from mlxrun.cache.store import Store, joined, places, positions
from mlxrun.errors import CacheError


class RowCache(Cache):
    """Keys and values in slots.

    Args:
        layout: which slot holds which token.
        keys, values: how each is stored.

    Attributes:
        offsets: tokens seen by each row, or one number for all of them.
        written: the most tokens that each row has had since it was empty: what it was rolled back
            from may have overwritten others.
        functional: whether one more token of each row can be a pure function of its arrays; see
            :mod:`mlxrun.cache.functional`.
    """

    functional = False

    def __init__(self, layout: Layout, keys: Format = PLAIN, values: Format = PLAIN) -> None:
        self.layout, self.keys, self.values = layout, keys, values
        self.offsets: list[int] = [0]
        self.written: list[int] = [0]
        self._store = Store()
        self._split = 0  # how many of the arrays hold keys

    @abstractmethod
    def _capacity(self, slots: int) -> int:
        """How many slots to allocate where ``slots`` are needed."""

    @abstractmethod
    def _append(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        """Store tokens of rows that move together; what they attend to, and the mask."""

    @property
    def tokens_at_once(self) -> int:
        """The most tokens that one operation appends to each of several rows."""
        return sys.maxsize

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
        return self.layout.used(max(self.offsets) + tokens)

    @property
    def capacity(self) -> int:
        """Slots of each row; the same in caches of one layout that move together."""
        return self._store.slots

    def make_room(self, tokens: int = 1) -> None:
        """Have slots for more tokens of each row."""
        need = self._capacity(self.slots_after(tokens))
        self._store.reserve(self._store.arrays, self.slots_after(0), need)

    def advance(self, arrays: Sequence[mx.array], tokens: int = 1) -> None:
        """Take over arrays into which more tokens of each row were written."""
        self._store.arrays = list(arrays)
        self._advance(tokens)

    def _advance(self, tokens: int) -> None:
        self.offsets = [offset + tokens for offset in self.offsets]
        self.written = list(map(max, self.written, self.offsets))

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
        tokens, most = keys.shape[2], self.tokens_at_once
        if len(self.offsets) == 1 or tokens <= most:
            return self._attend(queries, keys, values, product)
        parts = []
        for at in range(0, tokens, most):
            q, k, v = (x[:, :, at : at + most] for x in (queries, keys, values))
            parts.append(self._attend(q, k, v, product))
        return mx.concatenate(parts, axis=2)

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, product: Product
    ) -> mx.array:
        return self.meet(product, queries, *self._remember(keys, values), self.fixed)

    def attend_ragged(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        product: Product,
        counts: Sequence[int],
    ) -> mx.array:
        """As :meth:`attend`, but of a row's T tokens only the first so many are its own.

        Padding is appended like tokens and forgotten again; what it attends to means nothing.
        """
        tokens = keys.shape[2]
        most, parts = min(tokens, self.tokens_at_once), []
        for start in range(0, tokens, most):
            stop = min(start + most, tokens)
            q, k, v = (x[:, :, start:stop] for x in (queries, keys, values))
            parts.append(self._attend(q, k, v, product))
            for row, count in enumerate(counts):
                self.truncate(row, stop - min(stop, max(start, count)))
        return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]

    def _remember(self, keys: mx.array, values: mx.array) -> tuple[Seen, Seen, Mask]:
        packed = self.keys.pack(keys)
        self._split = len(packed)
        tokens = [*packed, *self.values.pack(values)]
        shown, mask = self._append_each(tokens) if len(self.offsets) > 1 else self._append(tokens)
        self._advance(keys.shape[2])
        return (
            Seen(self.keys, tuple(shown[: self._split]), keys.shape[1], keys.dtype),
            Seen(self.values, tuple(shown[self._split :]), values.shape[1], values.dtype),
            mask,
        )

    def _append_each(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        """Store T tokens of each row in slots of its own."""
        count = tokens[0].shape[2]
        used = self.slots_after(count)
        slots, mask = places(self.layout, tuple(self.offsets), count, used)
        self._store.reserve(tokens, self.slots_after(0), self._capacity(used))
        self._store.write_each(slots, tokens)
        return self._store.view(used), mask

    def trim(self, n: int) -> int:
        for row in range(len(self.offsets)):
            self._check_truncation_by(row, n)
        for row in range(len(self.offsets)):
            self.truncate(row, n)
        return n

    def truncate(self, row: int, n: int) -> None:
        self._check_truncation_by(row, n)
        self.offsets[row] -= n
        if not self.offsets[row]:
            self.written[row] = 0

    def _check_truncation_by(self, row: int, n: int) -> None:
        seen = self.offsets[row]
        if not 0 <= n <= seen:
            raise CacheError(f"cannot forget {n} of {seen} tokens")
        if n:
            self._check_truncation(row, seen - n)

    def _check_truncation(self, row: int, length: int) -> None:
        """Raise CacheError where a row cannot go back to a length."""

    @property
    def kind(self) -> str:
        return f"{type(self).__name__} {self.keys} {self.values}"

    def cut(self, start: int, stop: int) -> Named:
        return {}

    def _fill(self, parts: Sequence[Named], slots: int) -> None:
        """Take the first slots of arrays that lie one behind the other."""
        capacity = self._capacity(slots)
        self._store = Store([joined(parts, str(i), slots, capacity) for i in range(len(parts[0]))])

    def only(self, row: int) -> Self:
        """A cache that has just one of the rows, to be read."""
        other = self.empty()
        other.offsets, other.written = [self.offsets[row]], [self.written[row]]
        other._split = self._split
        other._store = Store([array[row : row + 1] for array in self._store.arrays])
        return other

    def fork(self) -> Self:
        other = self.empty()
        other.offsets, other.written = list(self.offsets), list(self.written)
        other._split = self._split
        other._store = self._store.fork()
        return other

    @abstractmethod
    def empty(self) -> Self:
        """A cache of the same kind without tokens."""

    @property
    def state(self) -> list[mx.array]:
        return self._store.arrays

    def place(self, row: int, other: Self) -> None:
        """Put what another cache of one row remembers into a row of this one.

        Args:
            row: one of those that are there, or the next.
        """
        if not self._store.arrays:  # the first row decides on heads, widths and dtypes
            self.offsets, self.written, self._split = [], [], other._split
            self._store = Store([array[:0] for array in other._store.arrays])
        if row == len(self.offsets):
            self.add_rows(1)
        used, need = self.slots_after(0), other.slots_after(0)
        self._store.reserve(self._store.arrays, used, self._capacity(need))
        self._store.put_row(row, other._store, need)
        self.offsets[row], self.written[row] = other.offsets[0], other.written[0]

    def add_rows(self, count: int) -> None:
        """Have more rows, which remember nothing; there is one already."""
        self.offsets.extend([0] * count)
        self.written.extend([0] * count)
        self._store.add_rows(count)

    def clear(self, row: int) -> None:
        """Forget what a row remembers; it stays, to be used again."""
        self.offsets[row] = self.written[row] = 0

    def take_rows(self, rows: Sequence[int]) -> None:
        """Keep some rows, in that order."""
        self.offsets = [self.offsets[row] for row in rows]
        self.written = [self.written[row] for row in rows]
        self._store.take_rows(rows)


def meet(product: Product, queries: mx.array, keys: Seen, values: Seen, mask: Mask) -> mx.array:
    """Queries (B, heads, T, D) and what they see, packed or not, as is faster."""
    if reads_packed(keys, values, queries):
        return product.stored(queries, keys, values, mask)
    return product(queries, keys.plain(), values.plain(), mask)
