"""Attention over packed keys and values equals attention over the unpacked ones."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxrun.kv_cache.attention import AttentionOp, LatentOp, Mask, alibi, scaled
from mlxrun.kv_cache.formats import AcrossHeads, Format, Plain, Quantized, StoredKV

ROWS, HEADS, KV_HEADS, KEYS, WIDTH = 2, 6, 2, 11, 64
FORMATS: dict[str, Format] = {
    **{f"q{bits}": Quantized(bits, 64) for bits in (8, 6, 5, 4, 3, 2)},
    "q4/32": Quantized(4, 32),
    "mxfp8": Quantized(8, 32, "mxfp8"),
    "f16": Plain(mx.float16),
    "across": AcrossHeads(Quantized(4, 64), KV_HEADS),
}
PRODUCTS: dict[str, AttentionOp] = {
    "plain": scaled(0.3, None, None),
    "bounded": scaled(0.3, 2.0, None),
    "sinks": scaled(0.3, None, mx.array([0.5, -1.0, 3.0, 0.0, -3.0, 1.0])),
    "falling": alibi(0.3, HEADS, 8.0),
}


def masks(queries: int) -> dict[str, Mask]:
    rng = np.random.default_rng(queries)
    seen = rng.random((queries, KEYS)) < 0.5
    seen[:, 0] = True
    row_lengths = mx.arange(KEYS) < mx.array([4, KEYS]).reshape(-1, 1, 1, 1)
    return {"none": None, "causal": "causal", "booleans": mx.array(seen), "rows": row_lengths}


def stored_kv(form: Format, heads: int, width: int, seed: int) -> StoredKV:
    x = mx.array(np.random.default_rng(seed).standard_normal((ROWS, heads, KEYS, width)))
    x = x.astype(mx.float32)
    return StoredKV(form, form.pack(x), heads, x.dtype)


def assert_same(
    dot: AttentionOp, q: mx.array, keys: StoredKV, values: StoredKV, mask: Mask
) -> None:
    expected = np.array(dot(q, keys.unpacked(), values.unpacked(), mask))
    got = np.array(dot.attend_quantized(q, keys, values, mask))
    assert got.shape == expected.shape
    assert np.mean((got - expected) ** 2) <= 1e-10 * np.mean(expected**2)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("mask", ["none", "causal", "booleans", "rows"])
@pytest.mark.parametrize("dot", PRODUCTS)
@pytest.mark.parametrize("form", FORMATS)
def test_grouped_queries(form: str, dot: str, mask: str, queries: int) -> None:
    q = mx.random.normal((ROWS, HEADS, queries, WIDTH), key=mx.random.key(1))
    keys, values = (stored_kv(FORMATS[form], KV_HEADS, WIDTH, seed) for seed in (2, 3))
    assert_same(PRODUCTS[dot], q, keys, values, masks(queries)[mask])


@pytest.mark.parametrize("dot", PRODUCTS)
def test_keys_and_values_of_two_formats(dot: str) -> None:
    q = mx.random.normal((ROWS, HEADS, 3, WIDTH), key=mx.random.key(1))
    keys, values = (
        stored_kv(FORMATS["q8"], KV_HEADS, WIDTH, 2),
        stored_kv(FORMATS["f16"], KV_HEADS, 32, 3),
    )
    assert_same(PRODUCTS[dot], q, keys, values, "causal")
    values = stored_kv(FORMATS["across"], KV_HEADS, 32, 3)
    assert_same(PRODUCTS[dot], q, keys, values, "causal")


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("mask", ["none", "causal", "booleans", "rows"])
@pytest.mark.parametrize("form", ["q8", "q3", "mxfp8"])
def test_latent_attention(form: str, mask: str, queries: int) -> None:
    keys, latents = stored_kv(FORMATS[form], 1, 64, 2), stored_kv(FORMATS[form], 1, 128, 3)
    q = mx.random.normal((ROWS, HEADS, queries, 192), key=mx.random.key(1))
    assert_same(LatentOp(0.2, 64), q, keys, latents, masks(queries)[mask])


def test_bounded_scores_by_hand() -> None:
    """The one scaled that has no other path than the stored one."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, 4, 8)) for heads in (4, 2, 2))
    scores = np.tanh(q @ np.repeat(k, 2, 1).swapaxes(2, 3) * 0.5 / 3) * 3
    scores = np.exp(np.where(np.tri(4, dtype=bool), scores, -np.inf))
    expected = scores / scores.sum(-1, keepdims=True) @ np.repeat(v, 2, 1)
    got = scaled(0.5, 3.0, None)(*(mx.array(x.astype(np.float32)) for x in (q, k, v)), "causal")
    np.testing.assert_allclose(np.array(got), expected, atol=1e-6)
