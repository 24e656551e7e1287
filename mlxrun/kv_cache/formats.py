"""How keys and values are stored: unpacked, or quantized in groups that share a scale.

A format turns tokens (R, H, T, D) into arrays with the tokens along the same axis, so that caches
move tokens without knowing their format. Each token is packed by itself: what is stored does not
depend on the tokens that came with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlxrun.errors import ParameterError
from mlxrun.kernels.device import device
from mlxrun.kv_cache.options import CacheType

Packed = tuple[mx.array, ...]


class Format(ABC):
    """How tokens are stored.

    Attributes:
        max_packed_queries: queries per key head up to which MLX's quantized products on the CPU
            are faster than unpacking (measured with heads of 64); 0 if nothing is packed.
    """

    max_packed_queries = 0

    @abstractmethod
    def pack(self, x: mx.array) -> Packed:
        """Tokens (R, H, T, D) as arrays (R, H or 1, T, ...)."""

    @abstractmethod
    def unpack(self, arrays: Packed, dtype: mx.Dtype) -> mx.array:
        """The tokens again, (R, H, T, D)."""

    @abstractmethod
    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        """Bytes of a token of ``dtype`` in one layer of H heads of width D."""

    def fixed_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        """Bytes that do not depend on the number of tokens."""
        return 0

    def dot(self, queries: mx.array, arrays: Packed) -> mx.array:
        """Products with every token: (R, H, N, D) to (R, H, N, T)."""
        return queries @ self.unpack(arrays, queries.dtype).swapaxes(-1, -2)

    def mix(self, weights: mx.array, arrays: Packed) -> mx.array:
        """Weighted sums of all tokens: (R, H, N, T) to (R, H, N, D)."""
        return weights @ self.unpack(arrays, weights.dtype)


@dataclass(frozen=True)
class Plain(Format):
    """Floating-point numbers of ``dtype``; None for that of the activations."""

    dtype: mx.Dtype | None = None

    def pack(self, x: mx.array) -> Packed:
        return (x if self.dtype is None else x.astype(self.dtype),)

    def unpack(self, arrays: Packed, dtype: mx.Dtype) -> mx.array:
        return arrays[0] if self.dtype is None else arrays[0].astype(dtype)

    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        return heads * width * (self.dtype or dtype).size


@dataclass(frozen=True)
class Quantized(Format):
    """One of MLX's quantized forms (``affine`` or ``mxfp8``), in groups along each head's width."""

    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def max_packed_queries(self) -> int:  # type: ignore[override]
        return 4 if self.mode == "affine" else 1

    def pack(self, x: mx.array) -> Packed:
        return tuple(mx.quantize(x, self.group_size, self.bits, self.mode))

    def unpack(self, arrays: Packed, dtype: mx.Dtype) -> mx.array:
        codes, scales, *biases = arrays
        return mx.dequantize(
            codes, scales, biases[0] if biases else None,
            group_size=self.group_size, bits=self.bits, mode=self.mode, dtype=dtype,
        )  # fmt: skip

    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        per_group = 2 * dtype.size if self.mode == "affine" else 1
        return heads * (width * self.bits // 8 + width // self.group_size * per_group)

    def dot(self, queries: mx.array, arrays: Packed) -> mx.array:
        return self._product(queries, arrays, transpose=True)

    def mix(self, weights: mx.array, arrays: Packed) -> mx.array:
        return self._product(weights, arrays, transpose=False)

    def _product(self, x: mx.array, arrays: Packed, *, transpose: bool) -> mx.array:
        codes, scales, *biases = arrays
        return mx.quantized_matmul(
            x, codes, scales, biases[0] if biases else None, transpose=transpose,
            group_size=self.group_size, bits=self.bits, mode=self.mode,
        )  # fmt: skip


@dataclass(frozen=True)
class AcrossHeads(Format):
    """Groups that run on from head to head, where no group divides a head.

    MLX multiplies rows of whole groups only, so products unpack first.

    Attributes:
        inner: the format of a token's concatenated heads.
        heads: how many they are.
    """

    inner: Quantized
    heads: int

    def pack(self, x: mx.array) -> Packed:
        b, _, t, _ = x.shape
        return self.inner.pack(x.transpose(0, 2, 1, 3).reshape(b, 1, t, -1))

    def unpack(self, arrays: Packed, dtype: mx.Dtype) -> mx.array:
        whole = self.inner.unpack(arrays, dtype)  # (B, 1, T, H D)
        b, _, t, _ = whole.shape
        return whole.reshape(b, t, self.heads, -1).transpose(0, 2, 1, 3)

    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        return self.inner.token_bytes(1, heads * width, dtype)


PLAIN = Plain()
# Queries per key head that a GPU multiplies with packed codes; not measured.
GPU_PACKED_QUERIES = 32
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def format_of(cache_type: CacheType | None, heads: int, width: int) -> Format:
    """The format of a type for H heads of width D.

    Groups run along a head's width if one divides it, else along all heads of a token.

    Raises:
        ParameterError: no group divides either.
    """
    if cache_type is None:
        return PLAIN
    if cache_type.bits is None:
        return Plain(DTYPES[str(cache_type.dtype)])
    for group in cache_type.groups:
        if width % group == 0:
            return Quantized(cache_type.bits, group, cache_type.mode)
    for group in cache_type.groups:
        if heads * width % group == 0:
            return AcrossHeads(Quantized(cache_type.bits, group, cache_type.mode), heads)
    groups = " or ".join(map(str, sorted(cache_type.groups)))
    raise ParameterError(
        "the type of a cache",
        cache_type.name,
        f"a plain one such as f16 here: groups of {groups} divide neither the heads of this "
        f"model, {width} wide, nor all {heads} together",
    )


class KeyView(Protocol):
    """Keys that queries are scored against, however they are stored."""

    @property
    def format(self) -> Format: ...

    @property
    def heads(self) -> int: ...

    def dot(self, queries: mx.array) -> mx.array: ...


class ValueView(KeyView, Protocol):
    """Values that attention weights sum up."""

    def mix(self, weights: mx.array) -> mx.array: ...


class StoredKV(NamedTuple):
    """Keys or values as they are stored.

    Attributes:
        arrays: the tokens, (R, H or 1, S, ...).
        heads: H.
        dtype: of the activations.
    """

    format: Format
    arrays: Packed
    heads: int
    dtype: mx.Dtype

    def unpacked(self) -> mx.array:
        """Floating-point numbers, (R, H, S, D)."""
        return self.format.unpack(self.arrays, self.dtype)

    def dot(self, queries: mx.array) -> mx.array:
        """Products with every token: (R, H, N, D) to (R, H, N, S)."""
        return self.format.dot(queries, self.arrays)

    def mix(self, weights: mx.array) -> mx.array:
        """Weighted sums of all tokens: (R, H, N, S) to (R, H, N, D)."""
        return self.format.mix(weights, self.arrays)


def as_stored(x: mx.array) -> StoredKV:
    """Unpacked keys or values (R, H, S, D)."""
    return StoredKV(PLAIN, (x,), x.shape[1], x.dtype)


def max_packed_queries(keys: Format, values: Format, dtype: mx.Dtype) -> int:
    """Queries per key head up to which quantized products are faster than unpacking.

    They read fewer bytes but do more work per query. On the CPU that is scalar code on one core:
    one query over 4000 tokens of q8 takes 1.1 ms against 9.9 with unpacking, eight take 12 against
    28; over 500 tokens 0.37 against 0.74 and 0.96 against 0.94. Half precision is far slower.
    """
    most = min(filter(None, (keys.max_packed_queries, values.max_packed_queries)), default=0)
    if device().fast_packed_matmul:
        return GPU_PACKED_QUERIES if most else 0
    return most if dtype == mx.float32 else 0


def reads_packed(keys: KeyView, values: ValueView, queries: mx.array) -> bool:
    """Whether queries (R, heads, T, D) attend over packed tokens; else they are unpacked first."""
    if not keys.format.max_packed_queries and not values.format.max_packed_queries:
        return False
    most = max_packed_queries(keys.format, values.format, queries.dtype)
    return queries.shape[1] * queries.shape[2] <= most * keys.heads
