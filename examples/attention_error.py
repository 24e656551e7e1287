"""Error of attention over stored keys and values, against unpacked ones.

The model goes on with the unpacked result, so that every layer is judged on the same queries, keys
and values. The text is prefilled in chunks; results do not depend on their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import mlx.core as mx

from mlxrun.config import CacheConfig
from mlxrun.kv_cache.attention import AttentionOp
from mlxrun.kv_cache.base import KVCache, Position, StepCache

CHUNK = 256


class CachedModel(Protocol):
    def __call__(self, tokens: mx.array, cache: Sequence[StepCache]) -> mx.array: ...

    def make_cache(self, config: CacheConfig, /) -> list[KVCache]: ...


def attention_error(
    model: CachedModel, tokens: Sequence[int], configs: Sequence[CacheConfig]
) -> list[float]:
    """The relative error of attention for each way to store keys and values.

    Args:
        tokens: ids of a text.

    Returns:
        ``sqrt(sum((got - plain)^2) / sum(plain^2))`` over the outputs of all heads, layers and
        tokens, for each config.

    Raises:
        ParameterError, CacheError: the model cannot have such a cache.
    """
    tried = [model.make_cache(config) for config in configs]
    plain = model.make_cache(CacheConfig())
    probes = [_Probe(own, [layers[i] for layers in tried]) for i, own in enumerate(plain)]
    for start in range(0, len(tokens), CHUNK):
        model(mx.array([tokens[start : start + CHUNK]]), probes)
        mx.eval([array for probe in probes for array in (*probe.state, probe.wrong, probe.right)])
    wrong = mx.stack([probe.wrong for probe in probes]).sum(axis=0)
    right = mx.stack([probe.right for probe in probes]).sum()
    return cast(list[float], mx.sqrt(wrong / right).tolist())


class _Probe(StepCache):
    """A layer's unpacked cache and others with the same tokens; sums squared errors."""

    def __init__(self, plain: KVCache, others: Sequence[KVCache]) -> None:
        self._plain, self._others = plain, others
        self.wrong, self.right = mx.zeros(len(others)), mx.zeros(())

    @property
    def position(self) -> Position:
        return self._plain.position

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, op: AttentionOp
    ) -> mx.array:
        unpacked = self._plain.attend(queries, keys, values, op)
        exact = unpacked.astype(mx.float32)
        each = [
            (cache.attend(queries, keys, values, op).astype(mx.float32) - exact).square().sum()
            for cache in self._others
        ]
        self.wrong = self.wrong + mx.stack(each)
        self.right = self.right + exact.square().sum()
        return unpacked

    @property
    def state(self) -> list[mx.array]:
        return [array for cache in (self._plain, *self._others) for array in cache.state]
