"""A cache whose keys are packed by channel, group by group as tokens grow old.

A group is packed when it lies wholly before the last ``group_size`` tokens. Each query sees what it
would have seen had tokens come one by one: within a pass the same key may be plain to one query and
packed to a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import mlx.core as mx

from mlxrun.cache.base import Mask, Named, Product, State
from mlxrun.cache.by_channel import ByChannel, ChannelKeys
from mlxrun.cache.dense import DenseCache
from mlxrun.cache.formats import PLAIN, Format, reads_packed, seen
from mlxrun.cache.store import Store, bucket, copied, joined, positions
from mlxrun.errors import CacheError


class ChannelCache(DenseCache):
    """Everything since the beginning, its keys by channel; values have any other format.

    A packed group is where it is for good, and what follows is plain in a ring: going back works
    for at least ``group_size`` tokens.
    """

    functional = False

    keys: ByChannel

    def __init__(self, keys: ByChannel, values: Format = PLAIN) -> None:
        super().__init__(keys, values)
        self._groups, self._recent = Store(), Store()

    @property
    def tokens_at_once(self) -> int:
        return 1

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        raise CacheError("keys by channel differ from query to query: use attend")

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, product: Product
    ) -> mx.array:
        before = list(self.offsets)
        _, v, mask = self._remember(keys, values)
        if not self._recent.arrays:
            group = mx.repeat(keys[:, :, :1], self.keys.group_size, axis=2)
            self._recent.reserve([keys], 0, self.keys.ring)
            self._groups.reserve(self.keys.pack_groups(group), 0, self._room(1))
        k = self._one(keys, before) if keys.shape[2] == 1 else self._many(keys, before[0])
        if not reads_packed(k, v, queries):
            k, v = replace(k, packed=False), seen(v.plain())
        return product.stored(queries, k, v, mask)

    def _one(self, keys: mx.array, before: list[int]) -> ChannelKeys:
        """A token of each row: into the ring, and a group that is old enough out of it."""
        form, ring = self.keys, self.keys.ring
        if len(before) == 1:
            self._recent.write(before[0] % ring, [keys])
        else:
            slots = positions(tuple(offset % ring for offset in before))
            self._recent.write_each(slots.reshape(-1, 1, 1, 1), [keys])
        for row, offset in enumerate(before):
            group = form.retired(offset)
            if form.retired(offset + 1) > group:
                rows = slice(None) if len(before) == 1 else slice(row, row + 1)
                start = group * form.group_size % ring
                old = self._recent.arrays[0][rows, :, start : start + form.group_size]
                self._retire(rows, group, old)
        retired = positions(tuple(form.retired(n) * form.group_size for n in self.offsets))
        columns = mx.arange(max(self.offsets)) % ring
        return self._shown(self._recent.arrays[0], columns, retired.reshape(-1, 1, 1, 1, 1))

    def _many(self, keys: mx.array, offset: int) -> ChannelKeys:
        """Tokens of rows that move together."""
        form, end = self.keys, offset + keys.shape[2]
        group = form.retired(offset)
        start = group * form.group_size
        ring = self._recent.arrays[0]
        waiting = ring[:, :, mx.arange(start, offset) % form.ring]
        plain = mx.concatenate([waiting, keys], axis=2)  # from position ``start`` on
        if form.retired(end) > group:
            count = (form.retired(end) - group) * form.group_size
            self._retire(slice(None), group, plain[:, :, :count])
        stay = min(keys.shape[2], form.ring)
        ring[:, :, mx.arange(end - stay, end) % form.ring] = keys[:, :, -stay:]
        seen_by = mx.arange(offset + 1, end + 1) // form.group_size - 1
        retired = mx.maximum(seen_by, 0) * form.group_size
        columns = mx.maximum(mx.arange(end) - start, 0)
        return self._shown(plain, columns, retired.reshape(1, 1, 1, -1, 1))

    def _shown(self, plain: mx.array, columns: mx.array, retired: mx.array) -> ChannelKeys:
        held = self.keys.retired(max(self.offsets))
        return ChannelKeys(self.keys, self._groups.view(held), plain, columns, retired)

    def _retire(self, rows: slice, group: int, keys: mx.array) -> None:
        """Pack whole groups of some rows."""
        arrays = self.keys.pack_groups(keys)
        end = group + arrays[0].shape[2]
        self._groups.reserve(self._groups.arrays, self._groups.slots, self._room(end))
        for held, new in zip(self._groups.arrays, arrays, strict=True):
            held[rows, :, group:end] = new

    def _room(self, groups: int) -> int:
        """How many groups to allocate where some are needed."""
        return bucket(groups * self.keys.group_size) // self.keys.group_size

    def _check_truncation(self, row: int, length: int) -> None:
        # What was packed and is to be plain again must still be in the ring.
        oldest = self.written[row] - self.keys.ring
        if length and self.keys.retired(length) * self.keys.group_size < oldest:
            raise CacheError(
                f"cannot go back {self.offsets[row] - length} tokens: keys before them are packed "
                f"in groups of {self.keys.group_size} by now"
            )

    def fork(self) -> Self:
        other = super().fork()
        other._groups, other._recent = self._groups.fork(), self._recent.fork()
        return other

    @property
    def by_token(self) -> bool:
        return False

    def cut(self, start: int, stop: int) -> Named:
        return {}

    def snapshot(self) -> State | None:
        offset = self.offsets[0]
        stores = (self._store, offset), (self._groups, self.keys.retired(offset))
        arrays = [copied(x, 0, used) for store, used in stores for x in store.arrays]
        arrays.extend(copied(x, 0, self.keys.ring) for x in self._recent.arrays)
        about = {"offset": offset, "oldest": max(0, self.written[0] - self.keys.ring)}
        return State({str(i): x for i, x in enumerate(arrays)}, about)

    def restore(self, tokens: Sequence[Named], state: State | None, length: int) -> None:
        assert state is not None
        offset, arrays = int(state.about["offset"]), state.arrays
        *of_values, first, second, third, ring = (str(i) for i in range(len(arrays)))
        groups = self.keys.retired(offset)
        self._store = Store(
            [joined([arrays], x, offset, self._capacity(offset)) for x in of_values]
        )
        self._groups = Store(
            [joined([arrays], x, groups, self._room(groups)) for x in (first, second, third)]
        )
        self._recent = Store([joined([arrays], ring, self.keys.ring, self.keys.ring)])
        oldest = int(state.about["oldest"])
        self.offsets, self.written = (
            [offset],
            [max(offset, oldest + self.keys.ring if oldest else 0)],
        )
        self.trim(offset - length)

    def only(self, row: int) -> Self:
        other = super().only(row)
        other._groups, other._recent = (
            Store([x[row : row + 1] for x in store.arrays])
            for store in (self._groups, self._recent)
        )
        return other

    @property
    def state(self) -> list[mx.array]:
        return [*super().state, *self._groups.arrays, *self._recent.arrays]

    def place(self, row: int, other: Self) -> None:
        if not self._store.arrays:
            self._groups = Store([array[:0] for array in other._groups.arrays])
            self._recent = Store([array[:0] for array in other._recent.arrays])
        super().place(row, other)
        used = self.keys.retired(other.offsets[0])
        self._groups.reserve(self._groups.arrays, self._groups.slots, self._room(used))
        self._groups.put_row(row, other._groups, used)
        self._recent.put_row(row, other._recent, self.keys.ring)

    def add_rows(self, count: int) -> None:
        super().add_rows(count)
        self._groups.add_rows(count)
        self._recent.add_rows(count)

    def take_rows(self, rows: Sequence[int]) -> None:
        super().take_rows(rows)
        self._groups.take_rows(rows)
        self._recent.take_rows(rows)
