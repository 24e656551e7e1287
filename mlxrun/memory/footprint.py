"""Bytes that a model takes besides its weights: KV caches, and the scratch of a pass.

What is alive at once on MLX's CPU backend was measured (docs/memory.md): its queue runs about one
layer ahead, so that a pass holds all intermediate arrays of one layer, and a cache that grows has
its old arrays and fresh zeros next to the new ones in one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxrun.config import DEFAULT_CACHE, CacheConfig
from mlxrun.kernels.device import CPU, Device
from mlxrun.kernels.native import GATES
from mlxrun.kv_cache.factory import bound_bytes, formats, make_cache
from mlxrun.kv_cache.formats import Format, Plain, StoredKV, reads_packed
from mlxrun.kv_cache.per_channel import PerChannel
from mlxrun.kv_cache.sliding_window import RotatingCache
from mlxrun.models.config import (
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    ModelConfig,
)

# The queue runs ahead by a varying amount, and every pass has small arrays.
SLACK, FIXED = 1.06, 1 << 19
# Layers whose arrays exist twice while a row joins a batch.
JOINING = 2
# Smallest capacity of a cache; see mlxrun.kv_cache.dense.
SMALLEST = 256
# Bytes for each logit while a token is sampled: it and its penalties as float32, keys of 64 bits to
# sort by and their parts, ids.
SAMPLING = 40
# Arrays of a feed-forward's width in a pass: gate, up, and those of the activation.
_WIDE = {"gelu_tanh": 7, "clamped_swiglu": 7}
_WIDE_ELSE = 4
# Widths of head that MLX's fused kernels on a GPU take for prompts.
FUSED_WIDTHS = (64, 80, 128)
# Arrays of scores where keys are packed by channel: plain, packed, both at once, the rest.
_SCORES_BY_CHANNEL = 4
# MLX's queue on the CPU runs many operations ahead, whose arrays are alive at once: so many of
# fused kernels, of which a layer has eight and one for each norm after it; fewer layers where keys
# and values are packed, which takes more operations (measured).
QUEUED, OF_A_LAYER, AHEAD_PACKED = 56, 8, 2


@dataclass(frozen=True)
class LayerFootprint:
    """Bytes that one layer takes.

    Attributes:
        token: of K/V, for each cached token.
        fixed: of the cache, whatever the tokens, as a state is.
        window: tokens cached at most, or None.
        twice: the cache is also kept as it was before the last token, for a rollback of that: a
            state always, a window once it is full.
        step: capacity grows by so many tokens; 0: it doubles.
        stream: of intermediate arrays, for each token of a pass.
        pair: of attention scores, for each query and each key that it attends to.
        seen: of unpacked K/V, for each key that a prompt attends to.
        read: of unpacked K/V, for each key that a row attends to as it decodes.
        matrices: of weights that are unpacked for a pass of many tokens.
        ahead: layers whose arrays are alive at once: the fewer operations a layer is made of, the
            more of them are in the queue.
    """

    token: int = 0
    fixed: int = 0
    window: int | None = None
    twice: bool = False
    step: int = 0
    stream: int = 0
    pair: int = 0
    seen: int = 0
    read: int = 0
    matrices: int = 0
    ahead: int = 1

    def slots(self, tokens: int) -> int:
        """Capacity of a row that has seen so many tokens."""
        if tokens < 1:
            return 0
        if self.step:
            capacity = -(-tokens // self.step) * self.step
        else:
            capacity = max(SMALLEST, 1 << (tokens - 1).bit_length())
        return capacity if self.window is None else min(capacity, self.window)

    def stored(self, tokens: int) -> int:
        """Bytes that a row's cache allocates after so many tokens."""
        nbytes = self.fixed + self.token * self.slots(tokens)
        again = self.twice and (self.window is None or tokens >= self.window)
        return 2 * nbytes if again else nbytes

    def growth(self, before: int, after: int) -> int:
        """Scratch while a row grows: its old arrays, and zeros for the rest of the new ones."""
        grows = before and self.slots(after) > self.slots(before)
        return self.ahead * self.token * self.slots(after) if grows else 0

    def sorting(self, before: int, after: int) -> int:
        """Scratch while a chunk is sorted into a window: old and new together, then a selection."""
        if self.window is None:
            return 0
        return self.token * (2 * self.slots(before) + self.slots(after) + after - before)

    def work(self, queries: int, context: int, rows: int) -> int:
        """Scratch of a pass over ``queries`` tokens, the last of which sees ``context`` tokens.

        Args:
            rows: sequences that decode a token each in the same pass.
        """
        keys = context if self.window is None else min(context, self.window + queries)
        mask = queries * keys
        unpacked = self.matrices if queries > 1 else 0
        expanded = self.read * keys * rows + (self.seen * keys if queries > rows else 0)
        attention = self.pair * queries * keys + mask + expanded
        # Most matrices are those of the feed-forward, when the scores are gone.
        return self.ahead * self.stream * queries + max(attention, unpacked)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes besides its weights.

    Attributes:
        layers: of its blocks.
        sampling: of the logits of one token and of sampling from them.
        head: of the output matrix, unpacked for many tokens at once; 0 where it is not.
        joint: rows go through the model together and share arrays; else one after the other.
    """

    layers: tuple[LayerFootprint, ...]
    sampling: int
    head: int = 0
    joint: bool = True

    def stored(self, tokens: int, rows: int = 1) -> int:
        """Bytes of the KV caches of rows with up to ``tokens`` tokens each.

        Rows share an array in each layer, so the longest decides on the capacity of all.
        """
        return rows * sum(layer.stored(tokens) for layer in self.layers)

    def prefill(self, prompt: int, chunk: int, rows: int = 1) -> int:
        """Bytes at most while the last of several rows prefills its prompt in chunks.

        Counts the KV cache of that row; not those of the others.
        """
        # The chunk in which the capacity doubles for the last time, the last full one, the last.
        doubled = max((layer.slots(prompt) for layer in self.layers), default=0) // 2 + 1
        starts = {min(doubled, prompt) - 1, max(0, prompt - chunk), prompt - 1}
        return max(self._chunk(start // chunk * chunk, prompt, chunk, rows) for start in starts)

    def _chunk(self, start: int, prompt: int, chunk: int, rows: int) -> int:
        end = min(start + chunk, prompt)
        decoding = rows - 1 if self.joint else 0  # each decodes a token in the same pass
        queries = end - start + decoding
        most = max(
            layer.work(queries, end, decoding)
            + layer.growth(start, end)
            + layer.sorting(start, end)
            for layer in self.layers
        )
        return self.stored(end) + self._scratch(most, decoding)

    def decode(self, prompt: int, tokens: int, rows: int = 1) -> int:
        """Bytes at most while rows decode from ``prompt`` to ``tokens`` tokens."""
        computed = rows if self.joint else 1
        if computed > 1:
            # A row that joins makes a layer's arrays anew, with zeros for itself.
            each = (max(JOINING, layer.ahead) * layer.stored(tokens) for layer in self.layers)
            copies = (rows + 1) * max(each, default=0)
        else:
            copies = max((layer.growth(prompt, tokens) for layer in self.layers), default=0)
        work = max((layer.work(computed, tokens, computed) for layer in self.layers), default=0)
        return self.stored(tokens, rows) + self._scratch(copies + work, computed)

    def _scratch(self, layer: int, rows: int) -> int:
        """Scratch of a pass of which the largest layer takes ``layer``."""
        logits = max(1, rows) * self.sampling + (self.head if rows > 1 else 0)
        return int(SLACK * (layer + logits)) + FIXED

    def peak(self, prompt: int, tokens: int, rows: int = 1, *, chunk: int) -> int:
        """Bytes at most, from the first prompt to the last token.

        Args:
            prompt: tokens of each row's prompt.
            tokens: of its prompt and its completion.
            chunk: prompt tokens in a pass.
        """
        others = self.stored(tokens, rows - 1)
        return max(others + self.prefill(prompt, chunk, rows), self.decode(prompt, tokens, rows))


@dataclass(frozen=True)
class Execution:
    """How a model runs.

    Attributes:
        dtype: of activations.
        device: that it runs on.
        packed: weights are in MLX's quantized layouts.
        fused: the kernels of this package compute, on a CPU in float32.
        cache: of the KV caches.
    """

    dtype: mx.Dtype = mx.float32
    device: Device = CPU
    packed: bool = False
    fused: bool = False
    cache: CacheConfig = DEFAULT_CACHE

    @property
    def unpacks(self) -> bool:
        return self.packed and not self.device.fast_packed_matmul


def footprint(config: ModelConfig, run: Execution) -> Footprint:
    """The footprint of our transformer."""
    layers = tuple(_layer(config, block, run) for block in config.layers)
    head = config.vocab_size * config.hidden_size * run.dtype.size if run.unpacks else 0
    return Footprint(layers, SAMPLING * config.vocab_size, head)


def _layer(config: ModelConfig, block: Layer, run: Execution) -> LayerFootprint:
    attention, size = block.attention, run.dtype.size
    shape = attention.cache_shape
    keys, values = formats(shape, run.cache)
    widths = shape.heads * (shape.key + shape.value)
    plain = all(
        isinstance(each, Plain) and (each.dtype is None or each.dtype == run.dtype)
        for each in (keys, values)
    )
    cache = make_cache(run.cache, shape, attention.window)
    window = cache.layout.size if isinstance(cache, RotatingCache) else None
    return LayerFootprint(
        token=keys.token_bytes(shape.heads, shape.key, run.dtype)
        + values.token_bytes(shape.heads, shape.value, run.dtype)
        + bound_bytes(run.cache, shape, attention.window, run.dtype),
        fixed=keys.fixed_bytes(shape.heads, shape.key, run.dtype),
        window=window,
        stream=size * _stream(config, block, run),
        ahead=_ahead(config, block, plain, run),
        pair=size * attention.heads * _scores(attention, keys, run),
        seen=0 if plain else size * widths,
        read=0 if plain or _reads_packed(attention, keys, values, run) else size * widths,
        matrices=size * block_weights(block, config.hidden_size) if run.unpacks else 0,
    )


def _reads_packed(
    attention: Attention | LatentAttention, keys: Format, values: Format, run: Execution
) -> bool:
    """Whether a row that decodes attends to packed K/V without unpacking them."""
    heads, queries = attention.kv_heads, mx.zeros((1, attention.heads, 1, 1), run.dtype)
    k, v = (StoredKV(each, (), heads, run.dtype) for each in (keys, values))
    return reads_packed(k, v, queries)


def _stream(config: ModelConfig, block: Layer, run: Execution) -> int:
    """Numbers for each token of a pass that are alive at once."""
    attention, hidden = block.attention, config.hidden_size
    if not run.fused or isinstance(attention, LatentAttention):
        return _attention(attention, hidden) + _inner(block.feed_forward, hidden)
    # Projections, rotated heads, the output of attention, and the streams after attention and after
    # the feed-forward, each with a norm where there is one.
    heads = attention.head_dim * (3 * attention.heads + 2 * attention.kv_heads)
    return heads + (2 + _norms_after(block)) * hidden + _fused_inner(block.feed_forward, hidden)


def _norms_after(block: Layer) -> int:
    """Norms that are operations of their own."""
    return (block.after_attention is not None) + (block.after_feed_forward is not None)


def _ahead(config: ModelConfig, block: Layer, plain: bool, run: Execution) -> int:
    """Layers whose arrays are alive at once; ``plain``: K/V are not packed."""
    if not run.fused or isinstance(block.attention, LatentAttention):
        return 1
    layers = QUEUED // (OF_A_LAYER + _norms_after(block)) if plain else AHEAD_PACKED
    return min(len(config.layers), layers)


def _fused_inner(block: FeedForward | Experts, hidden: int) -> int:
    """Numbers for each token between a fused feed-forward's input and its output."""
    if isinstance(block, Experts):
        shared = _fused_inner(block.shared, hidden) + hidden if block.shared else 0
        return 4 * block.count + block.used * (block.size + 2 * hidden) + shared
    return block.size if block.activation in GATES else _WIDE_ELSE * block.size


def _attention(attention: Attention | LatentAttention, hidden: int) -> int:
    """Numbers for each token: norm, projections, rotation, output, the stream after it."""
    heads, stream = attention.heads, 3 * hidden
    if isinstance(attention, LatentAttention):
        rope_dim, latent = attention.rope.dims, attention.kv_lora_rank
        query = (
            3 * heads * (attention.qk_nope_head_dim + rope_dim) + (attention.q_lora_rank or 0) * 2
        )
        mixed = 4 * heads * latent + 2 * heads * attention.v_head_dim
        return stream + query + mixed + 3 * (latent + rope_dim)
    normed = attention.qk_norm is not None
    queries, keys = heads * attention.head_dim, attention.kv_heads * attention.head_dim
    return stream + (5 + normed) * queries + (3 + normed) * keys


def _inner(block: FeedForward | Experts, hidden: int) -> int:
    """Numbers for each token: norm, gate, up, their product, output, the stream after it."""
    if isinstance(block, Experts):
        shared = _inner(block.shared, hidden) if block.shared else 0
        each = _WIDE.get(block.activation, _WIDE_ELSE) * block.size + 2 * hidden
        return 3 * hidden + 4 * block.count + block.used * each + shared
    return 3 * hidden + _WIDE.get(block.activation, _WIDE_ELSE) * block.size


def _scores(attention: Attention | LatentAttention, keys: Format, run: Execution) -> int:
    """Arrays of scores of every query and key that are alive at once."""
    if run.fused and not isinstance(attention, LatentAttention):
        return _SCORES_BY_CHANNEL if isinstance(keys, PerChannel) else 0
    if isinstance(keys, PerChannel):  # no fused kernel: two kinds of scores
        return _SCORES_BY_CHANNEL
    if isinstance(attention, LatentAttention) or attention.alibi is not None:
        return 1 if run.device.fused_attention else 2
    plain = attention.softcap is None and attention.head_dim in FUSED_WIDTHS
    return 0 if plain and run.device.fused_attention else 3 if attention.sinks else 1


def block_weights(block: Layer, hidden: int) -> int:
    """Weights of a block that every token is multiplied with: all but its experts'."""
    return _attention_weights(block.attention, hidden) + _shared_weights(block.feed_forward, hidden)


def _attention_weights(attention: Attention | LatentAttention, hidden: int) -> int:
    heads = attention.heads
    if isinstance(attention, LatentAttention):
        rope_dim, latent = attention.rope.dims, attention.kv_lora_rank
        rows, wide = heads * (attention.qk_nope_head_dim + rope_dim), attention.q_lora_rank
        queries = rows * hidden if wide is None else wide * (hidden + rows)
        compressed = (latent + rope_dim) * hidden
        inward, outward = attention.qk_nope_head_dim * latent, latent * attention.v_head_dim
        return queries + compressed + heads * (inward + outward + attention.v_head_dim * hidden)
    return 2 * hidden * attention.head_dim * (heads + attention.kv_heads)


def _shared_weights(inner: FeedForward | Experts, hidden: int) -> int:
    """Weights of a feed-forward; of experts the router's and those of the shared expert."""
    if isinstance(inner, Experts):
        shared = _shared_weights(inner.shared, hidden) if inner.shared else 0
        gate = hidden if inner.shared_gate else 0
        return inner.count * hidden + shared + gate
    gated = inner.fused or len(inner.names) == 3
    return (3 if gated else 2) * hidden * inner.size


def expert_weights(inner: FeedForward | Experts, hidden: int) -> int:
    """Weights of the experts that one token is routed to; 0 where there are none."""
    return 3 * hidden * inner.size * inner.used if isinstance(inner, Experts) else 0
