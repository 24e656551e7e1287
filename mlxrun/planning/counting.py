"""From a model's config and the bytes of its modules to what decides on its work.

The bytes are those of a loaded model (:attr:`Transformer.module_bytes`) or those of headers
(:class:`mlxrun.loader.WeightStorage`); operations come from the config. Reads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxrun.cache.choice import Wanted, block_bytes
from mlxrun.cache.sparsity import Window
from mlxrun.kernels.device import device
from mlxrun.loader import DTYPES, WeightStorage, definition
from mlxrun.memory.footprint import (
    DEFAULT_CACHE,
    Execution,
    LayerFootprint,
    block_weights,
    expert_weights,
    footprint,
)
from mlxrun.models.config import Attention, Experts, LatentAttention, ModelConfig
from mlxrun.planning.work import Attending, Counts, Routed, Weights

if TYPE_CHECKING:
    from mlxrun.models.mlx_lm import MLXLMClasses

_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"\b(switch_mlp|experts|input_linear|output_linear)\b")
_EMBEDDING = re.compile(r"\bembed_tokens$")
_HEAD = re.compile(r"\blm_head(\.bias)?$")
# Weights that take less than this part of plain ones are packed, at least some of them.
_PLAIN = 0.97


def count_held(
    config: Mapping[str, Any], held: WeightStorage, cache: Wanted = DEFAULT_CACHE
) -> Counts:
    """The counts of any model that can be run, by its config and how its weights are held.

    Args:
        config: ``config.json`` in Hugging Face terms.
        held: with the bytes of its modules, for a model of ours.
        cache: what is asked of caches.

    Raises:
        MlxrunError: the config does not make a model.
    """
    defined = definition(config)
    if not isinstance(defined, ModelConfig):
        return count_mlx_lm(defined, config, held)
    return count(defined, held.modules, DTYPES[held.dtype], cache)


def count(
    config: ModelConfig,
    modules: Mapping[str, float],
    dtype: mx.Dtype,
    cache: Wanted = DEFAULT_CACHE,
) -> Counts:
    """The counts of a model of ours.

    Args:
        config: of the model.
        modules: bytes by name of module; in Hugging Face terms, as originals or we spell them.
        dtype: of activations, which plain caches have as well.
        cache: what is asked of caches.

    Raises:
        ParameterError: no such type of cache, or none for the model's heads.
    """
    layers = footprint(config, Execution(dtype, cache=cache)).layers
    attending = tuple(
        _attending(layer, block.attention, dtype, cache)
        for layer, block in zip(layers, config.layers, strict=True)
    )
    multiplied = sum(
        block_weights(block, config.hidden_size)
        + expert_weights(block.feed_forward, config.hidden_size, used=True)
        for block in config.layers
    )
    head = config.vocab_size * config.hidden_size
    return Counts(split(config, modules), attending, multiplied, head)


def split(config: ModelConfig, modules: Mapping[str, float]) -> Weights:
    """The bytes of modules by how much of them a pass reads."""
    experts = dict.fromkeys(range(len(config.layers)), 0.0)
    table = head = positions = always = 0.0
    for name, nbytes in modules.items():
        layer = _LAYER.search(name)
        if _EMBEDDING.search(name):
            table += nbytes
        elif _HEAD.search(name):
            head += nbytes
        elif config.positions and name.endswith(f".{config.positions}"):
            positions += nbytes
        elif layer and _of_experts(config, int(layer[1]), layer[2]):
            experts[int(layer[1])] += nbytes
        else:
            always += nbytes
    row = table / config.vocab_size + positions / config.context_length
    routed = tuple(
        Routed(block.feed_forward.count, block.feed_forward.used, experts[i])
        for i, block in enumerate(config.layers)
        if isinstance(block.feed_forward, Experts)
    )
    if config.tied:
        return Weights(always, table, row, positions, routed)
    return Weights(always, head, row, table + positions, routed)


def _attending(
    layer: LayerFootprint, attention: Attention | LatentAttention, dtype: mx.Dtype, cache: Wanted
) -> Attending:
    """One layer, of which the footprint knows what its cache stores."""
    shape, pair = attention.cache_shape, _pair(attention)
    pattern = cache.pattern(attention.window)
    sparse = None if isinstance(pattern, Window) else pattern
    # What bounds take is stored with each token, but read by the block.
    token = layer.token - cache.bound_bytes(shape, attention.window, dtype)
    bound = block_bytes(shape, dtype) if sparse else 0
    # Keys by channel that are not packed yet count as packed: they are more bytes, never fewer.
    return Attending(token, window=layer.window, pair=pair, sparse=sparse, bound=bound)


def _of_experts(config: ModelConfig, layer: int, name: str) -> bool:
    """Whether a module of a layer is one of its experts, or a stack of them."""
    if layer >= len(config.layers):
        return False
    fed = config.layers[layer].feed_forward
    return isinstance(fed, Experts) and "shared" not in name and bool(_EXPERTS.search(name))


def _pair(attention: Attention | LatentAttention) -> int:
    """Multiplications for one query and one key, in all heads: its score, and its value's part."""
    if isinstance(attention, LatentAttention):  # heads meet the latent that they share
        return attention.heads * (2 * attention.kv_lora_rank + attention.rope.dims)
    return attention.heads * 2 * attention.head_dim


def count_mlx_lm(classes: MLXLMClasses, config: Mapping[str, Any], held: WeightStorage) -> Counts:
    """The counts of a model of mlx-lm's classes, which do not say what they multiply.

    Its bytes are shared out by numbers of weights, which is exact where all are plain.

    Args:
        classes: ``Model`` and ``ModelArgs``.
        config: ``config.json``.
        held: with the bytes of all weights.
    """
    from mlxrun.models.mlx_lm import sketch
    from mlxrun.planning.traffic import weight_traffic

    dtype = DTYPES[held.dtype]
    made = sketch(classes, config, dtype)
    taken = made.footprint(device())
    layers = tuple(
        Attending(layer.token, layer.fixed, state=not layer.token, window=layer.window)
        for layer in taken.layers
    )
    read = weight_traffic(made)
    each = held.nbytes / read.total
    routed = tuple(
        Routed(count, used, each * weights) for (count, used), weights in read.routed.items()
    )
    unread = each * (read.table + read.unrouted)
    weights = Weights(each * read.always, each * read.head, each * read.row, unread, routed)
    unknown = ["operations, and so whether compute binds"]
    if (routed or read.table) and each < _PLAIN * dtype.size:
        unknown.append("which of its parts are packed in more bits than others: all count alike")
    if read.unrouted:
        unknown.append("how many of its experts a pass reads: none is counted")
    return Counts(weights, layers, None, 0, tuple(unknown), taken.joint)
