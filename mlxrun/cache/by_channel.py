"""Keys packed channel by channel, in groups of successive tokens.

A few channels of keys are large in every token; a group along the tokens of one channel gives them
a scale of their own (KIVI: Liu et al., 2024, arXiv:2402.02750). The most recent tokens stay plain;
which those are differs from query to query. Knows nothing of how a cache keeps what is shown here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxrun.cache.formats import Arrays, Format
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

    few = 4

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
