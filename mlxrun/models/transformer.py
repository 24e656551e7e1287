"""One decoder-only transformer for every family, as plain functions over immutable weights.

All differences between families are resolved while the layers are built, so the forward pass does
not branch on them. Layers are not ``mlx.nn`` modules: attribute look-ups of modules cost more host
time per token than the whole graph of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from mlxrun.config import DEFAULT_CACHE, CacheConfig
from mlxrun.errors import CacheError
from mlxrun.kv_cache.base import KVCache, Position, StepCache, following
from mlxrun.kv_cache.factory import make_cache
from mlxrun.model import ModelSummary
from mlxrun.models.attention import attention
from mlxrun.models.config import Layer, ModelConfig
from mlxrun.models.feed_forward import feed_forward
from mlxrun.models.functions import Function, added, compose, norm, scaled, softcapped
from mlxrun.weights.fused import linear
from mlxrun.weights.linear import Projection
from mlxrun.weights.parameters import Parameters


def _block(
    layer: Layer, config: ModelConfig, params: Parameters
) -> Callable[[mx.array, StepCache], mx.array]:
    """``(x (B, T, hidden) or of single tokens (B, hidden), cache) -> the same shape``."""
    hidden = config.hidden_size

    def named(name: str | None) -> Function | None:
        return norm(config.norm, params, name, hidden) if name else None

    before = named(layer.before_attention)
    if layer.parallel and layer.before_feed_forward == layer.before_attention:
        before_feed_forward = before
    else:
        before_feed_forward = named(layer.before_feed_forward)
    attend = attention(
        layer.attention,
        config,
        params.under("self_attn"),
        before,
        partial(added, after=named(layer.after_attention), factor=layer.residual),
    )
    feed = added(
        feed_forward(layer.feed_forward, hidden, params.under(layer.mlp), before_feed_forward),
        named(layer.after_feed_forward),
        layer.residual,
    )

    def sequential(x: mx.array, cache: StepCache) -> mx.array:
        h = attend(x, cache, x)
        return feed(h, h)

    def parallel(x: mx.array, cache: StepCache) -> mx.array:
        return feed(x, attend(x, cache, x))

    return parallel if layer.parallel else sequential


def _position_embedding(
    config: ModelConfig, params: Parameters
) -> Callable[[mx.array, Position], mx.array]:
    """``(x (B, T, hidden), position) -> x`` plus the learned embeddings of positions, if any."""
    if config.positions is None:
        return lambda x, position: x
    count = config.context_length
    table = params.weight(config.positions, count, config.hidden_size)

    def add(x: mx.array, position: Position) -> mx.array:
        ids = mx.minimum(following(position, x.shape[1]), count - 1)
        return x + table.take(ids, x.dtype)

    return add


class Transformer:
    """A decoder: immutable weights and a forward pass over KV caches.

    Args:
        config: of the model.
        params: the weights by Hugging Face name, already in the run's dtype.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """

    joint = True

    def __init__(self, config: ModelConfig, params: Parameters) -> None:
        self.config = config
        self.dtype = params.dtype
        model, hidden = params.under("model"), config.hidden_size
        self._embedding = model.weight("embed_tokens", config.vocab_size, hidden)
        self._add_positions = _position_embedding(config, model)
        self._scale_embeddings = compose(
            scaled(config.embedding_scale),
            norm(config.norm, model, config.embedding_norm, hidden)
            if config.embedding_norm
            else None,
        )
        self._layers = [
            _block(layer, config, model.under(f"layers.{i}"))
            for i, layer in enumerate(config.layers)
        ]
        last = norm(config.norm, model, config.final_norm, hidden)
        self.head = compose(
            linear(Projection(self._embedding), last)
            if config.tied
            else params.linear("lm_head", config.vocab_size, hidden, norm=last),
            scaled(config.logit_scale),
            softcapped(config.logit_softcap),
        )
        self.module_bytes = params.module_bytes
        self.nbytes = sum(self.module_bytes.values())
        self._kernels, self._block_weights = params.kernels, params.block_weights
        self.fused = params.kernels is not None
        self.mapped = sum(blocks.nbytes for blocks in self._block_weights if blocks.mapped)

    def __call__(
        self, tokens: mx.array, cache: Sequence[StepCache], *, last_only: bool = False
    ) -> mx.array:
        """Logits after each token.

        Args:
            tokens: int32 ids, shape (B, T).
            cache: one per layer, advanced by T.
            last_only: compute the logits of the last token only, for prefill.

        Returns:
            (B, T, V), or (B, 1, V) with ``last_only``, in the run's dtype.
        """
        x = self.hidden(tokens, cache)
        return self.head(x[:, -1:] if last_only else x)

    def forward(
        self, tokens: mx.array, cache: Sequence[StepCache], select: mx.array | None = None
    ) -> mx.array:
        """Logits (N, V) of tokens (B, T), B * T = N, or of those selected; advances ``cache``."""
        x = self.hidden(tokens, cache)
        if x.shape[1] > 1:
            x = x.reshape(-1, 1, x.shape[-1])
        return self.head(x if select is None else x[select])[:, 0]

    def hidden(self, tokens: mx.array, cache: Sequence[StepCache]) -> mx.array:
        """The stream (B, T, hidden) after all layers, from which :attr:`head` makes logits."""
        x = self._embedding.take(tokens, self.dtype)  # (B, T, hidden)
        x = self._scale_embeddings(self._add_positions(x, cache[0].position))
        single = x.shape[1] == 1
        if single:  # (B, hidden): a product with three dimensions takes two operations more
            x = x.squeeze(1)
        for layer, own in zip(self._layers, cache, strict=True):
            x = layer(x, own)
        return x[:, None] if single else x

    def check(self) -> None:
        """Check that mapped files are complete; see :class:`mlxrun.model.Model`."""
        if self._kernels is not None:
            self._kernels.check()

    def damaged(self) -> list[str]:
        """GGUF tensors with weights that are not finite."""
        return [blocks.name for blocks in self._block_weights if not blocks.finite]

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context_length(self) -> int:
        return self.config.context_length

    @property
    def summary(self) -> ModelSummary:
        config, attention = self.config, self.config.layers[0].attention
        layers, heads, kv_heads = len(config.layers), attention.heads, attention.kv_heads
        return ModelSummary(config.family, layers, config.hidden_size, heads, kv_heads)

    def make_cache(self, config: CacheConfig = DEFAULT_CACHE) -> list[KVCache]:
        """Empty caches, one per layer; a layer with a window of its own gets the smaller one."""
        evicts = config.window is not None or config.sparse is not None
        if evicts and any(layer.attention.alibi for layer in self.config.layers):
            raise CacheError("a model with ALiBi needs every token: its scores depend on distance")
        return [
            make_cache(config, one.attention.cache_shape, one.attention.window)
            for one in self.config.layers
        ]
