"""What a layer of our transformer takes: its figures from a :class:`ModelConfig`.

Counts arrays that exist at once in one layer's pass; reads no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxrun.cache.by_channel import ByChannel
from mlxrun.cache.choice import Wanted, formats
from mlxrun.cache.formats import Format, Plain, Seen, reads_packed
from mlxrun.cache.rotating import RotatingCache
from mlxrun.footprint import DRAW, Footprint, Layer
from mlxrun.kernels.device import CPU, Device
from mlxrun.kernels.native import GATES
from mlxrun.models.config import Attention, Experts, FeedForward, LatentAttention, ModelConfig
from mlxrun.models.config import Layer as Block
from mlxrun.planning import matrices

# Arrays of a feed-forward's width in a pass: gate, up, what the activation makes of them.
_FED = {"gelu_tanh": 7, "clamped_swiglu": 7}
_FED_ELSE = 4
# Widths of head that MLX's fused kernels on a GPU take for prompts.
FUSED_WIDTHS = (64, 80, 128)
# Arrays of scores where keys are packed by channel: plain, packed, both at once, what is left.
_SCORES_BY_CHANNEL = 4
# MLX's queue on the CPU runs many operations ahead, whose arrays are alive at once: so many of
# fused kernels, of which a layer has eight and one for each norm after it; fewer layers where keys
# and values are packed, which takes more operations (measured).
QUEUED, OF_A_LAYER, AHEAD_PACKED = 56, 8, 2
AS_IT_COMES = Wanted(None, 0, None, None)


@dataclass(frozen=True)
class Run:
    """How a model is run.

    Attributes:
        dtype: of activations.
        device: that it runs on.
        packed: weights are packed in MLX's forms.
        fused: the kernels of this package compute, on a CPU in float32.
        cache: what is asked of caches.
    """

    dtype: mx.Dtype = mx.float32
    device: Device = CPU
    packed: bool = False
    fused: bool = False
    cache: Wanted = AS_IT_COMES


def footprint(config: ModelConfig, run: Run) -> Footprint:
    """What a model takes besides its weights.

    Raises:
        ParameterError: no such type of cache, or none for the model's heads.
    """
    layers = tuple(_layer(config, block, run) for block in config.layers)
    unpacks = run.packed and not run.device.fast_packed_matmul
    head = config.vocab_size * config.hidden_size * run.dtype.size if unpacks else 0
    return Footprint(layers, DRAW * config.vocab_size, head)


def _layer(config: ModelConfig, block: Block, run: Run) -> Layer:
    attention, size = block.attention, run.dtype.size
    shape = attention.cache_shape
    keys, values = formats(shape, run.cache.keys, run.cache.values)
    widths = shape.heads * (shape.key + shape.value)
    plain = all(
        isinstance(each, Plain) and (each.dtype is None or each.dtype == run.dtype)
        for each in (keys, values)
    )
    cache = run.cache.cache(shape, attention.window)
    window = cache.layout.size if isinstance(cache, RotatingCache) else None
    return Layer(
        token=keys.token_bytes(shape.heads, shape.key, run.dtype)
        + values.token_bytes(shape.heads, shape.value, run.dtype)
        + run.cache.bound_bytes(shape, attention.window, run.dtype),
        fixed=keys.fixed_bytes(shape.heads, shape.key, run.dtype),
        window=window,
        stream=size * _stream(config, block, run),
        ahead=_ahead(config, block, plain, run),
        pair=size * attention.heads * _scores(attention, keys, run),
        seen=0 if plain else size * widths,
        read=0 if plain or _reads_packed(attention, keys, values, run) else size * widths,
        matrices=size * matrices.of_block(block, config.hidden_size)
        if run.packed and not run.device.fast_packed_matmul
        else 0,
    )


def _reads_packed(
    attention: Attention | LatentAttention, keys: Format, values: Format, run: Run
) -> bool:
    """Whether a row that decodes multiplies with packed codes."""
    heads, queries = attention.kv_heads, mx.zeros((1, attention.heads, 1, 1), run.dtype)
    k, v = (Seen(each, (), heads, run.dtype) for each in (keys, values))
    return reads_packed(k, v, queries)


def _stream(config: ModelConfig, block: Block, run: Run) -> int:
    """Numbers for each token of a pass that are alive at once."""
    attention, hidden = block.attention, config.hidden_size
    if not run.fused or isinstance(attention, LatentAttention):
        return _attention(attention, hidden) + _fed(block.feed_forward, hidden)
    # What projections make, what heads become, what attention makes of them, and the streams after
    # attention and after the feed-forward, each with a norm where there is one.
    heads = attention.head_dim * (3 * attention.heads + 2 * attention.kv_heads)
    return heads + (2 + _norms_after(block)) * hidden + _fused_fed(block.feed_forward, hidden)


def _norms_after(block: Block) -> int:
    """Norms that are operations of their own."""
    return (block.after_attention is not None) + (block.after_feed_forward is not None)


def _ahead(config: ModelConfig, block: Block, plain: bool, run: Run) -> int:
    """Layers whose arrays are alive at once.

    Args:
        plain: keys and values are stored as they are.
    """
    if not run.fused or isinstance(block.attention, LatentAttention):
        return 1
    layers = QUEUED // (OF_A_LAYER + _norms_after(block)) if plain else AHEAD_PACKED
    return min(len(config.layers), layers)


def _fused_fed(block: FeedForward | Experts, hidden: int) -> int:
    """Numbers for each token between a feed-forward's input and its output."""
    if isinstance(block, Experts):
        shared = _fused_fed(block.shared, hidden) + hidden if block.shared else 0
        return 4 * block.count + block.used * (block.size + 2 * hidden) + shared
    return block.size if block.activation in GATES else _FED_ELSE * block.size


def _attention(attention: Attention | LatentAttention, hidden: int) -> int:
    """Numbers for each token: norm, projections, rotation, output, the stream after it."""
    heads, stream = attention.heads, 3 * hidden
    if isinstance(attention, LatentAttention):
        turning, latent = attention.rope.dims, attention.latent
        query = 3 * heads * (attention.head_dim + turning) + (attention.query_latent or 0) * 2
        mixed = 4 * heads * latent + 2 * heads * attention.value_dim
        return stream + query + mixed + 3 * (latent + turning)
    normed = attention.qk_norm is not None
    queries, keys = heads * attention.head_dim, attention.kv_heads * attention.head_dim
    return stream + (5 + normed) * queries + (3 + normed) * keys


def _fed(block: FeedForward | Experts, hidden: int) -> int:
    """Numbers for each token: norm, gate, up, their product, output, the stream after it."""
    if isinstance(block, Experts):
        shared = _fed(block.shared, hidden) if block.shared else 0
        each = _FED.get(block.activation, _FED_ELSE) * block.size + 2 * hidden
        return 3 * hidden + 4 * block.count + block.used * each + shared
    return 3 * hidden + _FED.get(block.activation, _FED_ELSE) * block.size


def _scores(attention: Attention | LatentAttention, keys: Format, run: Run) -> int:
    """Arrays of scores of every query and key that are alive at once."""
    if run.fused and not isinstance(attention, LatentAttention):
        return _SCORES_BY_CHANNEL if isinstance(keys, ByChannel) else 0
    if isinstance(keys, ByChannel):  # no fused kernel; those of plain and of packed keys are joined
        return _SCORES_BY_CHANNEL
    if isinstance(attention, LatentAttention):
        return 1 if run.device.fused_attention else 2
    if attention.alibi is not None:
        return 1 if run.device.fused_attention else 2
    plain = attention.softcap is None and attention.head_dim in FUSED_WIDTHS
    return 0 if plain and run.device.fused_attention else 3 if attention.sinks else 1


def weights(config: ModelConfig) -> int:
    """How many weights a model has in its matrices."""
    hidden = config.hidden_size
    total = (1 if config.tied else 2) * config.vocab_size * hidden
    for block in config.layers:
        total += matrices.of_block(block, hidden)
        total += matrices.of_experts(block.feed_forward, hidden, used=False)
    return total
