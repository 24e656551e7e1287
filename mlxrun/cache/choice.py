"""Which cache a layer gets: dense or rotating, and how it stores keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx

from mlxrun.cache.base import Cache
from mlxrun.cache.by_channel import ByChannel
from mlxrun.cache.channels import ChannelCache
from mlxrun.cache.dense import DenseCache
from mlxrun.cache.formats import Format, format_of
from mlxrun.cache.rotating import SLACK, RotatingCache
from mlxrun.cache.sparse import BlockCache, StridedCache
from mlxrun.cache.sparsity import Blocks, Pattern, Sparse, Strided, Window
from mlxrun.cache.types import Shape, cache_type
from mlxrun.errors import CacheError, ParameterError


def formats(shape: Shape, keys: str | None, values: str | None) -> tuple[Format, Format]:
    """How a layer stores keys and values of named types; None leaves them as they are.

    Raises:
        ParameterError: no such type, or none for heads of these widths.
    """
    k, v = cache_type(keys, "cache_type_k"), cache_type(values, "cache_type_v")
    if v is not None and v.by_channel:
        raise ParameterError("cache_type_v", values, "without c, which is for keys")
    if k is not None and k.bits is not None and k.by_channel:
        return ByChannel(k.bits, k.groups[0]), format_of(v, shape.heads, shape.value)
    return format_of(k, shape.heads, shape.key), format_of(v, shape.heads, shape.value)


def token_bytes(
    shapes: Iterable[Shape], dtype: mx.Dtype, keys: str | None, values: str | None
) -> tuple[int, int]:
    """Bytes that the keys and that the values of one token take in all layers.

    Args:
        shapes: of each layer.
        dtype: of activations.
        keys, values: names of types.

    Raises:
        ParameterError: no such type, or none for heads of these widths.
    """
    of_keys = of_values = 0
    for shape in shapes:
        k, v = formats(shape, keys, values)
        of_keys += k.token_bytes(shape.heads, shape.key, dtype)
        of_values += v.token_bytes(shape.heads, shape.value, dtype)
    return of_keys, of_values


class Wanted(NamedTuple):
    """What a session asks of caches, as ``Transformer.make_cache`` takes it."""

    window: int | None
    keep: int
    keys: str | None
    values: str | None
    sparse: Sparse | None = None

    def cache(self, shape: Shape, own: int | None) -> Cache:
        """An empty cache for a layer.

        Args:
            own: the layer's own window, or None for a layer that sees everything.

        Raises:
            ParameterError: no such type, or none for heads of these widths.
            CacheError: keys packed by channel where there is a window or a sparse pattern.
        """
        keys, values = formats(shape, self.keys, self.values)
        if isinstance(keys, ByChannel):
            if self.sparse is not None:
                raise CacheError(
                    "keys packed by channel cannot be seen in part, as sparse attention wants it",
                    hint="Take a type of keys without c",
                )
            if own is not None or self.window is not None:
                raise CacheError(
                    "keys packed by channel cannot forget old tokens, as a window wants it",
                    hint="Take a type of keys without c",
                )
            return ChannelCache(keys, values)
        match self.pattern(own):
            case Window(window, keep):
                return RotatingCache(window, keep=keep, keys=keys, values=values)
            case Strided() as strided:
                return StridedCache(strided, keys, values)
            case Blocks() as blocks:
                return BlockCache(blocks, keys, values)
        return DenseCache(keys, values)

    def pattern(self, own: int | None) -> Pattern | None:
        """What a layer with such a window of its own sees; None for everything."""
        if own is not None and (self.window is None or own <= self.window):
            return Window(own, 0)
        return self.sparse if self.window is None else Window(self.window, self.keep)

    def read_bytes(
        self, layers: Iterable[tuple[Shape, int | None]], dtype: mx.Dtype, length: int
    ) -> int:
        """Bytes of keys, values and bounds of keys that drawing one token reads from caches.

        Args:
            layers: what a token leaves in each, and its own window.
            dtype: of activations.
            length: tokens so far, the one that goes through the model among them.
        """
        return sum(self._read(shape, own, dtype, length) for shape, own in layers)

    def _read(self, shape: Shape, own: int | None, dtype: mx.Dtype, length: int) -> int:
        pattern, each = self.pattern(own), sum(token_bytes([shape], dtype, self.keys, self.values))
        if pattern is None:
            return each * length
        bounds = block_bytes(shape, dtype) * pattern.bounds(length)
        slack = SLACK if isinstance(pattern, Window) else 0  # read as well, and masked
        return each * min(length, pattern.tokens(length) + slack) + bounds

    def bound_bytes(self, shape: Shape, own: int | None, dtype: mx.Dtype) -> int:
        """Bytes that the bounds of a layer's keys take for each token."""
        pattern = self.pattern(own)
        return -(-block_bytes(shape, dtype) // pattern.size) if isinstance(pattern, Blocks) else 0


def block_bytes(shape: Shape, dtype: mx.Dtype) -> int:
    """Bytes of the bounds of one block: its largest and its smallest key."""
    width = shape.key + (shape.value if shape.latent else 0)
    return 2 * width * shape.heads * dtype.size
