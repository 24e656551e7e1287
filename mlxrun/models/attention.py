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
    """``(x (B, T, hidden), cache) -> (B, T, hidden)``."""
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
        b, t, _ = x.shape
        q, k, v = project(x)
        v = v.reshape(b, t, kv_heads, dim).transpose(0, 2, 1, 3)  # (B, H, T, D)
        position = cache.position
        q = sharpen(queries(q, position), position)
        attended = cache.attend(q, keys(k, position), v, dot)
        return out(attended.transpose(0, 2, 1, 3).reshape(b, t, heads * dim))

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
    dim, kind, rotate = config.head_dim, config.qk_norm, rotation(config.rope)
    width = heads * dim if kind == "whole" else dim
    own = heads if kind == "each" else 0
    normed = norm(model.norm, params, name, width, own) if kind else (lambda x: x)

    def split(x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], heads, dim)

    if kind == "whole":
        return lambda x, position: rotate(split(normed(x)).transpose(0, 2, 1, 3), position)
    if kind == "turned":
        return lambda x, position: normed(rotate(split(x).transpose(0, 2, 1, 3), position))
    return lambda x, position: rotate(normed(split(x)).transpose(0, 2, 1, 3), position)


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
        b, t, _ = x.shape
        q = query(x).reshape(b, t, heads, width + turning).transpose(0, 2, 1, 3)  # (B, H, T, D)
        q, q_turned = mx.split(q, [width], axis=-1)
        squeezed, key = mx.split(compress(x), [config.latent], axis=-1)
        position = cache.position
        turned = rotate(q_turned, position) * turned_scale
        mixed = cache.attend(
            mx.concatenate([turned, into_latent(q)], axis=-1),
            rotate(key[:, None], position),  # (B, 1, T, turning)
            latent_norm(squeezed)[:, None],  # (B, 1, T, latent)
            dot,
        )
        return out(out_of_latent(mixed).transpose(0, 2, 1, 3).reshape(b, t, -1))

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
