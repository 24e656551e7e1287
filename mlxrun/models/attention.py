"""Attention of one layer, as a function of the stream and of the layer's cache."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlxrun.cache.base import Cache, Mask
from mlxrun.models.config import Attention, LatentAttention, ModelConfig, Temperature
from mlxrun.models.functions import Function, clipped, compose, norm
from mlxrun.models.rope import rotation
from mlxrun.weights.parameters import Parameters

Attend = Callable[[mx.array, Cache], mx.array]
Product = Callable[[mx.array, mx.array, mx.array, Mask], mx.array]


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
    product = _product(scale, config.softcap, sinks)
    if config.alibi is not None:
        product = _falling(scale, heads, config.alibi)

    def attend(x: mx.array, cache: Cache) -> mx.array:
        b, t, _ = x.shape
        q, k, v = project(x)
        v = v.reshape(b, t, kv_heads, dim).transpose(0, 2, 1, 3)  # (B, H, T, D)
        offset = cache.offset
        q = sharpen(queries(q, offset), offset)
        attended = product(q, *cache.update(keys(k, offset), v))
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
    clip = clipped(config.clip)
    q = compose(params.linear("q_proj", queries, hidden), clip)
    k = compose(params.linear("k_proj", keys, hidden), clip)
    v = compose(params.linear("v_proj", keys, hidden), clip)
    return lambda x: [q(x), k(x), v(x)]


def _heads(
    config: Attention, model: ModelConfig, params: Parameters, name: str, heads: int
) -> Callable[[mx.array, int], mx.array]:
    """``(x (B, T, H D), offset) -> (B, H, T, D)``, normalised by the named norm and rotated."""
    dim, kind, rotate = config.head_dim, config.qk_norm, rotation(config.rope)
    width = heads * dim if kind == "whole" else dim
    normed = norm(model.norm, params, name, width) if kind else (lambda x: x)

    def split(x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], heads, dim)

    if kind == "whole":
        return lambda x, offset: rotate(split(normed(x)).transpose(0, 2, 1, 3), offset)
    if kind == "turned":
        return lambda x, offset: normed(rotate(split(x).transpose(0, 2, 1, 3), offset))
    return lambda x, offset: rotate(normed(split(x)).transpose(0, 2, 1, 3), offset)


def _sharpening(config: Attention) -> tuple[float, Callable[[mx.array, int], mx.array]]:
    """The scale of scores, and what queries (B, H, T, D) at an offset go through before."""
    rope, scale = config.rope, config.scale
    # To multiply rotated queries and keys alike is to multiply their products twice.
    twice = rope.sharpening**2 if rope else 1.0
    if config.temperature is not None:
        assert rope is None or rope.dims == config.head_dim
        return scale * twice, _by_position(config.temperature)
    if rope is None or rope.dims == config.head_dim or twice == 1.0:
        return scale * twice, lambda q, offset: q
    factors = mx.array([twice] * rope.dims + [1.0] * (config.head_dim - rope.dims))
    return scale, lambda q, offset: q * factors.astype(q.dtype)


def _by_position(config: Temperature) -> Callable[[mx.array, int], mx.array]:
    scale, length = config.scale, config.length

    def sharpen(q: mx.array, offset: int) -> mx.array:
        positions = mx.arange(offset, offset + q.shape[2])
        factors = 1 + scale * mx.log(1 + (positions // length).astype(mx.float32))
        return q * factors.astype(q.dtype)[:, None]

    return sharpen


def _product(scale: float, softcap: float | None, sinks: mx.array | None) -> Product:
    """``(queries, keys, values, mask) -> (B, H, T, D)``."""
    if softcap is None:
        return lambda q, k, v, mask: mx.fast.scaled_dot_product_attention(
            q, k, v, scale=scale, mask=mask, sinks=sinks
        )
    return lambda q, k, v, mask: _capped_attention(q * scale, k, v, mask, softcap)


def _falling(scale: float, heads: int, alibi: float) -> Product:
    """As :func:`_product`, with scores that fall with distance, in each head by its own slope."""
    whole = 1 << (heads.bit_length() - 1)  # the largest power of two among the heads
    steps = [i + 1 for i in range(whole)] + [i + 0.5 for i in range(heads - whole)]
    slopes = mx.array([2 ** (-alibi * step / whole) for step in steps])[:, None, None]

    def product(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        last = k.shape[2] - 1  # softmax does not care from where distances are counted
        biases = slopes * mx.arange(-last, 1)  # (H, 1, S)
        if mask is not None:
            biases = mx.where(_booleans(mask, q.shape[2], last + 1), biases, -mx.inf)
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=scale, mask=biases.astype(q.dtype)
        )

    return product


def _capped_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: Mask, softcap: float
) -> mx.array:
    """Attention whose scores are bounded by tanh before the softmax (Gemma 2)."""
    b, heads, t, dim = q.shape
    grouped = q.reshape(b, k.shape[1], -1, t, dim)  # (B, K, H/K, T, D)
    scores = grouped @ k[:, :, None].swapaxes(-1, -2)  # (B, K, H/K, T, S)
    scores = mx.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = mx.where(_booleans(mask, t, k.shape[2]), scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ v[:, :, None]).reshape(b, heads, t, dim)


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

    def attend(x: mx.array, cache: Cache) -> mx.array:
        b, t, _ = x.shape
        q = query(x).reshape(b, t, heads, width + turning).transpose(0, 2, 1, 3)  # (B, H, T, D)
        q, q_turned = mx.split(q, [width], axis=-1)
        latent, key = mx.split(compress(x), [config.latent], axis=-1)
        offset = cache.offset
        latents, keys, mask = cache.update(
            latent_norm(latent)[:, None], rotate(key[:, None], offset)
        )  # (B, 1, S, latent), (B, 1, S, turning)
        scores = (rotate(q_turned, offset) * turned_scale) @ keys.swapaxes(-1, -2)  # (B, H, T, S)
        if mask is not None:
            scores = mx.where(_booleans(mask, t, keys.shape[2]), scores, -mx.inf)
        mixed = mx.fast.scaled_dot_product_attention(
            into_latent(q), latents, latents, scale=scale, mask=scores
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


def _booleans(mask: mx.array | str, queries: int, keys: int) -> mx.array:
    """A cache's mask as booleans (T, S)."""
    if isinstance(mask, str):
        positions = mx.arange(keys)
        return positions[-queries:, None] >= positions
    return mask
