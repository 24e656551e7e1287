"""The error of attention, against a plain computation of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from naive_cache import NaiveCache
from stored import half, packed

from examples.attention_error import attention_error
from mlxrun.config import CacheConfig
from mlxrun.errors import ParameterError
from mlxrun.kv_cache.attention import scaled
from mlxrun.kv_cache.base import KVCache, StepCache
from mlxrun.kv_cache.factory import make_cache
from mlxrun.kv_cache.options import Shape

HEADS, WIDTH, LAYERS = 4, 32, 2
TOKENS = [*range(300)]


def random_states(layer: int, heads: int, what: int) -> np.ndarray:
    rng = np.random.default_rng((layer, what))
    return rng.standard_normal((1, heads, len(TOKENS), WIDTH)).astype(np.float32)


def types(keys: str | None, values: str | None) -> CacheConfig:
    return CacheConfig(cache_type_k=keys, cache_type_v=values)


class Layers:
    """A model of layers whose queries, keys and values are known."""

    def __init__(self) -> None:
        self.given: list[mx.array] = []

    def make_cache(self, config: CacheConfig) -> list[KVCache]:
        return [make_cache(config, Shape(2, WIDTH, WIDTH), None) for _ in range(LAYERS)]

    def __call__(self, tokens: mx.array, cache: Sequence[StepCache]) -> mx.array:
        start, count = cache[0].position, tokens.shape[1]
        assert isinstance(start, int)
        for layer, one in enumerate(cache):
            q, k, v = (
                mx.array(random_states(layer, heads, what)[:, :, start : start + count])
                for what, heads in enumerate((HEADS, 2, 2))
            )
            self.given.append(one.attend(q, k, v, scaled(1.0, None, None)))
        return tokens


def by_hand(keys: Any, values: Any) -> float:
    wrong = right = 0.0
    for layer in range(LAYERS):
        q, k, v = (random_states(layer, heads, what) for what, heads in enumerate((HEADS, 2, 2)))
        plain, stored = NaiveCache(), NaiveCache(keys=keys, values=values)
        for cache in (plain, stored):
            cache.update(k, v)
        expected = plain.attend(q)
        wrong += float(np.sum((stored.attend(q) - expected) ** 2))
        right += float(np.sum(expected**2))
    return float(np.sqrt(wrong / right))


def test_errors_are_those_by_hand() -> None:
    got = attention_error(
        Layers(), TOKENS, [types("q8", "q8"), types("q4", "f16"), types(None, None)]
    )
    assert got[0] == pytest.approx(by_hand(packed(8, 32), packed(8, 32)), rel=1e-3)
    assert got[1] == pytest.approx(by_hand(packed(4, 32), half), rel=1e-3)
    assert got[2] == 0


def test_the_model_continues_with_the_plain_result() -> None:
    judged, alone = Layers(), Layers()
    attention_error(judged, TOKENS[:50], [types("q2", "q2")])
    alone(mx.array([TOKENS[:50]]), alone.make_cache(types(None, None)))
    for got, expected in zip(judged.given, alone.given, strict=True):
        assert mx.array_equal(got, expected)


def test_types_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ParameterError, match="cache_type_k must be one of"):
        attention_error(Layers(), TOKENS, [types("q9", "q8")])
