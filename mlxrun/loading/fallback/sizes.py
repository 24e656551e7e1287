"""What a model of mlx-lm's is and needs, from its ``config.json`` alone: nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from mlxrun.loading.fallback.memory import arrays_in
from mlxrun.loading.fallback.model import ForeignModel, empty_module, unpromoted
from mlxrun.loading.fallback.weights import cast


@dataclass(frozen=True)
class Sketch:
    """A model whose weights are never read.

    Attributes:
        model: with weights of the right shapes.
        entries: mlx-lm's caches after one token, not computed either.
    """

    model: ForeignModel
    entries: list[Any]

    def cache_values(self, context: int) -> int:
        """Numbers that the caches hold after ``context`` tokens."""
        return sum(_values(entry, context) for entry in self.entries)


def sketch(
    classes: tuple[Any, Any], config: Mapping[str, Any], dtype: mx.Dtype = mx.float16
) -> Sketch:
    """The model that a config means, in the types that loading would give it.

    Args:
        classes: ``Model`` and ``ModelArgs``, as :func:`registry.classes` gives them.
        config: ``config.json``.
        dtype: of activations. Classes keep some states in float32 whatever it is.

    Raises:
        CheckpointError: the class cannot be built of such a config.
    """

    def made(precise: bool) -> tuple[ForeignModel, None]:
        module = empty_module(classes, config)
        cast(module, dtype, precise=precise)
        return ForeignModel(module, config, dtype), None

    model, _ = unpromoted(made)
    (memory,) = model.make_cache()
    model(mx.array([[0]]), [memory])
    return Sketch(model, memory.entries)


def _values(entry: Any, context: int) -> int:
    if isinstance(entry, CacheList):
        return sum(_values(part, context) for part in entry.caches)
    held = context
    if isinstance(entry, RotatingKVCache):
        held = min(context, entry.max_size)
    elif isinstance(entry, ChunkedKVCache):
        held = min(context, entry.chunk_size)
    elif not isinstance(entry, KVCache):  # a state, as large after one token as after many
        return sum(int(array.size) for array in arrays_in(entry))
    if entry.keys is None:  # of a layer that reads another's
        return 0
    return held * sum(int(a.shape[1] * a.shape[3]) for a in (entry.keys, entry.values))
