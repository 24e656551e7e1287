"""Random lives of a cache, each step compared with the naive one."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from naive_cache import NaiveCache

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import scaled
from mlxrun.kv_cache.base import KVCache

HEADS, KV_HEADS, DIM = 4, 2, 4
PRODUCT = scaled(scale=1.0, softcap=None, sinks=None)
Life = list[tuple[str, int, int]]


def lives(longest: int = 9) -> st.SearchStrategy[Life]:
    """Steps of (what, which of the caches alive, how many tokens)."""
    update = st.tuples(st.just("update"), st.integers(0, 9), st.integers(1, longest))
    decode = st.tuples(st.just("update"), st.integers(0, 9), st.just(1))
    trim = st.tuples(st.just("trim"), st.integers(0, 9), st.integers(0, 12))
    fork = st.tuples(st.just("fork"), st.integers(0, 9), st.just(0))
    return st.lists(st.one_of(update, decode, decode, trim, fork), min_size=1, max_size=30)


def run(
    make: Callable[[], KVCache],
    naive: NaiveCache,
    life: Life,
    seed: int,
    batch: int,
    width: int = DIM,
) -> None:
    """Live a life with caches of both kinds; every answer must be the same."""
    rng = np.random.default_rng(seed)
    pairs = [(make(), naive)]
    for what, which, n in life:
        cache, reference = pairs[which % len(pairs)]
        if what == "fork" and len(pairs) < 4:
            pairs.append((cache.fork(), reference.fork()))
        elif what == "trim":
            _trim(cache, reference, n)
        elif what == "update":
            _update(cache, reference, n, rng, (batch, width))
        assert cache.offset == reference.offset
    for cache, reference in pairs:  # whatever the others did since
        _update(cache, reference, 1, rng, (batch, width))


def _trim(cache: KVCache, reference: NaiveCache, n: int) -> None:
    before = cache.offset
    try:
        cache.truncate(0, n)
    except CacheError:
        assert cache.offset == before
        assert n > before or reference.may_refuse(n)
    else:
        reference.trim(n)


def _update(
    cache: KVCache,
    reference: NaiveCache,
    n: int,
    rng: np.random.Generator,
    size: tuple[int, int],
) -> None:
    batch, width = size
    queries = rng.standard_normal((batch, HEADS, n, width)).astype(np.float32)
    keys, values = rng.standard_normal((2, batch, KV_HEADS, n, width)).astype(np.float32)
    reference.update(keys, values)
    got = cache.attend(mx.array(queries), mx.array(keys), mx.array(values), PRODUCT)
    np.testing.assert_allclose(np.array(got), reference.attend(queries), atol=2e-5)
