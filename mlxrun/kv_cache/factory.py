"""Which cache a layer gets: dense, rotating or sparse, and how it stores keys and values."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from mlxrun.config import CacheConfig, StorageConfig
from mlxrun.errors import CacheError
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.dense import DenseCache
from mlxrun.kv_cache.formats import Format, format_of
from mlxrun.kv_cache.options import Blocks, Pattern, Shape, Strided, Window, cache_type
from mlxrun.kv_cache.per_channel import PerChannel, PerChannelCache
from mlxrun.kv_cache.sliding_window import SLACK, RotatingCache
from mlxrun.kv_cache.sparse import BlockCache, StridedCache


def formats(shape: Shape, config: StorageConfig) -> tuple[Format, Format]:
    """The formats of a layer's keys and values.

    Raises:
        ParameterError: a type that does not fit heads of these widths.
    """
    k, v = (cache_type(name, "cache type") for name in config.types)
    if k is not None and k.bits is not None and k.per_channel:
        return PerChannel(k.bits, k.groups[0]), format_of(v, shape.heads, shape.value)
    return format_of(k, shape.heads, shape.key), format_of(v, shape.heads, shape.value)


def token_bytes(shapes: Iterable[Shape], dtype: mx.Dtype, config: StorageConfig) -> tuple[int, int]:
    """Bytes of the keys and of the values of one token in all layers.

    Args:
        shapes: of each layer.
        dtype: of activations.

    Raises:
        ParameterError: a type that does not fit heads of these widths.
    """
    of_keys = of_values = 0
    for shape in shapes:
        k, v = formats(shape, config)
        of_keys += k.token_bytes(shape.heads, shape.key, dtype)
        of_values += v.token_bytes(shape.heads, shape.value, dtype)
    return of_keys, of_values


def make_cache(config: CacheConfig, shape: Shape, own: int | None) -> KVCache:
    """An empty cache for a layer.

    Args:
        own: the layer's own window, or None.

    Raises:
        ParameterError: a cache type that does not fit heads of these widths.
        CacheError: keys packed by channel in addition to a window or a sparse pattern.
    """
    keys, values = formats(shape, config)
    if isinstance(keys, PerChannel):
        if config.sparse is not None:
            raise CacheError(
                "keys packed by channel cannot be seen in part, as sparse attention wants it",
                hint="Take a type of keys without c",
            )
        if own is not None or config.window is not None:
            raise CacheError(
                "keys packed by channel cannot evict old tokens, as a window does",
                hint="Take a type of keys without c",
            )
        return PerChannelCache(keys, values)
    match layer_pattern(config, own):
        case Window(window, keep):
            return RotatingCache(window, keep=keep, keys=keys, values=values)
        case Strided() as strided:
            return StridedCache(strided, keys, values)
        case Blocks() as blocks:
            return BlockCache(blocks, keys, values)
    return DenseCache(keys, values)


def layer_pattern(config: CacheConfig, own: int | None) -> Pattern | None:
    """The pattern of a layer with such a window of its own; None if it is dense."""
    if own is not None and (config.window is None or own <= config.window):
        return Window(own, 0)
    return config.sparse if config.window is None else Window(config.window, config.keep)


def read_bytes(
    config: CacheConfig, layers: Iterable[tuple[Shape, int | None]], dtype: mx.Dtype, length: int
) -> int:
    """Bytes of keys, values and bounds of keys that one decode step reads from caches.

    Args:
        layers: shape and own window of each.
        dtype: of activations.
        length: tokens so far, with the one that is decoded.
    """
    total = 0
    for shape, own in layers:
        pattern, each = layer_pattern(config, own), sum(token_bytes([shape], dtype, config))
        if pattern is None:
            total += each * length
            continue
        slack = SLACK if isinstance(pattern, Window) else 0  # read as well, and masked
        total += each * min(length, pattern.tokens(length) + slack)
        total += block_bytes(shape, dtype) * pattern.bounds(length)
    return total


def bound_bytes(config: CacheConfig, shape: Shape, own: int | None, dtype: mx.Dtype) -> int:
    """Bytes of the bounds of a layer's keys, per token."""
    pattern = layer_pattern(config, own)
    return -(-block_bytes(shape, dtype) // pattern.size) if isinstance(pattern, Blocks) else 0


def block_bytes(shape: Shape, dtype: mx.Dtype) -> int:
    """Bytes of the bounds of one block: its largest and its smallest key."""
    width = shape.key + (shape.value if shape.latent else 0)
    return 2 * width * shape.heads * dtype.size
