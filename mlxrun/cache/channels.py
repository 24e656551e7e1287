"""Keys packed channel by channel, in groups of successive tokens; the recent ones stay plain.

A few channels of keys are large in every token; a group along the tokens of one channel gives them
a scale of their own (KIVI: Liu et al., 2024, arXiv:2402.02750). A group is packed when it lies
wholly before the last ``group_size`` tokens. Each query sees what it would have seen had tokens
come one by one: within a pass the same key may be plain to one query and packed to a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx

from mlxrun.cache.base import Mask, Product
from mlxrun.cache.dense import DenseCache
from mlxrun.cache.formats import PLAIN, Arrays, Format, reads_packed, seen
from mlxrun.cache.store import Store, bucket, positions
from mlxrun.errors import CacheError


@dataclass(frozen=True)
class ByChannel(Format):
    """Keys in groups along tokens.

    Attributes:
        bits: width of a code.
        group_size: successive tokens that share a scale and a smallest value in each channel.
    """

    bits: int
    group_size: int

    multiplies = True

    @property
    def ring(self) -> int:
        """Tokens that stay plain: those not yet packed, and a group more to go back to."""
        return 3 * self.group_size

    def retired(self, offset: int) -> int:
        """How many groups are packed once ``offset`` tokens were seen."""
        return max(0, offset // self.group_size - 1)

    def pack(self, x: mx.array) -> Arrays:
        return ()  # what a token alone cannot be packed to

    def unpack(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        raise CacheError("keys by channel differ from query to query: use attend")

    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        return (
            heads * width * (self.group_size * self.bits // 8 + 2 * dtype.size) // self.group_size
        )

    def fixed_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        return self.ring * heads * width * dtype.size

    def pack_groups(self, x: mx.array) -> list[mx.array]:
        """Tokens (B, H, C groups, D) as arrays (B, H, C, ...)."""
        b, h, t, width = x.shape
        by_channel = x.reshape(b, h, -1, self.group_size, width).swapaxes(-1, -2)
        parts = mx.quantize(by_channel, self.group_size, self.bits)
        return [part.reshape(b, h, t // self.group_size, -1) for part in parts]

    def dot_groups(self, queries: mx.array, arrays: Sequence[mx.array], packed: bool) -> mx.array:
        """Products with all tokens of C groups: (B, H, N, D) to (B, H, N, C groups)."""
        b, h, n, width = queries.shape
        codes, scales, biases = (x.reshape(*x.shape[:3], width, -1) for x in arrays)
        q, group, bits = queries[:, :, None], self.group_size, self.bits
        if packed:
            scores = mx.quantized_matmul(
                q, codes, scales, biases, transpose=False, group_size=group, bits=bits
            )
        else:
            scores = q @ mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
        return scores.swapaxes(2, 3).reshape(b, h, n, -1)  # from (B, H, C, N, group)


@dataclass(frozen=True)
class ChannelKeys:
    """What queries meet: packed groups, and plain keys for what is not packed yet.

    Attributes:
        groups: arrays of C groups, (B, H, C, ...).
        plain: recent keys, (B, H, P, D).
        columns: which of them is the one at each position, (S,); any where there is none.
        retired: tokens that are packed for each query, (B or 1, 1, 1, T or 1, 1).
        packed: whether to multiply with codes as they are.
    """

    format: ByChannel
    groups: Sequence[mx.array]
    plain: mx.array
    columns: mx.array
    retired: mx.array
    packed: bool = True

    @property
    def heads(self) -> int:
        return int(self.plain.shape[1])

    def dot(self, queries: mx.array) -> mx.array:
        """Products with every token: (B, H, N, D) to (B, H, N, S)."""
        recent = (queries @ self.plain.swapaxes(-1, -2))[..., self.columns]
        if not self.groups[0].shape[2]:
            return recent
        old = self.format.dot_groups(queries, self.groups, self.packed)
        b, h, n, size = recent.shape
        old = mx.pad(old, [(0, 0), (0, 0), (0, 0), (0, size - old.shape[3])])
        queries_of_a_head = (b, h, -1, self.retired.shape[3], size)
        is_packed = mx.arange(size) < self.retired
        each = mx.where(
            is_packed, old.reshape(queries_of_a_head), recent.reshape(queries_of_a_head)
        )
        return each.reshape(b, h, n, size)


class ChannelCache(DenseCache):
    """Everything since the beginning, its keys by channel; values have any other format.

    A packed group is where it is for good, and what follows is plain in a ring: going back works
    for at least ``group_size`` tokens.
    """

    keys: ByChannel

    def __init__(self, keys: ByChannel, values: Format = PLAIN) -> None:
        super().__init__(keys, values)
        self._groups, self._recent = Store(), Store()
        self._oldest = [0]  # the first position of each row that is still in the ring

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        raise CacheError("keys by channel differ from query to query: use attend")

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, product: Product
    ) -> mx.array:
        before = list(self.offsets)
        _, v, mask = self._remember(keys, values)
        if not self._recent.arrays:
            group = mx.repeat(keys[:, :, :1], self.keys.group_size, axis=2)
            self._recent.reserve([keys], 0, self.keys.ring)
            self._groups.reserve(self.keys.pack_groups(group), 0, self._room(1))
        k = self._one(keys, before) if keys.shape[2] == 1 else self._many(keys, before[0])
        ring = self.keys.ring
        self._oldest = [
            max(oldest, offset - ring)
            for oldest, offset in zip(self._oldest, self.offsets, strict=True)
        ]
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

    def trim(self, n: int) -> int:
        lengths = [offset - n for offset in self.offsets]
        if n > 0 and min(lengths) >= 0:
            for length, oldest in zip(lengths, self._oldest, strict=True):
                if length and self.keys.retired(length) * self.keys.group_size < oldest:
                    raise CacheError(
                        f"cannot go back {n} tokens: keys before them are packed in groups of "
                        f"{self.keys.group_size} by now"
                    )
        super().trim(n)
        self._oldest = [
            oldest if offset else 0
            for oldest, offset in zip(self._oldest, self.offsets, strict=True)
        ]
        return n

    def fork(self) -> Self:
        other = super().fork()
        other._groups, other._recent = self._groups.fork(), self._recent.fork()
        other._oldest = list(self._oldest)
        return other

    @property
    def state(self) -> list[mx.array]:
        return [*super().state, *self._groups.arrays, *self._recent.arrays]

    def place(self, row: int, other: Self) -> None:
        if not self._store.arrays:
            self._oldest = []
            self._groups = Store([array[:0] for array in other._groups.arrays])
            self._recent = Store([array[:0] for array in other._recent.arrays])
        if row == len(self._oldest):
            self._oldest.append(0)
            self._groups.add_rows(1)
            self._recent.add_rows(1)
        used = self.keys.retired(other.offsets[0])
        self._groups.reserve(self._groups.arrays, self._groups.slots, self._room(used))
        self._groups.put_row(row, other._groups, used)
        self._recent.put_row(row, other._recent, self.keys.ring)
        self._oldest[row] = other._oldest[0]
        super().place(row, other)

    def clear(self, row: int) -> None:
        super().clear(row)
        self._oldest[row] = 0

    def take_rows(self, rows: Sequence[int]) -> None:
        super().take_rows(rows)
        self._groups.take_rows(rows)
        self._recent.take_rows(rows)
        self._oldest = [self._oldest[row] for row in rows]
