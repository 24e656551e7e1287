"""Sparse attention in whole models: every kind of attention, and what cannot have it."""

from __future__ import annotations

from functools import cache as once
from pathlib import Path
from typing import Any

import conformance.skeleton as conformance
import mlx.core as mx
import numpy as np
import pytest
from cache_configs import caching
from tiny_models import Tiny, nmse

from converters.gguf.reader import read_gguf
from mlxrun.config import CacheConfig
from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp, Mask
from mlxrun.kv_cache.factory import read_bytes
from mlxrun.kv_cache.formats import KeyView, StoredKV
from mlxrun.kv_cache.options import Blocks, Sparse, Strided
from mlxrun.loader import load_model
from mlxrun.memory.footprint import Execution, footprint

#: One head of keys, bounded scores and windows, sinks and windows, latents.
KINDS = ("llama-mqa", "gemma2-caps", "gpt-oss-small", "deepseek2-lite")
SMALL: tuple[Sparse, ...] = (Strided(12, 5), Blocks(4, 6))
PROMPT, LENGTH = 30, 50


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")

    @once
    def load(name: str) -> Any:
        path = conformance.read(name).write(folder / f"{name}.gguf")
        return load_model(read_gguf(path), dtype="float32").model

    return load


def tokens(model: Any, length: int = LENGTH) -> list[int]:
    return np.random.default_rng(1).integers(0, model.vocab_size, length).tolist()


def fed(model: Any, chunks: list[int], **options: Any) -> np.ndarray:
    """Logits (T, V) after all tokens, prefilled in chunks of these lengths."""
    ids, cache, rows = tokens(model, sum(chunks)), model.make_cache(caching(**options)), []
    for layer in cache:
        layer.prompt = PROMPT
    for n in chunks:
        start = sum(len(row) for row in rows)
        rows.append(np.array(model(mx.array([ids[start : start + n]]), cache)[0]))
    return np.concatenate(rows)


@pytest.mark.parametrize("sparse", SMALL)
@pytest.mark.parametrize("name", KINDS)
def test_logits_do_not_depend_on_how_tokens_are_fed(
    model_of: Any, name: str, sparse: Sparse
) -> None:
    model = model_of(name)
    one_by_one = fed(model, [PROMPT] + [1] * (LENGTH - PROMPT), sparse=sparse)
    dense = fed(model, [LENGTH])
    assert nmse(one_by_one[:PROMPT], dense[:PROMPT]) < 1e-9
    if any(layer.attention.window is None for layer in model.config.layers):
        assert nmse(one_by_one[PROMPT:], dense[PROMPT:]) > 1e-6
    for chunks in ([LENGTH], [PROMPT - 1, 1, 13, LENGTH - PROMPT - 13]):
        assert nmse(fed(model, chunks, sparse=sparse), one_by_one) < 1e-9


@pytest.mark.parametrize("name", KINDS)
def test_enough_blocks_are_dense_to_the_bit(model_of: Any, name: str) -> None:
    model = model_of(name)
    chunks = [30, 1, 11, *[1] * 8]
    options = fed(model, chunks)
    for sparse in (Blocks(7, 8), Strided(46, 3)):
        assert np.array_equal(fed(model, chunks, sparse=sparse), options)


def test_models_that_need_every_token_refuse_patterns(model_of: Any) -> None:
    with pytest.raises(CacheError, match="ALiBi"):
        model_of("mpt-7b").make_cache(caching(sparse=SMALL[1]))
    with pytest.raises(CacheError, match="attends to all cached tokens"):
        model_of("mamba2-130m").make_cache(caching(sparse=SMALL[1]))
    with pytest.raises(CacheError, match="by channel cannot be seen in part"):
        model_of("llama-mqa").make_cache(caching(sparse=SMALL[1], keys="q4c/32"))


class Counting(AttentionOp):
    """Counts the bytes of keys and values that attention is given."""

    def __init__(self, product: AttentionOp) -> None:
        self.product, self.latent, self.nbytes = product, product.latent, 0

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        self.nbytes += k.nbytes + v.nbytes
        return self.product(q, k, v, mask)

    def attend_quantized(
        self, q: mx.array, keys: KeyView, values: StoredKV, mask: Mask
    ) -> mx.array:
        assert isinstance(keys, StoredKV)
        self.nbytes += sum(x.nbytes for x in (*keys.arrays, *values.arrays))
        return self.product.attend_quantized(q, keys, values, mask)

    def ranking(self, q: mx.array) -> mx.array:
        return self.product.ranking(q)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of keys, of values and of bounds that passes are given from now on, call by call."""
    from mlxrun.kv_cache import dense, sparse

    seen: list[int] = []
    attend, bounded = dense.attend, sparse._upper_bounds

    def counting(product: AttentionOp, *args: Any) -> mx.array:
        counts = Counting(product)
        out = attend(counts, *args)
        seen.append(counts.nbytes)
        return out

    def bounding(queries: mx.array, bounds: mx.array) -> mx.array:
        seen.append(bounds.nbytes)
        return bounded(queries, bounds)

    monkeypatch.setattr(dense, "attend", counting)
    monkeypatch.setattr(sparse, "attend", counting)
    monkeypatch.setattr(sparse, "_upper_bounds", bounding)
    return seen


@pytest.mark.parametrize("written", ["dense", "window:20+3", "strided:12/5", "blocks:4x6"])
@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_that_attention_is_given(
    model_of: Any, counted: list[int], name: str, written: str
) -> None:
    model = model_of(name)
    options = CacheConfig(attention=written)
    layers = [(one.attention.cache_shape, one.attention.window) for one in model.config.layers]
    cache, ids = model.make_cache(options), tokens(model)
    for layer in cache:
        layer.prompt = 9
    model(mx.array([ids[:9]]), cache)
    for length in range(10, LENGTH):
        counted.clear()
        model(mx.array([[ids[length - 1]]]), cache)
        assert sum(counted) == read_bytes(options, layers, mx.float32, length)


@pytest.mark.parametrize("name", KINDS)
def test_the_memory_plan_counts_bounds(model_of: Any, name: str) -> None:
    model, options = model_of(name), caching(None, 0, None, None, Blocks(4, 8))
    cache = model.make_cache(options)
    model(mx.array([tokens(model)]), cache)
    taken = sum(layer.nbytes for layer in cache)
    assert footprint(model.config, Execution(cache=options)).stored(LENGTH) == taken


def test_32_thousand_tokens(tmp_path: Path, counted: list[int]) -> None:
    """One prefill, decoded with every pattern: bytes as predicted, short contexts as dense."""
    length = 32_768
    tiny = Tiny(hidden=32, heads=2, kv_heads=1, layers=1, keys={"context_length": 2 * length})
    model = load_model(read_gguf(tiny.write(tmp_path / "tiny.gguf")), dtype="float32").model
    ids = tokens(model, length)
    read = model.make_cache()
    for start in range(0, length, 512):
        model(mx.array([ids[start : start + 512]]), read, last_only=True)
        mx.eval([array for layer in read for array in layer.state])
    layers = [(one.attention.cache_shape, one.attention.window) for one in model.config.layers]

    def decoded(sparse: Sparse | None) -> tuple[np.ndarray, int]:
        cache = model.make_cache(caching(sparse=sparse))
        for mine, its in zip(read, cache, strict=True):
            its.restore([mine.slice_tokens(0, length)], None, length)
            its.prompt = length
        rows = [np.array(model(mx.array([[token]]), cache)[0, 0]) for token in ids[:4]]
        counted.clear()
        rows.append(np.array(model(mx.array([ids[4:5]]), cache)[0, 0]))
        nbytes = read_bytes(caching(None, 0, None, None, sparse), layers, mx.float32, length + 5)
        assert sum(counted) == nbytes
        return np.stack(rows), nbytes

    dense, all_bytes = decoded(None)
    assert all_bytes == 2 * 16 * 4 * (length + 5)
    assert np.array_equal(decoded(Blocks(1025, 32))[0], dense)
    few, few_bytes = decoded(Blocks(32, 64))
    assert few_bytes < all_bytes / 12
    # More blocks come closer.
    assert nmse(decoded(Blocks(448, 64))[0], dense) < nmse(few, dense)
    assert decoded(Strided(512, 8))[1] < all_bytes / 6
