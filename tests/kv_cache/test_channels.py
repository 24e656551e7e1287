"""Keys packed by channel: each query attends to the same keys as token by token."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from agreement import HEADS, KV_HEADS, PRODUCT, Life, lives, run
from cache_configs import caching
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cache import NaiveCache, Stored, as_given
from stored import packed

from mlxrun.errors import CacheError, ParameterError
from mlxrun.kv_cache.dense import BUCKET
from mlxrun.kv_cache.factory import formats, make_cache
from mlxrun.kv_cache.formats import PLAIN, Quantized
from mlxrun.kv_cache.options import Shape
from mlxrun.kv_cache.per_channel import PerChannel, PerChannelCache

WIDTH, GROUP = 8, 32


class NaiveChannels(NaiveCache):
    """Packs, for each query anew, the groups that lie wholly before the last group of tokens."""

    def __init__(self, bits: int, values: Stored = as_given) -> None:
        super().__init__(values=values)
        self.bits, self.longest = bits, 0

    def update(self, keys: np.ndarray, values: np.ndarray) -> None:
        super().update(keys, values)
        self.longest = max(self.longest, self.offset)

    def attend(self, queries: np.ndarray) -> np.ndarray:
        plain, end, rows = self.keys, self.offset, []
        for i in range(queries.shape[2]):
            self.offset = end - queries.shape[2] + i + 1
            self.keys = self._as_seen(plain[:, :, : self.offset])
            kept, self.values = self.values, self.values[:, :, : self.offset]
            rows.append(super().attend(queries[:, :, i : i + 1]))
            self.values = kept
        self.keys, self.offset = plain, end
        return np.concatenate(rows, axis=2)

    def _as_seen(self, keys: np.ndarray) -> np.ndarray:
        parts = [keys]
        for start in range(0, keys.shape[2] - 2 * GROUP + 1, GROUP):
            group = mx.array(keys[:, :, start : start + GROUP]).swapaxes(2, 3)
            back = mx.dequantize(*mx.quantize(group, GROUP, self.bits), GROUP, self.bits)
            parts.insert(-1, np.array(back.swapaxes(2, 3)))
            parts[-1] = keys[:, :, start + GROUP :]
        return np.concatenate(parts, axis=2)

    def may_refuse(self, n: int) -> bool:
        return self.longest - (self.offset - n) > GROUP

    def trim(self, n: int) -> None:
        super().trim(n)
        self.longest = self.longest if self.offset else 0

    def fork(self) -> NaiveChannels:
        other = NaiveChannels(self.bits, self._stored[1])
        other.keys, other.values = self.keys.copy(), self.values.copy()
        other.offset, other.longest = self.offset, self.longest
        return other


@given(life=lives(longest=90), seed=st.integers(0, 1000), batch=st.integers(1, 2))
@settings(max_examples=25)
def test_agrees_with_a_cache_that_packs_for_every_query(life: Life, seed: int, batch: int) -> None:
    naive = NaiveChannels(3)
    run(lambda: PerChannelCache(PerChannel(3, GROUP)), naive, life, seed, batch, WIDTH)


def test_token_by_token_across_buckets() -> None:
    life = [("update", 0, 240), *[("update", 0, 1)] * 40, ("trim", 0, 30), ("update", 0, 30)]
    naive = NaiveChannels(2, packed(8, 32))
    run(lambda: PerChannelCache(PerChannel(2, GROUP), Quantized(8, 32)), naive, life, 0, 1, 32)


@given(lengths=st.lists(st.integers(1, 150), min_size=2, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=8)
def test_rows_of_a_batch(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, naive = PerChannelCache(PerChannel(4, GROUP)), [NaiveChannels(4) for _ in lengths]
    for row, (length, reference) in enumerate(zip(lengths, naive, strict=True)):
        alone = PerChannelCache(PerChannel(4, GROUP))
        q, k, v = random_qkv(rng, 1, length)
        reference.update(k, v)
        alone.attend(mx.array(q), mx.array(k), mx.array(v), PRODUCT)
        batch.place(row, alone)
    for step in range(40):
        if step == 20:  # the first leaves, the others change places
            order = [*reversed(range(1, len(naive)))]
            batch.take_rows(order)
            naive = [naive[row] for row in order]
        q, k, v = random_qkv(rng, len(naive), 1)
        got = np.array(batch.attend(mx.array(q), mx.array(k), mx.array(v), PRODUCT))
        for row, reference in enumerate(naive):
            one = slice(row, row + 1)
            reference.update(k[one], v[one])
            np.testing.assert_allclose(got[one], reference.attend(q[one]), atol=2e-5)


def random_qkv(rng: np.random.Generator, rows: int, tokens: int) -> list[np.ndarray]:
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [rng.standard_normal((rows, h, tokens, WIDTH)).astype(np.float32) for h in heads]


def test_a_row_is_used_again() -> None:
    rng = np.random.default_rng(0)
    batch, naive = PerChannelCache(PerChannel(4, GROUP)), NaiveChannels(4)
    for row in range(2):
        alone = PerChannelCache(PerChannel(4, GROUP))
        q, k, v = random_qkv(rng, 1, 130)
        alone.attend(mx.array(q), mx.array(k), mx.array(v), PRODUCT)
        batch.place(row, alone)
    batch.clear(0)
    for _ in range(2 * GROUP + 3):
        q, k, v = random_qkv(rng, 2, 1)
        got = np.array(batch.attend(mx.array(q), mx.array(k), mx.array(v), PRODUCT))
        naive.update(k[:1], v[:1])
        np.testing.assert_allclose(got[:1], naive.attend(q[:1]), atol=2e-5)


def filled(tokens: int) -> PerChannelCache:
    cache = PerChannelCache(PerChannel(4, GROUP))
    x = mx.random.normal((1, KV_HEADS, tokens, WIDTH))
    cache.attend(mx.random.normal((1, HEADS, tokens, WIDTH)), x, x, PRODUCT)
    return cache


@pytest.mark.parametrize("tokens", [*range(4 * GROUP, 5 * GROUP + 1)])
def test_going_back_a_group_always_works(tokens: int) -> None:
    cache = filled(tokens)
    cache.truncate(0, GROUP)
    assert cache.offset == tokens - GROUP


def test_truncation_into_packed_groups_is_an_error_but_not_to_nothing() -> None:
    cache = filled(400)
    with pytest.raises(CacheError, match="cannot go back 200 tokens: keys before them are packed"):
        cache.truncate(0, 200)
    with pytest.raises(CacheError, match="cannot truncate 401 of 400"):
        cache.truncate(0, 401)
    assert cache.offset == 400
    cache.truncate(0, 400)


def test_a_cache_truncated_to_nothing_is_like_a_new_one() -> None:
    cache = filled(400)
    cache.truncate(0, 400)
    x = mx.random.normal((1, KV_HEADS, 3 * GROUP, WIDTH))
    cache.attend(mx.random.normal((1, HEADS, 3 * GROUP, WIDTH)), x, x, PRODUCT)
    cache.truncate(0, GROUP)
    assert cache.offset == 2 * GROUP


@given(tokens=st.integers(1, 300), back=st.integers(0, GROUP), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_restored_cache_continues_as_before(tokens: int, back: int, seed: int) -> None:
    rng, length = np.random.default_rng(seed), max(1, tokens - back)
    cache, other = filled(tokens), PerChannelCache(PerChannel(4, GROUP))
    other.restore([], cache.snapshot(), length)
    cache.truncate(0, tokens - length)
    pair = PerChannelCache(PerChannel(4, GROUP))
    for row in range(2):
        pair.place(row, cache)
    third = pair.only(1)
    for tokens in (1, 3, 70):
        q, k, v = (mx.array(x) for x in random_qkv(rng, 1, tokens))
        expected = np.array(cache.attend(q, k, v, PRODUCT))
        for one in (other, third):
            np.testing.assert_array_equal(np.array(one.attend(q, k, v, PRODUCT)), expected)


def test_bytes_grow_as_predicted() -> None:
    form = PerChannel(4, GROUP)
    sizes = [filled(tokens).nbytes for tokens in (BUCKET + 2 * GROUP, 2 * BUCKET + 2 * GROUP)]
    each = form.token_bytes(KV_HEADS, WIDTH, mx.float32)
    values = PLAIN.token_bytes(KV_HEADS, WIDTH, mx.float32)
    assert sizes[1] - sizes[0] == 2 * BUCKET * (each + values)
    ring = form.fixed_bytes(KV_HEADS, WIDTH, mx.float32)
    assert sizes[0] == 2 * BUCKET * (each + values) + ring


def test_impossible_keys_per_channel_are_refused() -> None:
    shape = Shape(2, 64, 64)
    assert formats(shape, caching(keys="q4c", values="q8"))[0] == PerChannel(4, 64)
    assert formats(shape, caching(keys="q2c/32", values=None))[0] == PerChannel(2, 32)
    with pytest.raises(ParameterError, match="cache_type_v must be without c"):
        formats(shape, caching(keys=None, values="q4c"))
    for window, own in ((8, None), (None, 8)):
        with pytest.raises(CacheError, match="cannot evict old tokens"):
            make_cache(caching(window, 0, "q4c", None), shape, own)
    with pytest.raises(CacheError, match="use attend"):
        PerChannel(4, 32).unpack((), mx.float32)
