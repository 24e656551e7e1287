"""How far attention over stored keys and values is from attention over plain ones.

The model goes on with the plain result, so that every layer is judged on the same queries, keys and
values. Text is read as prompts are, in passes; what a query sees does not depend on their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, Protocol, Self, cast

import mlx.core as mx

from mlxrun.cache.base import Cache, Mask, Position, Product
from mlxrun.config import CacheConfig
from mlxrun.errors import CacheError

# Tokens of a pass.
CHUNK = 256


class Judged(Protocol):
    """What is needed of a model: :class:`mlxrun.models.transformer.Transformer` has it."""

    def __call__(self, tokens: mx.array, cache: Sequence[Cache]) -> mx.array: ...

    def make_cache(self, config: CacheConfig, /) -> list[Cache]: ...


def attention_error(
    model: Judged, tokens: Sequence[int], configs: Sequence[CacheConfig]
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


class _Probe(Cache):
    """A layer's plain cache and others that get the same; sums of squares tell them apart."""

    def __init__(self, plain: Cache, others: Sequence[Cache]) -> None:
        self._plain, self._others = plain, others
        self.wrong, self.right = mx.zeros(len(others)), mx.zeros(())

    @property
    def offset(self) -> int:  # type: ignore[override]
        return self._plain.offset

    @property
    def position(self) -> Position:
        return self._plain.position

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, product: Product
    ) -> mx.array:
        expected = self._plain.attend(queries, keys, values, product)
        exact = expected.astype(mx.float32)
        each = [
            (cache.attend(queries, keys, values, product).astype(mx.float32) - exact).square().sum()
            for cache in self._others
        ]
        self.wrong = self.wrong + mx.stack(each)
        self.right = self.right + exact.square().sum()
        return expected

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        raise CacheError("several caches have no common keys: use attend")

    def trim(self, n: int) -> NoReturn:
        raise CacheError("what was measured cannot be taken back")

    def fork(self) -> Self:
        raise CacheError("a measurement cannot fork")

    @property
    def state(self) -> list[mx.array]:
        return [array for cache in (self._plain, *self._others) for array in cache.state]
