"""A directory's weights as the model that will read them wants them, before they are converted.

Names, shapes and completeness are checked against the model itself; no weight is read.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from converters.directory.convert import Plan
from converters.directory.names import form_of, normalise, stays, text_config
from converters.directory.weights import Weights
from mlxrun.loading.model import foreign_classes
from mlxrun.models.families import model_config
from mlxrun.models.transformer import Transformer
from mlxrun.weights.parameters import Parameters

NO_PLACE = "the model has no such parameter"
# Keys that say how the source was stored, or that name code which is not copied.
_SOURCE_ONLY = ("quantization", "quantization_config", "auto_map")


def prepare(config: dict[str, Any], weights: Weights) -> Plan:
    """The plan of a conversion, for our families and for those of mlx-lm.

    Raises:
        UnsupportedArchitectureError: neither has the ``model_type``.
        CheckpointError: config and weights do not make such a model.
    """
    config = text_config(config)
    kept = {key: value for key, value in config.items() if key not in _SOURCE_ONLY}
    if foreign := foreign_classes(config):
        from mlxrun.loading.fallback.plan import foreign_plan

        return foreign_plan(foreign, kept, weights)
    family = model_config(config)
    normalise(config, weights, stock=True)
    # Built of noughts: this checks names and shapes, and no more.
    whole = Weights(dict(weights.arrays), dict(weights.layouts))
    normalise(config, whole)
    sketch = {name: _placeholder(array) for name, array in whole.arrays.items()}
    params = Parameters(sketch, whole.layouts, mx.float32, join=False)
    Transformer(family, params)
    for name in params.unused():
        weights.skip(name, NO_PLACE)
    return Plan(
        kept | {"tie_word_embeddings": family.tied},
        weights,
        form_of(config),
        lambda name: stays(config, name),
    )


def _placeholder(array: mx.array) -> mx.array:
    """An array of noughts of the same shape that takes no memory, floats as they will be cast."""
    floating = mx.issubdtype(array.dtype, mx.floating)
    return mx.broadcast_to(mx.zeros((), mx.float32 if floating else array.dtype), array.shape)
