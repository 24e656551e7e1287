"""Caches that store keys and values in formats of their own, against one that masks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from agreement import HEADS, KV_HEADS, PRODUCT, Life, lives, run
from cache_configs import caching
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cache import NaiveCache, Stored, as_given
from stored import append, half, packed

from mlxrun.errors import ParameterError
from mlxrun.kv_cache.dense import BUCKET, DenseCache, RowCache
from mlxrun.kv_cache.factory import formats, make_cache
from mlxrun.kv_cache.formats import AcrossHeads, Format, Quantized, StoredKV, reads_packed
from mlxrun.kv_cache.options import BITS, FLOATS, NAMES, SYNONYMS, Shape, cache_type
from mlxrun.kv_cache.sliding_window import RotatingCache

# Types of keys and of values, the width of a head, and what storing a token makes of it.
Case = tuple[str | None, str | None, int, Stored, Stored]
CASES: list[Case] = [
    ("q8", "q4", 32, packed(8, 32), packed(4, 32)),
    ("q5", "q3/32", 64, packed(5, 64), packed(3, 32)),
    ("mxfp8", None, 32, packed(8, 32, "mxfp8"), as_given),
    ("f16", "q6", 64, half, packed(6, 64)),
    ("q2", "q8", 48, packed(2, 32, across=True), packed(8, 32, across=True)),
]
NAMED: Any = {"argvalues": CASES, "ids": [f"{k}-{v}-{width}" for k, v, width, *_ in CASES]}


def cache(case: Case, window: int | None = None, keep: int = 0) -> RowCache:
    keys, values, width = case[:3]
    made = make_cache(caching(window, keep, keys, values), Shape(KV_HEADS, width, width), None)
    assert isinstance(made, RowCache)
    return made


@pytest.mark.parametrize("case", **NAMED)
@given(life=lives(), seed=st.integers(0, 1000), batch=st.integers(1, 2))
@settings(max_examples=12)
def test_dense(case: Case, life: Life, seed: int, batch: int) -> None:
    naive = NaiveCache(keys=case[3], values=case[4])
    run(lambda: cache(case), naive, life, seed, batch, case[2])


@pytest.mark.parametrize("case", **NAMED)
@given(
    life=lives(longest=20),
    window=st.integers(1, 12),
    keep=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12)
def test_rotating(case: Case, life: Life, window: int, keep: int, seed: int) -> None:
    naive = NaiveCache(window, keep, case[3], case[4])
    run(lambda: cache(case, window, keep), naive, life, seed, 1, case[2])


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("case", **NAMED)
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=6)
def test_rows_of_a_batch(case: Case, window: int | None, lengths: list[int], seed: int) -> None:
    """Sequences that join a block with their caches continue as alone."""
    rng, width = np.random.default_rng(seed), case[2]
    batch = cache(case, window, 2)
    naive = [NaiveCache(window, 2 if window else 0, case[3], case[4]) for _ in lengths]
    for row, (length, reference) in enumerate(zip(lengths, naive, strict=True)):
        alone = cache(case, window, 2)
        k, v = rng.standard_normal((2, 1, KV_HEADS, length, width)).astype(np.float32)
        append(alone, mx.array(k), mx.array(v))
        reference.update(k, v)
        batch.place(row, alone)
    for _ in range(5):
        q = rng.standard_normal((len(lengths), HEADS, 1, width)).astype(np.float32)
        k, v = rng.standard_normal((2, len(lengths), KV_HEADS, 1, width)).astype(np.float32)
        got = np.array(batch.attend(mx.array(q), mx.array(k), mx.array(v), PRODUCT))
        for row, reference in enumerate(naive):
            one = slice(row, row + 1)
            reference.update(k[one], v[one])
            np.testing.assert_allclose(got[one], reference.attend(q[one]), atol=2e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(2, 64), (3, 96), (4, 8), (1, 512)])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_a_token(name: str, heads: int, width: int, dtype: mx.Dtype) -> None:
    keys, values = formats(Shape(heads, width, width), caching(keys=name, values="q4"))
    made, x = DenseCache(keys, values), mx.ones((1, heads, 3, width), dtype)
    append(made, x, x)
    predicted = sum(one.token_bytes(heads, width, dtype) for one in (keys, values))
    assert made.nbytes == BUCKET * predicted


def test_widths_of_keys_and_values_may_differ() -> None:
    made = make_cache(caching(None, 0, "q8", "q4/32"), Shape(1, 64, 512), None)
    k, v, _ = append(made, mx.ones((1, 1, 5, 64)), mx.ones((1, 1, 5, 512)))
    assert (k.shape, v.shape) == ((1, 1, 5, 64), (1, 1, 5, 512))


@pytest.mark.parametrize(
    ("name", "heads", "width", "expected"),
    [
        ("q8", 2, 128, Quantized(8, 64)),
        ("q8", 2, 96, Quantized(8, 32)),
        ("q4/128", 2, 128, Quantized(4, 128)),
        ("Q4_0", 2, 128, Quantized(4, 32)),
        ("mxfp8", 2, 64, Quantized(8, 32, "mxfp8")),
        ("q4", 4, 80, AcrossHeads(Quantized(4, 64), 4)),
        ("q4", 2, 80, AcrossHeads(Quantized(4, 32), 2)),
    ],
)
def test_the_largest_group_that_divides(
    name: str, heads: int, width: int, expected: Format
) -> None:
    assert formats(Shape(heads, width, width), caching(keys=name, values=None))[0] == expected


def test_every_name_and_every_synonym_means_something() -> None:
    assert {cache_type(name, "k").bits for name in NAMES if name not in FLOATS} == set(BITS)
    for name in (*NAMES, *SYNONYMS):
        assert cache_type(name, "k") is not None
    assert cache_type(None, "k") is None


@pytest.mark.parametrize(
    "name", ["", "q7", "q1", "q4/16", "q4/", "mxfp8/64", "f8", 4, b"q4", ["q4"]]
)
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(ParameterError, match="cache_type_v must be one of f32, f16"):
        cache_type(name, "cache_type_v")


def test_heads_that_no_group_divides_are_refused() -> None:
    with pytest.raises(ParameterError, match="20 wide, nor all 2 together"):
        formats(Shape(2, 20, 20), caching(keys="q8", values=None))


def test_few_queries_read_packed_codes_many_unpack_them() -> None:
    made = Quantized(4, 32)
    x = mx.ones((1, 2, 9, 32))
    stored = StoredKV(made, made.pack(x), 2, x.dtype)
    assert reads_packed(stored, stored, mx.ones((1, 2, 1, 32)))
    assert not reads_packed(stored, stored, mx.ones((1, 8, 64, 32)))


def test_truncation_and_forks_keep_packed_tokens() -> None:
    made = RotatingCache(40, keep=2, keys=Quantized(8, 32), values=Quantized(2, 32))
    x = mx.random.normal((1, KV_HEADS, 30, 32))
    append(made, x, x)
    fork = made.fork()
    fork.truncate(0, 10)
    assert (made.offset, fork.offset) == (30, 20)
    append(fork, x[:, :, 20:21], x[:, :, 20:21])
    own, whole = fork.snapshot(), made.snapshot()
    assert own is not None and whole is not None
    for name, array in own.arrays.items():
        assert mx.array_equal(array, whole.arrays[name][:, :, :21])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("keys", ["q8", "q4c/32", "mxfp8", "f32"])
def test_half_precision_stays_half(keys: str, dtype: mx.Dtype) -> None:
    made = make_cache(caching(None, 0, keys, "q8"), Shape(KV_HEADS, 64, 64), None)
    exact = make_cache(caching(None, 0, keys, "q8"), Shape(KV_HEADS, 64, 64), None)
    for tokens in (90, 1, 1):
        q = mx.random.normal((1, HEADS, tokens, 64)).astype(dtype)
        k, v = mx.random.normal((2, 1, KV_HEADS, tokens, 64)).astype(dtype)
        got = made.attend(q, k, v, PRODUCT)
        wanted = exact.attend(*(x.astype(mx.float32) for x in (q, k, v)), PRODUCT)
        assert got.dtype == dtype
        wrong = (got.astype(mx.float32) - wanted).square().sum() / wanted.square().sum()
        assert wrong.item() < 3e-3
