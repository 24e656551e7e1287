"""Keys quantized per channel, in groups of successive tokens.

A few channels of keys are large in every token; a group along the tokens of one channel gives them
a scale of their own (KIVI: Liu et al., 2024, arXiv:2402.02750). A group is quantized once it lies
wholly before the last ``group_size`` tokens; recent tokens stay unquantized. Each query sees the
keys as they would be had tokens come one by one: within a pass the same key may be unquantized for
one query and quantized for a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp
from mlxrun.kv_cache.base import Arrays, State
from mlxrun.kv_cache.dense import DenseCache, Store, bucket, copied, joined, positions
from mlxrun.kv_cache.formats import PLAIN, Format, Packed, as_stored, reads_packed


@dataclass(frozen=True)
class PerChannel(Format):
    """Keys in groups along tokens; ``group_size`` tokens share a scale and bias per channel."""

    bits: int
    group_size: int

    max_packed_queries = 4

    @property
    def ring(self) -> int:
        """Tokens that stay unquantized: the last two groups, and one more to be truncated to."""
        return 3 * self.group_size

    def full_groups(self, offset: int) -> int:
        """How many groups are quantized after ``offset`` tokens."""
        return max(0, offset // self.group_size - 1)

    def pack(self, x: mx.array) -> Packed:
        return ()  # a token by itself is no group

    def unpack(self, arrays: Packed, dtype: mx.Dtype) -> mx.array:
        raise CacheError("keys by channel differ from query to query: use attend")

    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        return (
            heads * width * (self.group_size * self.bits // 8 + 2 * dtype.size) // self.group_size
        )

    def fixed_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        return self.ring * heads * width * dtype.size

    def pack_groups(self, x: mx.array) -> list[mx.array]:
        """Tokens (R, H, C groups, D) as arrays (R, H, C, ...)."""
        b, h, t, width = x.shape
        by_channel = x.reshape(b, h, -1, self.group_size, width).swapaxes(-1, -2)
        parts = mx.quantize(by_channel, self.group_size, self.bits)
        return [part.reshape(b, h, t // self.group_size, -1) for part in parts]

    def dot_groups(self, queries: mx.array, arrays: Sequence[mx.array], packed: bool) -> mx.array:
        """Products with all tokens of C groups: (R, H, N, D) to (R, H, N, C group_size)."""
        b, h, n, width = queries.shape
        codes, scales, biases = (x.reshape(*x.shape[:3], width, -1) for x in arrays)
        q, group, bits = queries[:, :, None], self.group_size, self.bits
        if packed:
            scores = mx.quantized_matmul(
                q, codes, scales, biases, transpose=False, group_size=group, bits=bits
            )
        else:
            scores = q @ mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
        return scores.swapaxes(2, 3).reshape(b, h, n, -1)  # from (R, H, C, N, group)


@dataclass(frozen=True)
class PerChannelKeys:
    """Keys of a pass: quantized groups, and unquantized keys.

    Attributes:
        groups: arrays of C groups, (R, H, C, ...).
        recent: unquantized keys, (R, H, P, D).
        columns: index into ``recent`` of each position, (S,); any where it is quantized.
        quantized: tokens that are quantized for each query, (R or 1, 1, 1, T or 1, 1).
        packed: whether to multiply with codes as they are.
    """

    format: PerChannel
    groups: Sequence[mx.array]
    recent: mx.array
    columns: mx.array
    quantized: mx.array
    packed: bool = True

    @property
    def heads(self) -> int:
        return int(self.recent.shape[1])

    def dot(self, queries: mx.array) -> mx.array:
        """Products with every token: (R, H, N, D) to (R, H, N, S)."""
        recent = (queries @ self.recent.swapaxes(-1, -2))[..., self.columns]
        if not self.groups[0].shape[2]:
            return recent
        old = self.format.dot_groups(queries, self.groups, self.packed)
        b, h, n, size = recent.shape
        old = mx.pad(old, [(0, 0), (0, 0), (0, 0), (0, size - old.shape[3])])
        by_query = (b, h, -1, self.quantized.shape[3], size)
        is_quantized = mx.arange(size) < self.quantized
        scores = mx.where(is_quantized, old.reshape(by_query), recent.reshape(by_query))
        return scores.reshape(b, h, n, size)


class PerChannelCache(DenseCache):
    """Every token since the start, keys per channel; values have any other format.

    A quantized group stays where it is, and later keys lie in a ring: at least ``group_size``
    tokens can be truncated.
    """

    functional = False

    keys: PerChannel

    def __init__(self, keys: PerChannel, values: Format = PLAIN) -> None:
        super().__init__(keys, values)
        self._groups, self._recent = Store(), Store()

    @property
    def _stores(self) -> list[Store]:
        return [self._store, self._groups, self._recent]

    @property
    def tokens_at_once(self) -> int:
        return 1

    @property
    def rollback(self) -> int:
        return self.keys.group_size

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        op: AttentionOp,
        counts: Sequence[int] | None,
    ) -> mx.array:
        before = list(self.offsets)
        _, v, mask = self._store_tokens(keys, values, counts)
        if not self._recent.arrays:
            group = mx.repeat(keys[:, :, :1], self.keys.group_size, axis=2)
            self._recent.reserve([keys], 0, self.keys.ring)
            self._groups.reserve(self.keys.pack_groups(group), 0, self._room(1))
        k = (
            self._append_one(keys, before)
            if keys.shape[2] == 1
            else self._append_keys(keys, before[0])
        )
        if not reads_packed(k, v, queries):
            k, v = replace(k, packed=False), as_stored(v.unpacked())
        return op.attend_quantized(queries, k, v, mask)

    def _append_one(self, keys: mx.array, before: list[int]) -> PerChannelKeys:
        """One token of each row into the ring; quantizes groups that are now old enough."""
        form, ring = self.keys, self.keys.ring
        if len(before) == 1:
            self._recent.write(before[0] % ring, [keys])
        else:
            slots = positions(tuple(offset % ring for offset in before))
            self._recent.write_each(slots.reshape(-1, 1, 1, 1), [keys])
        for row, (offset, end) in enumerate(zip(before, self.offsets, strict=True)):
            group = form.full_groups(offset)
            if form.full_groups(end) > group:
                rows = slice(None) if len(before) == 1 else slice(row, row + 1)
                start = group * form.group_size % ring
                old = self._recent.arrays[0][rows, :, start : start + form.group_size]
                self._quantize(rows, group, old)
        quantized = positions(tuple(form.full_groups(n) * form.group_size for n in self.offsets))
        columns = mx.arange(max(before) + 1) % ring
        return self._view(self._recent.arrays[0], columns, quantized.reshape(-1, 1, 1, 1, 1))

    def _append_keys(self, keys: mx.array, offset: int) -> PerChannelKeys:
        """Several tokens of a single row."""
        form, end = self.keys, offset + keys.shape[2]
        group = form.full_groups(offset)
        start = group * form.group_size
        ring = self._recent.arrays[0]
        waiting = ring[:, :, mx.arange(start, offset) % form.ring]
        recent = mx.concatenate([waiting, keys], axis=2)  # from position ``start`` on
        if form.full_groups(end) > group:
            count = (form.full_groups(end) - group) * form.group_size
            self._quantize(slice(None), group, recent[:, :, :count])
        stay = min(keys.shape[2], form.ring)
        ring[:, :, mx.arange(end - stay, end) % form.ring] = keys[:, :, -stay:]
        groups = mx.maximum(mx.arange(offset + 1, end + 1) // form.group_size - 1, 0)
        columns = mx.maximum(mx.arange(end) - start, 0)
        return self._view(recent, columns, (groups * form.group_size).reshape(1, 1, 1, -1, 1))

    def _view(self, recent: mx.array, columns: mx.array, quantized: mx.array) -> PerChannelKeys:
        groups = self._groups.view(self.keys.full_groups(max(self.offsets)))
        return PerChannelKeys(self.keys, groups, recent, columns, quantized)

    def _quantize(self, rows: slice, group: int, keys: mx.array) -> None:
        """Store whole groups of some rows, from one group on."""
        arrays = self.keys.pack_groups(keys)
        end = group + arrays[0].shape[2]
        self._groups.reserve(self._groups.arrays, self._groups.slots, self._room(end))
        for stored, new in zip(self._groups.arrays, arrays, strict=True):
            stored[rows, :, group:end] = new

    def _room(self, groups: int) -> int:
        """How many groups to allocate if ``groups`` are needed."""
        return bucket(groups * self.keys.group_size) // self.keys.group_size

    def _oldest(self, row: int) -> int:
        """The first position of a row that is still in the ring."""
        return max(0, self.longest(row) - self.keys.ring)

    def _check_truncation(self, row: int, length: int) -> None:
        # Keys that become recent again must still be in the ring.
        if length and self.keys.full_groups(length) * self.keys.group_size < self._oldest(row):
            raise CacheError(
                f"cannot go back {self.offsets[row] - length} tokens: keys before them are packed "
                f"in groups of {self.keys.group_size} by now"
            )

    @property
    def sliceable(self) -> bool:
        return False

    def slice_tokens(self, start: int, stop: int) -> Arrays:
        return {}

    def snapshot(self) -> State | None:
        offset = self.offsets[0]
        stores = (self._store, offset), (self._groups, self.keys.full_groups(offset))
        arrays = [copied(x, 0, used) for store, used in stores for x in store.arrays]
        arrays.extend(copied(x, 0, self.keys.ring) for x in self._recent.arrays)
        metadata = {"offset": offset, "oldest": self._oldest(0)}
        return State({str(i): x for i, x in enumerate(arrays)}, metadata)

    def restore(self, tokens: Sequence[Arrays], state: State | None, length: int) -> None:
        assert state is not None
        offset, oldest = int(state.metadata["offset"]), int(state.metadata["oldest"])
        arrays, ring, groups = state.arrays, self.keys.ring, self.keys.full_groups(offset)
        *of_values, codes, scales, biases, recent = (str(i) for i in range(len(arrays)))

        def store(names: Sequence[str], used: int, slots: int) -> Store:
            return Store([joined([arrays], name, used, slots) for name in names])

        self._store = store(of_values, offset, self._capacity(offset))
        self._groups = store((codes, scales, biases), groups, self._room(groups))
        self._recent = store((recent,), ring, ring)
        self.offsets, self.high_water = [offset], [max(offset, oldest + ring if oldest else 0)]
        self.truncate(0, offset - length)

    def place(self, row: int, other: Self) -> None:
        super().place(row, other)
        used = self.keys.full_groups(other.offsets[0])
        self._groups.reserve(self._groups.arrays, self._groups.slots, self._room(used))
        self._groups.put_row(row, other._groups, used)
        self._recent.put_row(row, other._recent, self.keys.ring)
