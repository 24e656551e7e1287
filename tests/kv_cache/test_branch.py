"""A cache with a shared prefix against one that keeps every token itself."""

from __future__ import annotations

import operator

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import append

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp, LatentOp, alibi, scaled
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.dense import DenseCache
from mlxrun.kv_cache.formats import PLAIN, AcrossHeads, Format, Plain, Quantized
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.kv_cache.shared_prefix import CONCATENATE_FROM, SharedPrefix, SharedPrefixCache

HEADS, KV_HEADS, WIDTH = 4, 2, 32
FORMATS: dict[str, Format] = {
    "plain": PLAIN,
    "f16": Plain(mx.float16),
    "q8": Quantized(8, 32),
    "q4": Quantized(4, 32),
    "across": AcrossHeads(Quantized(8, 64), KV_HEADS),
}
PRODUCTS: dict[str, AttentionOp] = {
    "plain": scaled(0.2, None, None),
    "bounded": scaled(0.2, 2.0, None),
    "sinks": scaled(0.2, None, mx.array([0.5, -1.0, 3.0, 0.0])),
    "falling": alibi(0.2, HEADS, 8.0),
}


def some(rng: np.random.Generator, rows: int, tokens: int, heads: int = KV_HEADS) -> mx.array:
    return mx.array(rng.standard_normal((rows, heads, tokens, WIDTH)).astype(np.float32))


def pair(
    rng: np.random.Generator, length: int, keys: Format = PLAIN, values: Format = PLAIN
) -> tuple[DenseCache, SharedPrefixCache]:
    """Two caches of the same tokens; the second shares them as a prefix."""
    dense = DenseCache(keys, values)
    append(dense, some(rng, 1, length), some(rng, 1, length))
    branch = SharedPrefixCache(
        SharedPrefix((dense.slice_tokens(0, length),), length), 0, keys, values
    )
    return dense, branch


def same_attention(
    rng: np.random.Generator,
    one: DenseCache,
    other: SharedPrefixCache,
    tokens: int,
    dot: AttentionOp,
) -> None:
    rows = len(one.offsets)
    queries = some(rng, rows, tokens, HEADS)
    keys, values = some(rng, rows, tokens), some(rng, rows, tokens)
    expected = one.attend(queries, keys, values, dot)
    got = other.attend(queries, keys, values, dot)
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=2e-5)
    assert one.offsets == other.offsets


@pytest.mark.parametrize("dot", PRODUCTS)
@pytest.mark.parametrize("form", FORMATS)
def test_one_row_reads_on(form: str, dot: str) -> None:
    rng = np.random.default_rng(0)
    dense, branch = pair(rng, 37, FORMATS[form], FORMATS[form])
    for tokens in (CONCATENATE_FROM + 3, 1, 5, 1, CONCATENATE_FROM):
        same_attention(rng, dense, branch, tokens, PRODUCTS[dot])


@pytest.mark.parametrize("dot", PRODUCTS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [2, 9])
def test_rows_decode_together(form: str, dot: str, count: int) -> None:
    rng = np.random.default_rng(1)
    dense, branch = pair(rng, 37, FORMATS[form], FORMATS[form])
    together, apart = branch.empty(), dense.empty()
    for row in range(count):
        one, other = dense.fork(), branch.fork()
        same_attention(rng, one, other, 1 + 3 * row, PRODUCTS[dot])
        apart.place(row, one)
        together.place(row, other)
    for _ in range(3):
        same_attention(rng, apart, together, 1, PRODUCTS[dot])


@pytest.mark.parametrize("form", ["plain", "q8"])
def test_latents(form: str) -> None:
    rng = np.random.default_rng(2)
    keys, values = (mx.array(rng.standard_normal((1, 1, 50, w))) for w in (32, 64))
    dense = DenseCache(FORMATS[form], FORMATS[form])
    append(dense, keys.astype(mx.float32), values.astype(mx.float32))
    branch = SharedPrefixCache(
        SharedPrefix((dense.slice_tokens(0, 50),), 50), 0, FORMATS[form], FORMATS[form]
    )
    caches: list[DenseCache] = [dense, branch]
    for tokens in (CONCATENATE_FROM, 1, 3):
        shapes = (HEADS, 96), (1, 32), (1, 64)
        given = [mx.array(rng.standard_normal((1, h, tokens, w))) for h, w in shapes]
        q, k, v = (x.astype(mx.float32) for x in given)
        one, other = (cache.attend(q, k, v, LatentOp(0.1, 32)) for cache in caches)
        np.testing.assert_allclose(np.array(other), np.array(one), atol=2e-5)


@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 300),
    life=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["place", "leave", "pack"]), st.integers(0, 5)),
            st.tuples(st.just("step"), st.just(0)),
        ),
        max_size=14,
    ),
)
@settings(max_examples=25)
def test_rows_come_and_go(seed: int, length: int, life: list[tuple[str, int]]) -> None:
    """As rows of dense caches do, which hold all that they saw themselves."""
    rng = np.random.default_rng(seed)
    dense, branch = pair(rng, length)
    apart, together = dense.empty(), branch.empty()
    dot, rows = PRODUCTS["plain"], 0
    for what, which in [("place", 0), *life, ("step", 0)]:
        if what == "place":
            one, other = dense.fork(), branch.fork()
            same_attention(rng, one, other, int(rng.integers(1, 9)), dot)
            row = min(which, rows)
            apart.place(row, one)
            together.place(row, other)
            rows = max(rows, row + 1)
        elif what == "leave":  # an idle row starts again; its output is unused
            apart.place(which % rows, dense.fork())
            together.clear(which % rows)
        elif what == "pack":
            kept = sorted({which % rows, 0})
            apart.take_rows(kept)
            together.take_rows(kept)
            rows = len(kept)
        else:
            same_attention(rng, apart, together, 1, dot)


def test_is_not_counted_with_the_rows() -> None:
    dense, branch = pair(np.random.default_rng(3), 1000)
    append(branch, mx.zeros((1, KV_HEADS, 3, WIDTH)), mx.zeros((1, KV_HEADS, 3, WIDTH)))
    token = 2 * KV_HEADS * WIDTH * 4
    assert dense.nbytes == 1024 * token
    assert branch.nbytes == 256 * token
    assert branch.prefix.nbytes == 1000 * token


def test_truncates_to_the_end_of_the_prefix_and_no_further() -> None:
    rng = np.random.default_rng(4)
    dense, branch = pair(rng, 20)
    same_attention(rng, dense, branch, 7, PRODUCTS["plain"])
    for n in (3, 4):
        branch.truncate(0, n)
        dense.truncate(0, n)
    with pytest.raises(CacheError, match="the first 20 are shared"):
        branch.truncate(0, 1)
    same_attention(rng, dense, branch, 2, PRODUCTS["plain"])


@given(st.integers(0, 60), st.integers(0, 60))
def test_slices_as_a_dense_cache_does(one: int, other: int) -> None:
    rng = np.random.default_rng(5)
    dense, branch = pair(rng, 30)
    same_attention(rng, dense, branch, 30, PRODUCTS["plain"])
    start, stop = sorted((one, other))
    expected, got = dense.slice_tokens(start, stop), branch.slice_tokens(start, stop)
    assert list(got) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(np.array(got[name]), np.array(expected[name]))


def remembered(count: int, seed: int = 0) -> list[KVCache]:
    """Two layers with so many tokens."""
    rng, layers = np.random.default_rng(seed), [DenseCache(), DenseCache()]
    for layer in layers:
        append(layer, some(rng, 1, count), some(rng, 1, count))
    return list(layers)


def empty() -> list[KVCache]:
    return [DenseCache(), DenseCache()]


def kept(prefixes: PrefixCache, tokens: list[int], ends: list[int]) -> list[KVCache]:
    """Memories of tokens, and a tree that knows them, in nodes that end at some places."""
    whole = remembered(len(tokens))
    for end in ends:
        prefixes.insert(tokens[:end], whole)
    return whole


def take(
    prefixes: PrefixCache, tokens: list[int], share: int
) -> tuple[list[KVCache], SharedPrefix]:
    memories = empty()
    assert prefixes.restore(tokens, memories, share_len=share) is not None
    first = memories[0]
    assert isinstance(first, SharedPrefixCache)
    return memories, first.prefix


def shows(memories: list[KVCache], like: list[KVCache], length: int) -> None:
    for one, other in zip(memories, like, strict=True):
        for name, array in other.slice_tokens(0, length).items():
            np.testing.assert_array_equal(
                np.array(one.slice_tokens(0, length)[name]), np.array(array)
            )


@pytest.mark.parametrize("ends", [[60], [20, 40, 60], [10, 60]])
@pytest.mark.parametrize("share", [60, 40, 33])
def test_sequences_with_one_prefix_share_the_arrays_of_the_tree(
    ends: list[int], share: int
) -> None:
    tokens, prefixes = list(range(60)), PrefixCache(1 << 30)
    whole = kept(prefixes, tokens, ends)
    before = prefixes.nbytes
    (one, first), (other, second) = (take(prefixes, tokens, share) for _ in range(2))
    assert first is second
    assert first.length == share
    assert prefixes.nbytes == before
    segments = [segment for node in prefixes._tree if (segment := node.segment) is not None]
    assert any(all(map(operator.is_, segment.arrays, first.arrays)) for segment in segments), (
        "the tree has a copy"
    )
    shows(one, whole, 60)
    shows(other, whole, 60)


def test_the_tree_keeps_a_copy_where_prefixes_branch() -> None:
    tokens, prefixes = list(range(60)), PrefixCache(1 << 30)
    whole = kept(prefixes, tokens, [20, 60])
    kept(prefixes, [*tokens[:20], 99, 98], [22])
    one, first = take(prefixes, tokens, 50)
    shows(one, whole, 60)
    assert len(prefixes._tree) == 4  # 20 tokens, 30, 10, and 2 that branch off
    assert first.length == 50


def test_evicted_arrays_stay_with_their_users() -> None:
    tokens, prefixes = list(range(60)), PrefixCache(1 << 30)
    whole = kept(prefixes, tokens, [20, 60])
    memories = empty()
    lease = prefixes.restore(tokens, memories, share_len=40)
    assert lease is not None
    prefixes.budget = 0
    assert prefixes.matched_len(tokens, empty()) == 60, "in use"
    lease.release()
    lease.release()  # twice is once
    prefixes.clear()
    assert prefixes.matched_len(tokens, empty()) == 0
    shows(memories, whole, 60)
    assert prefixes.shared_lens(tokens, empty()) == [40]
    del memories
    assert prefixes.shared_lens(tokens, empty()) == []


def test_a_sequence_that_read_by_itself_joins() -> None:
    tokens, prefixes = list(range(60)), PrefixCache(1 << 30)
    own = kept(prefixes, tokens, [60])
    like: list[KVCache] = [memory.fork() for memory in own]
    prefixes.share(tokens[:40], own)
    _, prefix = take(prefixes, tokens, 40)
    assert all(isinstance(memory, SharedPrefixCache) for memory in own)
    assert isinstance(own[0], SharedPrefixCache)
    assert own[0].prefix is prefix
    shows(own, like, 60)


def test_uncached_tokens_are_not_shared() -> None:
    own, prefixes = remembered(30), PrefixCache(1 << 30)
    prefixes.share(list(range(20)), own)
    assert [type(memory) for memory in own] == [DenseCache, DenseCache]
