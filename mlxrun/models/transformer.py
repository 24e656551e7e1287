"""One decoder-only transformer for every family, as plain functions over immutable weights.

Everything that families differ in is decided while the layers are built; the forward pass has no
branches on it. Layers are not ``mlx.nn`` modules: attribute look-ups of modules cost more host time
per token than the whole graph of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxrun.cache.base import Cache
from mlxrun.cache.dense import DenseCache
from mlxrun.cache.rotating import RotatingCache
from mlxrun.models.config import Attention, FeedForward, Layer, ModelConfig
from mlxrun.models.parameters import Parameters
from mlxrun.models.rope import rotation

Function = Callable[[mx.array], mx.array]


def _rms_norm(weight: mx.array, eps: float) -> Function:
    """Zhang and Sennrich, 2019, arXiv:1910.07467; over the last axis."""
    return lambda x: mx.fast.rms_norm(x, weight, eps)


def _attention(
    config: Attention, params: Parameters, hidden: int, eps: float
) -> Callable[[mx.array, Cache], mx.array]:
    """``(x (B, T, hidden), cache) -> (B, T, hidden)``."""
    heads, kv_heads, dim, scale = config.heads, config.kv_heads, config.head_dim, config.scale
    q_proj = params.linear("q_proj", heads * dim, hidden)
    k_proj = params.linear("k_proj", kv_heads * dim, hidden)
    v_proj = params.linear("v_proj", kv_heads * dim, hidden)
    o_proj = params.linear("o_proj", hidden, heads * dim)
    rotate = rotation(config.rope)
    if config.qk_norm:
        q_norm = _rms_norm(params.vector("q_norm.weight", dim), eps)
        k_norm = _rms_norm(params.vector("k_norm.weight", dim), eps)
    else:
        q_norm = k_norm = _identity

    def attend(x: mx.array, cache: Cache) -> mx.array:
        b, t, _ = x.shape
        q = q_norm(q_proj(x).reshape(b, t, heads, dim)).transpose(0, 2, 1, 3)  # (B, H, T, D)
        k = k_norm(k_proj(x).reshape(b, t, kv_heads, dim)).transpose(0, 2, 1, 3)
        v = v_proj(x).reshape(b, t, kv_heads, dim).transpose(0, 2, 1, 3)
        offset = cache.offset
        keys, values, mask = cache.update(rotate(k, offset), v)
        out = mx.fast.scaled_dot_product_attention(
            rotate(q, offset), keys, values, scale=scale, mask=mask
        )
        return o_proj(out.transpose(0, 2, 1, 3).reshape(b, t, heads * dim))

    return attend


def _identity(x: mx.array) -> mx.array:
    return x


ACTIVATIONS: dict[str, Function] = {"silu": lambda x: x * mx.sigmoid(x)}


def _feed_forward(config: FeedForward, params: Parameters, hidden: int) -> Function:
    """``x (B, T, hidden) -> (B, T, hidden)``."""
    gate = params.linear("gate_proj", config.size, hidden)
    up = params.linear("up_proj", config.size, hidden)
    down = params.linear("down_proj", hidden, config.size)
    activation = ACTIVATIONS[config.activation]
    return lambda x: down(activation(gate(x)) * up(x))


def _block(
    config: Layer, params: Parameters, hidden: int, eps: float
) -> Callable[[mx.array, Cache], mx.array]:
    attend = _attention(config.attention, params.under("self_attn"), hidden, eps)
    feed_forward = _feed_forward(config.feed_forward, params.under("mlp"), hidden)
    before_attention = _rms_norm(params.vector("input_layernorm.weight", hidden), eps)
    before_feed_forward = _rms_norm(params.vector("post_attention_layernorm.weight", hidden), eps)

    def forward(x: mx.array, cache: Cache) -> mx.array:
        h = x + attend(before_attention(x), cache)
        return h + feed_forward(before_feed_forward(h))

    return forward


class Transformer:
    """A decoder: immutable weights and a forward pass; what it remembers lives in caches.

    Args:
        config: what to build.
        params: the weights by Hugging Face name, already in the run's dtype.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, params: Parameters) -> None:
        self.config = config
        self.dtype = params.dtype
        model, hidden = params.under("model"), config.hidden_size
        self._embedding = model.weight("embed_tokens", config.vocab_size, hidden)
        self._layers = [
            _block(layer, model.under(f"layers.{i}"), hidden, config.norm_eps)
            for i, layer in enumerate(config.layers)
        ]
        self._norm = _rms_norm(model.vector("norm.weight", hidden), config.norm_eps)
        head = self._embedding
        if not config.tied:
            head = params.weight("lm_head", config.vocab_size, hidden)
        self._head = head.product()
        self.nbytes = params.nbytes

    def __call__(
        self, tokens: mx.array, cache: Sequence[Cache], *, last_only: bool = False
    ) -> mx.array:
        """Logits after each token.

        Args:
            tokens: int32 ids, shape (B, T).
            cache: one per layer, advanced by T.
            last_only: compute the logits of the last token only, as prefill needs them.

        Returns:
            (B, T, V), or (B, 1, V) with ``last_only``, in the run's dtype.
        """
        x = self._embedding.take(tokens, self.dtype)  # (B, T, hidden)
        for layer, memory in zip(self._layers, cache, strict=True):
            x = layer(x, memory)
        if last_only:
            x = x[:, -1:]
        return self._head(self._norm(x))

    def make_cache(self, *, window: int | None = None, keep: int = 0) -> list[Cache]:
        """Empty caches, one per layer.

        Args:
            window: remember only the last ``window`` tokens (and the first ``keep``) in layers
                that would remember all; layers with a window of their own keep the smaller one.
            keep: first tokens never forgotten under ``window``.
        """
        return [_cache(layer.attention.window, window, keep) for layer in self.config.layers]


def _cache(own: int | None, wanted: int | None, keep: int) -> Cache:
    if own is not None and (wanted is None or own <= wanted):
        return RotatingCache(own)
    return DenseCache() if wanted is None else RotatingCache(wanted, keep=keep)
