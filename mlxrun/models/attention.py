"""Attention of one layer, as a function of the stream and of the layer's cache."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlxrun.cache.base import Cache, Position, following
from mlxrun.cache.products import falling, latent, product
from mlxrun.models.config import Attention, LatentAttention, ModelConfig, Temperature
from mlxrun.models.functions import Function, clipped, compose, norm
from mlxrun.models.rope import rotation
from mlxrun.weights.parameters import Parameters

Attend = Callable[[mx.array, Cache], mx.array]


def attention(
    config: Attention | LatentAttention, model: ModelConfig, params: Parameters
) -> Attend:
    """``(x (B, T, hidden) or of single tokens (B, hidden), cache) -> the same shape``."""
    if isinstance(config, LatentAttention):
        return _latent(config, model, params)
    heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
    project = _projections(config, model.hidden_size, params)
    out = params.linear(config.out, model.hidden_size, heads * dim)
    queries = _heads(config, model, params, config.norms[0], heads)
    keys = _heads(config, model, params, config.norms[1], kv_heads)
    scale, sharpen = _sharpening(config)
    sinks = params.vector("sinks", heads) if config.sinks else None
    dot = product(scale, config.softcap, sinks)
    if config.alibi is not None:
        dot = falling(scale, heads, config.alibi)

    def attend(x: mx.array, cache: Cache) -> mx.array:
        q, k, v = project(x)
        position = cache.position
        q = sharpen(queries(q, position), position)
        return out(_side_by_side(cache.attend(q, keys(k, position), _by_head(v, kv_heads), dot)))

    return attend


def _projections(
    config: Attention, hidden: int, params: Parameters
) -> Callable[[mx.array], list[mx.array]]:
    """``x -> queries (B, T, H D), keys and values (B, T, K D)``."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if config.fused:
        all_three = params.linear("qkv_proj", queries + 2 * keys, hidden)
        return lambda x: list(mx.split(all_three(x), [queries, queries + keys], axis=-1))
    parts, clip = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)], clipped(config.clip)
    project = params.linears(parts, hidden)
    return project if clip is None else lambda x: [clip(part) for part in project(x)]


def _heads(
    config: Attention, model: ModelConfig, params: Parameters, name: str, heads: int
) -> Callable[[mx.array, Position], mx.array]:
    """``(x (B, T, H D), position) -> (B, H, T, D)``, normalised by the named norm and rotated."""
    kind, rotate = config.qk_norm, rotation(config.rope)
    width = heads * config.head_dim if kind == "whole" else config.head_dim
    own = heads if kind == "each" else 0
    normed = norm(model.norm, params, name, width, own) if kind else (lambda x: x)
    if kind == "whole":
        return lambda x, position: rotate(_by_head(normed(x), heads), position)
    if kind == "turned":
        return lambda x, position: normed(rotate(_by_head(x, heads), position))
    return lambda x, position: rotate(normed(_by_head(x, heads)), position)


def _by_head(x: mx.array, heads: int) -> mx.array:
    """(B, T, H D) -> (B, H, T, D), or (B, H D) -> (B, H, 1, D)."""
    if x.ndim == 2:
        return x.reshape(x.shape[0], heads, 1, -1)
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _side_by_side(x: mx.array) -> mx.array:
    """(B, H, T, D) -> (B, T, H D), or (B, H, 1, D) -> (B, H D)."""
    b, _, t, _ = x.shape
    return x.reshape(b, -1) if t == 1 else x.swapaxes(1, 2).reshape(b, t, -1)


def _sharpening(config: Attention) -> tuple[float, Callable[[mx.array, Position], mx.array]]:
    """The scale of scores, and what queries (B, H, T, D) at a position go through before."""
    rope, scale = config.rope, config.scale
    # To multiply rotated queries and keys alike is to multiply their products twice.
    twice = rope.sharpening**2 if rope else 1.0
    if config.temperature is not None:
        assert rope is None or rope.dims == config.head_dim
        return scale * twice, _by_position(config.temperature)
    if rope is None or rope.dims == config.head_dim or twice == 1.0:
        return scale * twice, lambda q, position: q
    factors = mx.array([twice] * rope.dims + [1.0] * (config.head_dim - rope.dims))
    return scale, lambda q, position: q * factors.astype(q.dtype)


def _by_position(config: Temperature) -> Callable[[mx.array, Position], mx.array]:
    scale, length = config.scale, config.length

    def sharpen(q: mx.array, position: Position) -> mx.array:
        positions = following(position, q.shape[2])  # (T,) or (B, T)
        factors = 1 + scale * mx.log(1 + (positions // length).astype(mx.float32))
        return q * mx.expand_dims(factors.astype(q.dtype), (-3, -1))

    return sharpen


def _latent(config: LatentAttention, model: ModelConfig, params: Parameters) -> Attend:
    """Attention in the latent space: a head's key matrix is applied to its query instead of to
    every key, its value matrix to the mixture instead of to every value."""
    heads, width, turning = config.heads, config.head_dim, config.rope.dims
    query = _latent_queries(config, model, params)
    compress = params.linear("kv_a_proj_with_mqa", config.latent + turning, model.hidden_size)
    latent_norm = norm(model.norm, params, "kv_a_layernorm", config.latent)
    into_latent = params.stacked("embed_q", heads, config.latent, width)
    out_of_latent = params.stacked("unembed_out", heads, config.value_dim, config.latent)
    out = params.linear("o_proj", model.hidden_size, heads * config.value_dim)
    rotate, scale = rotation(config.rope), config.scale
    turned_scale = scale * config.rope.sharpening**2
    dot = latent(scale, turning)

    def attend(x: mx.array, cache: Cache) -> mx.array:
        q, q_turned = mx.split(_by_head(query(x), heads), [width], axis=-1)  # (B, H, T, ...)
        squeezed, key = mx.split(compress(x), [config.latent], axis=-1)
        position = cache.position
        turned = rotate(q_turned, position) * turned_scale
        mixed = cache.attend(
            mx.concatenate([turned, into_latent(q)], axis=-1),
            rotate(_by_head(key, 1), position),  # (B, 1, T, turning)
            _by_head(latent_norm(squeezed), 1),  # (B, 1, T, latent)
            dot,
        )
        return out(_side_by_side(out_of_latent(mixed)))

    return attend


def _latent_queries(config: LatentAttention, model: ModelConfig, params: Parameters) -> Function:
    rows = config.heads * (config.head_dim + config.rope.dims)
    if config.query_latent is None:
        return params.linear("q_proj", rows, model.hidden_size)
    return compose(
        params.linear("q_a_proj", config.query_latent, model.hidden_size),
        norm(model.norm, params, "q_a_layernorm", config.query_latent),
        params.linear("q_b_proj", rows, config.query_latent),
    )
