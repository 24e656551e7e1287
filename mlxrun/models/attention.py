"""Attention of one layer, as a function of the stream and of the layer's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxrun.kernels.interface import HeadsSpec
from mlxrun.kv_cache.attention import LatentOp, alibi, scaled
from mlxrun.kv_cache.base import Position, StepCache, following
from mlxrun.models.config import Attention, LatentAttention, ModelConfig, Temperature
from mlxrun.models.functions import Function, clipped, norm
from mlxrun.models.rope import Rotation, frequencies, rotation
from mlxrun.weights.fused import Added, RMSNorm
from mlxrun.weights.parameters import Parameters

# (x, cache, residual) -> residual + attention of x
Attend = Callable[[mx.array, StepCache, mx.array], mx.array]
AddResidual = Callable[[Added], Added]
RotateHeads = Callable[[list[mx.array], Position], list[mx.array]]


def attention(
    config: Attention | LatentAttention,
    model: ModelConfig,
    params: Parameters,
    input_norm: Function | None,
    add_residual: AddResidual,
) -> Attend:
    """Attention of one layer over ``x`` (B, T, hidden), or (B, hidden) of single tokens.

    Args:
        input_norm: the norm of ``x``.
        add_residual: makes the output projection add to the residual.
    """
    if isinstance(config, LatentAttention):
        return _latent(config, model, params, input_norm, add_residual)
    heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
    project = _projections(config, model.hidden_size, params, input_norm)
    out = add_residual(params.linear(config.out, model.hidden_size, heads * dim))
    rotate = _head_rotation(config, model, params)
    scale, scale_queries = _query_scale(config)
    sinks = params.vector("sinks", heads) if config.sinks else None
    if config.alibi is None:
        op = scaled(scale, config.softcap, sinks, kernels=params.kernels)
    else:
        op = alibi(scale, heads, config.alibi, kernels=params.kernels)

    def attend(x: mx.array, cache: StepCache, residual: mx.array) -> mx.array:
        q, k, v = project(x)
        position = cache.position
        q, k = rotate([q, k], position)
        mixed = cache.attend(scale_queries(q, position), k, _split_heads(v, kv_heads), op)
        return out(_merge_heads(mixed), residual)

    return attend


def _projections(
    config: Attention, hidden: int, params: Parameters, input_norm: Function | None
) -> Callable[[mx.array], list[mx.array]]:
    """``x -> queries (B, T, H D), keys and values (B, T, K D)``."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if config.fused:
        all_three = params.linear("qkv_proj", queries + 2 * keys, hidden, norm=input_norm)
        return lambda x: list(mx.split(all_three(x), [queries, queries + keys], axis=-1))
    parts, clip = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)], clipped(config.clip)
    project = params.linears(parts, hidden, norm=input_norm)
    return project if clip is None else lambda x: [clip(part) for part in project(x)]


def _head_rotation(config: Attention, model: ModelConfig, params: Parameters) -> RotateHeads:
    """``([queries (B, T, H D), keys (B, T, K D)], position) -> [(B, H, T, D), (B, K, T, D)]``.

    With the layer's norms of queries and keys, and RoPE.
    """
    kind, rotate = config.qk_norm, rotation(config.rope)
    counts = (config.heads, config.kv_heads)
    norms: list[Function] = []
    for name, heads in zip(config.norms, counts, strict=True) if kind else ():
        width = heads * config.head_dim if kind == "whole" else config.head_dim
        norms.append(norm(model.norm, params, name, width, heads if kind == "each" else 0))
    if fused := _fused_rotation(config, params, norms):
        return fused
    of_queries, of_keys = (
        _heads(kind, rotate, normed, heads)
        for normed, heads in zip(norms or (None, None), counts, strict=True)
    )
    return lambda parts, position: [of_queries(parts[0], position), of_keys(parts[1], position)]


def _fused_rotation(
    config: Attention, params: Parameters, norms: Sequence[Function]
) -> RotateHeads | None:
    """The same, fused; None where the kernels cannot fuse it."""
    kind, rope, kernels = config.qk_norm, config.rope, params.kernels
    if kernels is None or not all(isinstance(each, RMSNorm) for each in norms):
        return None
    by_head = [each for each in norms if isinstance(each, RMSNorm) and kind != "whole"]
    rotated = None if rope is None else frequencies(rope)
    rotate = kernels.heads(
        [
            HeadsSpec(
                heads,
                config.head_dim,
                norm_at=None if own is None else "after" if kind == "after_rope" else "before",
                norm=None if own is None else own.weight,
                eps=0.0 if own is None else own.eps,
                frequencies=rotated,
                scale=1.0 if rope is None else rope.scale,
                traditional=rope is not None and rope.traditional,
            )
            for heads, own in zip(
                (config.heads, config.kv_heads), by_head or (None, None), strict=True
            )
        ]
    )
    if kind != "whole":
        return rotate
    return lambda parts, position: rotate(
        [normed(part) for normed, part in zip(norms, parts, strict=True)], position
    )


def _heads(
    kind: str | None, rotate: Rotation, normed: Function | None, heads: int
) -> Callable[[mx.array, Position], mx.array]:
    """``(x (B, T, H D), position) -> (B, H, T, D)``."""
    if normed is None:
        return lambda x, position: rotate(_split_heads(x, heads), position)
    if kind == "whole":
        return lambda x, position: rotate(_split_heads(normed(x), heads), position)
    if kind == "after_rope":
        return lambda x, position: normed(rotate(_split_heads(x, heads), position))
    return lambda x, position: rotate(normed(_split_heads(x, heads)), position)


def _split_heads(x: mx.array, heads: int) -> mx.array:
    """(B, T, H D) -> (B, H, T, D), or (B, H D) -> (B, H, 1, D)."""
    if x.ndim == 2:
        return x.reshape(x.shape[0], heads, 1, -1)
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _merge_heads(x: mx.array) -> mx.array:
    """(B, H, T, D) -> (B, T, H D), or (B, H, 1, D) -> (B, H D)."""
    b, _, t, _ = x.shape
    return x.reshape(b, -1) if t == 1 else x.swapaxes(1, 2).reshape(b, t, -1)


def _query_scale(config: Attention) -> tuple[float, Callable[[mx.array, Position], mx.array]]:
    """The scale of scores, and a function that scales queries (B, H, T, D) by their position."""
    rope, scale = config.rope, config.scale
    # The factor multiplies rotated queries and keys, so scores twice.
    squared = rope.attention_factor**2 if rope else 1.0
    if config.temperature is not None:
        assert rope is None or rope.dims == config.head_dim
        return scale * squared, _by_position(config.temperature)
    if rope is None or rope.dims == config.head_dim or squared == 1.0:
        return scale * squared, lambda q, position: q
    factors = mx.array([squared] * rope.dims + [1.0] * (config.head_dim - rope.dims))
    return scale, lambda q, position: q * factors.astype(q.dtype)


def _by_position(config: Temperature) -> Callable[[mx.array, Position], mx.array]:
    scale, length = config.scale, config.length

    def scale_queries(q: mx.array, position: Position) -> mx.array:
        positions = following(position, q.shape[2])  # (T,) or (B, T)
        factors = 1 + scale * mx.log(1 + (positions // length).astype(mx.float32))
        return q * mx.expand_dims(factors.astype(q.dtype), (-3, -1))

    return scale_queries


def _latent(
    config: LatentAttention,
    model: ModelConfig,
    params: Parameters,
    input_norm: Function | None,
    add_residual: AddResidual,
) -> Attend:
    """Multi-head latent attention with its projections absorbed (DeepSeek-V2, arXiv:2405.04434).

    A head's key matrix is applied to its query instead of to every key, its value matrix to the
    mixture instead of to every value.
    """
    heads, width, rope_dim = config.heads, config.qk_nope_head_dim, config.rope.dims
    project = _latent_projections(config, model, params, input_norm)
    latent_norm = norm(model.norm, params, "kv_a_layernorm", config.kv_lora_rank)
    into_latent = params.weight("embed_q", config.kv_lora_rank, width, (heads,)).product()
    out_of_latent = params.weight(
        "unembed_out", config.v_head_dim, config.kv_lora_rank, (heads,)
    ).product()
    out = add_residual(params.linear("o_proj", model.hidden_size, heads * config.v_head_dim))
    rotate, scale = rotation(config.rope), config.scale
    rope_scale = scale * config.rope.attention_factor**2
    op = LatentOp(scale, rope_dim)

    def attend(x: mx.array, cache: StepCache, residual: mx.array) -> mx.array:
        query, compressed = project(x)
        q, q_rope = mx.split(_split_heads(query, heads), [width], axis=-1)  # (B, H, T, ...)
        latent, key = mx.split(compressed, [config.kv_lora_rank], axis=-1)
        position = cache.position
        rotated = rotate(q_rope, position) * rope_scale
        mixed = cache.attend(
            mx.concatenate([rotated, into_latent(q)], axis=-1),
            rotate(_split_heads(key, 1), position),  # (B, 1, T, rope_dim)
            _split_heads(latent_norm(latent), 1),  # (B, 1, T, latent)
            op,
        )
        return out(_merge_heads(out_of_latent(mixed)), residual)

    return attend


def _latent_projections(
    config: LatentAttention, model: ModelConfig, params: Parameters, input_norm: Function | None
) -> Callable[[mx.array], list[mx.array]]:
    """``x`` to queries (B, T, H D) and to compressed keys and values (B, T, latent + D')."""
    hidden, rows = model.hidden_size, config.heads * (config.qk_nope_head_dim + config.rope.dims)
    rank = config.q_lora_rank
    first = ("q_proj", rows) if rank is None else ("q_a_proj", rank)
    parts = [first, ("kv_a_proj_with_mqa", config.kv_lora_rank + config.rope.dims)]
    project = params.linears(parts, hidden, norm=input_norm)
    if rank is None:
        return project
    normed = norm(model.norm, params, "q_a_layernorm", rank)
    expand = params.linear("q_b_proj", rows, rank, norm=normed)

    def both(x: mx.array) -> list[mx.array]:
        query, compressed = project(x)
        return [expand(query), compressed]

    return both
