"""How queries meet the keys and values of a cache: plain, bounded, falling with distance.

Everything here is a :data:`~mlxrun.cache.base.Product`, chosen once per layer; caches call it with
what a query sees.
"""

from __future__ import annotations

import mlx.core as mx

from mlxrun.cache.base import Mask, Product


def product(scale: float, softcap: float | None, sinks: mx.array | None) -> Product:
    """``(queries, keys, values, mask) -> (B, H, T, D)``."""
    if softcap is None:
        return lambda q, k, v, mask: mx.fast.scaled_dot_product_attention(
            q, k, v, scale=scale, mask=mask, sinks=sinks
        )
    return lambda q, k, v, mask: _capped_attention(q * scale, k, v, mask, softcap)


def falling(scale: float, heads: int, alibi: float) -> Product:
    """As :func:`product`, with scores that fall with distance, in each head by its own slope."""
    whole = 1 << (heads.bit_length() - 1)  # the largest power of two among the heads
    steps = [i + 1 for i in range(whole)] + [i + 0.5 for i in range(heads - whole)]
    slopes = mx.array([2 ** (-alibi * step / whole) for step in steps])[:, None, None]

    def fallen(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        last = k.shape[2] - 1  # softmax does not care from where distances are counted
        biases = slopes * mx.arange(-last, 1)  # (H, 1, S)
        if mask is not None:
            biases = mx.where(booleans(mask, q.shape[2], last + 1), biases, -mx.inf)
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=scale, mask=biases.astype(q.dtype)
        )

    return fallen


def _capped_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: Mask, softcap: float
) -> mx.array:
    """Attention whose scores are bounded by tanh before the softmax (Gemma 2)."""
    b, heads, t, dim = q.shape
    grouped = q.reshape(b, k.shape[1], -1, t, dim)  # (B, K, H/K, T, D)
    scores = grouped @ k[:, :, None].swapaxes(-1, -2)  # (B, K, H/K, T, S)
    scores = mx.tanh(scores / softcap) * softcap
    if mask is not None:
        seen = booleans(mask, t, k.shape[2])
        scores = mx.where(seen[:, :, None] if seen.ndim == 4 else seen, scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ v[:, :, None]).reshape(b, heads, t, dim)


def booleans(mask: mx.array | str, queries: int, keys: int) -> mx.array:
    """A cache's mask as booleans, (T, S) or (B, 1, 1, S)."""
    if isinstance(mask, str):
        positions = mx.arange(keys)
        return positions[-queries:, None] >= positions
    return mask


def latent(scale: float, turning: int) -> Product:
    """Attention whose values are latents and also the better part of the keys (DeepSeek-V2).

    The first ``turning`` numbers of a query meet the keys, already scaled; the rest the values.
    """

    def dot(q: mx.array, keys: mx.array, latents: mx.array, mask: Mask) -> mx.array:
        turned, still = mx.split(q, [turning], axis=-1)
        scores = turned @ keys.swapaxes(-1, -2)  # (B, H, T, S)
        if mask is not None:
            scores = mx.where(booleans(mask, q.shape[2], keys.shape[2]), scores, -mx.inf)
        return mx.fast.scaled_dot_product_attention(
            still, latents, latents, scale=scale, mask=scores
        )

    return dot
