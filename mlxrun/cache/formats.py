"""How keys and values are stored: plain, or packed in groups that share a scale.

A format turns tokens (B, H, T, D) into arrays with the tokens along the same axis, so that caches
move tokens about without knowing what they hold. Each token is packed by itself: what is stored
does not depend on which tokens came with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlxrun.cache.types import CacheType
from mlxrun.errors import ParameterError
from mlxrun.kernels.device import device

Arrays = tuple[mx.array, ...]


class Format(ABC):
    """How tokens are stored.

    Attributes:
        few: queries of a head of keys up to which MLX's packed products on the CPU are faster than
            unpacking, measured at 64 wide heads; 0 where there is nothing packed to multiply.
    """

    few = 0

    @abstractmethod
    def pack(self, x: mx.array) -> Arrays:
        """Tokens (B, H, T, D) as arrays (B, H or 1, T, ...)."""

    @abstractmethod
    def unpack(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        """The tokens again, (B, H, T, D)."""

    @abstractmethod
    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        """Bytes that a token of ``dtype`` takes in one layer, H heads of width D."""

    def fixed_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        """Bytes besides, however many the tokens."""
        return 0

    def dot(self, queries: mx.array, arrays: Arrays) -> mx.array:
        """Products with every token: (B, H, N, D) to (B, H, N, T)."""
        return queries @ self.unpack(arrays, queries.dtype).swapaxes(-1, -2)

    def mix(self, weights: mx.array, arrays: Arrays) -> mx.array:
        """Sums of all tokens by weight: (B, H, N, T) to (B, H, N, D)."""
        return weights @ self.unpack(arrays, weights.dtype)


@dataclass(frozen=True)
class Plain(Format):
    """As floating-point numbers, of one dtype or of the one they come in.

    Attributes:
        dtype: what they are stored as, or None.
    """

    dtype: mx.Dtype | None = None

    def pack(self, x: mx.array) -> Arrays:
        return (x if self.dtype is None else x.astype(self.dtype),)

    def unpack(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        return arrays[0] if self.dtype is None else arrays[0].astype(dtype)

    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        return heads * width * (self.dtype or dtype).size


@dataclass(frozen=True)
class Quantised(Format):
    """In one of MLX's packed forms, in groups along each head's width.

    Attributes:
        bits: width of a code.
        group_size: neighbours that share a scale, and in mode ``affine`` a smallest value.
        mode: ``affine`` or ``mxfp8``.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def few(self) -> int:  # type: ignore[override]
        return 4 if self.mode == "affine" else 1

    def pack(self, x: mx.array) -> Arrays:
        return tuple(mx.quantize(x, self.group_size, self.bits, self.mode))

    def unpack(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        codes, scales, *biases = arrays
        return mx.dequantize(
            codes, scales, biases[0] if biases else None,
            group_size=self.group_size, bits=self.bits, mode=self.mode, dtype=dtype,
        )  # fmt: skip

    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        per_group = 2 * dtype.size if self.mode == "affine" else 1
        return heads * (width * self.bits // 8 + width // self.group_size * per_group)

    def dot(self, queries: mx.array, arrays: Arrays) -> mx.array:
        return self._product(queries, arrays, transpose=True)

    def mix(self, weights: mx.array, arrays: Arrays) -> mx.array:
        return self._product(weights, arrays, transpose=False)

    def _product(self, x: mx.array, arrays: Arrays, *, transpose: bool) -> mx.array:
        codes, scales, *biases = arrays
        return mx.quantized_matmul(
            x, codes, scales, biases[0] if biases else None, transpose=transpose,
            group_size=self.group_size, bits=self.bits, mode=self.mode,
        )  # fmt: skip


@dataclass(frozen=True)
class AcrossHeads(Format):
    """Packed in groups that run on from head to head, for heads that no group divides.

    MLX multiplies rows of whole groups only, so products unpack first.

    Attributes:
        inner: how the heads of a token are stored, side by side.
        heads: how many they are.
    """

    inner: Quantised
    heads: int

    def pack(self, x: mx.array) -> Arrays:
        b, _, t, _ = x.shape
        return self.inner.pack(x.transpose(0, 2, 1, 3).reshape(b, 1, t, -1))

    def unpack(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        whole = self.inner.unpack(arrays, dtype)  # (B, 1, T, H D)
        b, _, t, _ = whole.shape
        return whole.reshape(b, t, self.heads, -1).transpose(0, 2, 1, 3)

    def token_bytes(self, heads: int, width: int, dtype: mx.Dtype) -> int:
        return self.inner.token_bytes(1, heads * width, dtype)


PLAIN = Plain()
# Queries of a head of keys that a GPU multiplies with packed codes; not measured.
FEW_QUERIES = 32
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def format_of(kind: CacheType | None, heads: int, width: int) -> Format:
    """The format of a type for H heads of width D.

    Groups run along a head's width where one divides it, else along all heads of a token.

    Raises:
        ParameterError: no group divides either.
    """
    if kind is None:
        return PLAIN
    if kind.bits is None:
        return Plain(DTYPES[str(kind.dtype)])
    for group in kind.groups:
        if width % group == 0:
            return Quantised(kind.bits, group, kind.mode)
    for group in kind.groups:
        if heads * width % group == 0:
            return AcrossHeads(Quantised(kind.bits, group, kind.mode), heads)
    groups = " or ".join(map(str, sorted(kind.groups)))
    raise ParameterError(
        "the type of a cache",
        kind.name,
        f"a plain one such as f16 here: groups of {groups} divide neither the heads of this "
        f"model, {width} wide, nor all {heads} together",
    )


class Shown(Protocol):
    """Keys as a query meets them, whatever stores them; see :class:`Seen`."""

    @property
    def format(self) -> Format: ...

    @property
    def heads(self) -> int: ...

    def dot(self, queries: mx.array) -> mx.array: ...


class Mixed(Shown, Protocol):
    """Values as a query meets them."""

    def mix(self, weights: mx.array) -> mx.array: ...


class Seen(NamedTuple):
    """Keys or values that a query meets, as they are stored.

    Attributes:
        format: how.
        arrays: the tokens, (B, H or 1, S, ...).
        heads: H.
        dtype: of the activations.
    """

    format: Format
    arrays: Arrays
    heads: int
    dtype: mx.Dtype

    def plain(self) -> mx.array:
        """Floating-point numbers, (B, H, S, D)."""
        return self.format.unpack(self.arrays, self.dtype)

    def dot(self, queries: mx.array) -> mx.array:
        """Products with every token: (B, H, N, D) to (B, H, N, S)."""
        return self.format.dot(queries, self.arrays)

    def mix(self, weights: mx.array) -> mx.array:
        """Sums of all tokens by weight: (B, H, N, S) to (B, H, N, D)."""
        return self.format.mix(weights, self.arrays)


def seen(x: mx.array) -> Seen:
    """Plain keys or values (B, H, S, D) as what a query meets."""
    return Seen(PLAIN, (x,), x.shape[1], x.dtype)


def few_queries(keys: Format, values: Format, dtype: mx.Dtype) -> int:
    """Queries of a head of keys up to which packed products are faster than unpacking.

    They read fewer bytes but do more work for each query. On the CPU that is scalar code on one
    core: one query over 4000 tokens of q8 takes 1.1 ms against 9.9 with unpacking, eight take 12
    against 28; over 500 tokens 0.37 against 0.74 and 0.96 against 0.94. Halves are far slower.
    """
    few = min(filter(None, (keys.few, values.few)), default=0)
    if device().fast_packed_matmul:
        return FEW_QUERIES if few else 0
    return few if dtype == mx.float32 else 0


def reads_packed(keys: Shown, values: Shown, queries: mx.array) -> bool:
    """Whether to attend over tokens as they are stored; else they are unpacked first.

    Args:
        queries: (B, heads, T, D).
    """
    if not keys.format.few and not values.format.few:
        return False
    few = few_queries(keys.format, values.format, queries.dtype)
    return queries.shape[1] * queries.shape[2] <= few * keys.heads
