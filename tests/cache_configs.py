"""Configs of caches in a word, for tests."""

from __future__ import annotations

from mlxrun.config import CacheConfig
from mlxrun.kv_cache.options import Sparse, Strided


def caching(
    window: int | None = None,
    keep: int = 0,
    keys: str | None = None,
    values: str | None = None,
    sparse: Sparse | str | None = None,
) -> CacheConfig:
    """A config; a pattern may be given parsed."""
    if isinstance(sparse, Strided):
        sparse = f"strided:{sparse.last}/{sparse.stride}"
    elif sparse is not None and not isinstance(sparse, str):
        sparse = f"blocks:{sparse.count}x{sparse.size}"
    return CacheConfig(
        window=window, keep=keep, cache_type_k=keys, cache_type_v=values, attention=sparse
    )
