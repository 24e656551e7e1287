"""The prefix cache stays within its budget; nodes in use stay."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from stored import append

from mlxrun.kv_cache.attention import scaled
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.kv_cache.sliding_window import SLACK, RotatingCache

TOKENS = list(range(60))
PRODUCT = scaled(1.0, None, None)


def window(tokens: int) -> list[KVCache]:
    """A window after so many of the tokens, stored as a snapshot."""
    cache = RotatingCache(8, keep=2)
    if tokens:
        x = mx.broadcast_to(mx.arange(tokens, dtype=mx.float32)[:, None], (1, 2, tokens, 4))
        append(cache, x, x)
    return [cache]


def found(prefixes: PrefixCache, tokens: list[int]) -> int:
    """How many of some tokens are restored; the cache equals that of a cold start."""
    memories = window(0)
    lease = prefixes.restore(tokens, memories)
    if lease is None:
        return 0
    lease.release()
    q, x = mx.ones((1, 2, 1, 4)), mx.zeros((1, 2, 1, 4))
    got, cold = (cache[0].attend(q, x, x, PRODUCT) for cache in (memories, window(lease.length)))
    np.testing.assert_array_equal(np.array(got), np.array(cold))
    return lease.length


def test_a_snapshot_that_is_too_much_is_not_kept_where_all_else_is_in_use() -> None:
    """It is an ancestor of a node in use, so it stays as well."""
    prefixes = PrefixCache(1 << 20)
    prefixes.insert(TOKENS, window(60))
    lease = prefixes.restore(TOKENS, window(0))
    assert lease is not None and lease.length == 60
    prefixes.budget = prefixes.nbytes
    prefixes.insert(TOKENS[:20], window(20))
    assert prefixes.nbytes <= prefixes.budget
    assert found(prefixes, TOKENS[:40]) == 0
    assert found(prefixes, TOKENS) == 60


def test_a_snapshot_for_which_there_is_room_is_kept() -> None:
    prefixes = PrefixCache(1 << 20)
    prefixes.insert(TOKENS, window(60))
    prefixes.insert(TOKENS[:20], window(20))
    assert found(prefixes, TOKENS[:40]) == 20
    assert found(prefixes, TOKENS) == 60


def test_reuse_after_a_rollback_equals_a_cold_start_to_the_bit() -> None:
    """The next chunk attends to the window alone, not to the content of the slack."""
    prefixes, x = PrefixCache(1 << 20), mx.random.normal((1, 2, 80, 4))
    made, tokens = RotatingCache(8, keep=2), list(range(60))
    append(made, x[:, :, :60], x[:, :, :60])
    prefixes.insert(tokens, [made])
    for back in (1, 5, SLACK):
        caches: list[KVCache] = [RotatingCache(8, keep=2)]
        lease = prefixes.restore(tokens[:-back], caches)
        assert lease is not None and lease.length == 60 - back
        cold = RotatingCache(8, keep=2)
        append(cold, x[:, :, : 60 - back], x[:, :, : 60 - back])
        for n in (40, 3, 1):
            q = mx.random.normal((1, 2, n, 4))
            got, expected = (
                np.array(one.attend(q, x[:, :, :n], x[:, :, :n], PRODUCT))
                for one in (caches[0], cold)
            )
            np.testing.assert_array_equal(got, expected)
