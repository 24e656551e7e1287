"""How queries meet the keys and values of a cache: plain, bounded, falling with distance.

Everything here is a :class:`~mlxrun.cache.base.Product`, chosen once per layer; caches call it with
what a query sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxrun.cache.base import Mask, Product
from mlxrun.cache.formats import Mixed, Shown, seen
from mlxrun.kernels.cpu_ops import plain_attention_is_faster, softmax

if TYPE_CHECKING:
    from mlxrun.kernels.native import Kernels


def product(
    scale: float,
    softcap: float | None,
    sinks: mx.array | None,
    kernels: Kernels | None = None,
) -> Product:
    """Softmax of scaled products, bounded by tanh where there is a ``softcap`` (Gemma 2), with a
    score per head for attending to nothing where there are ``sinks`` (H,)."""
    kernel = None if kernels is None else kernels.attention(scale, softcap, sinks)
    return Scaled(scale, softcap, sinks, kernel=kernel)


def falling(scale: float, heads: int, alibi: float, kernels: Kernels | None = None) -> Product:
    """As :func:`product`, with scores that fall with distance, in each head by its own slope."""
    whole = 1 << (heads.bit_length() - 1)  # the largest power of two among the heads
    steps = [i + 1 for i in range(whole)] + [i + 0.5 for i in range(heads - whole)]
    slopes = mx.array([2 ** (-alibi * step / whole) for step in steps])
    kernel = None if kernels is None else kernels.attention(scale, slopes=slopes)
    return Scaled(scale, slopes=slopes, kernel=kernel)


def latent(scale: float, turning: int) -> Product:
    """Attention whose values are latents and also the better part of the keys (DeepSeek-V2).

    The first ``turning`` numbers of a query meet the keys, already scaled; the rest the values.
    """
    return Latent(scale, turning)


@dataclass(frozen=True)
class Scaled(Product):
    """See :func:`product` and :func:`falling`."""

    scale: float
    softcap: float | None = None
    sinks: mx.array | None = None
    slopes: mx.array | None = None
    kernel: Callable[[mx.array, mx.array, mx.array, Mask], mx.array] | None = None

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        if self.kernel is not None and q.dtype == k.dtype == v.dtype == mx.float32:
            return self.kernel(q, k, v, mask)
        if self.softcap is not None or plain_attention_is_faster(q, k.shape[2]):
            return self.stored(q, seen(k), seen(v), mask)
        if self.slopes is not None:
            biases = self._fall(k.shape[2])
            if mask is not None:
                biases = mx.where(booleans(mask, q.shape[2], k.shape[2]), biases, -mx.inf)
            mask = biases.astype(q.dtype)
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=self.scale, mask=mask, sinks=self.sinks
        )

    def stored(self, q: mx.array, keys: Shown, values: Mixed, mask: Mask) -> mx.array:
        b, heads, t, dim = q.shape
        grouped = (q * self.scale).reshape(b, keys.heads, -1, dim)  # (B, K, H/K T, D)
        scores = keys.dot(grouped)
        if t == 1 and self.sinks is None and self.slopes is None:
            # Heads are alike, and one token sees all that is not masked.
            weights = self._weights(scores, None if isinstance(mask, str) else mask)
        else:
            weights = self._weights(scores.reshape(b, heads, t, -1), mask)
        return values.mix(weights.reshape(*grouped.shape[:3], -1)).reshape(b, heads, t, -1)

    def _weights(self, scores: mx.array, mask: Mask) -> mx.array:
        """What each token counts, from scores (B, H, T, S), or (B, K, H/K, S) of single tokens."""
        if self.softcap is not None:
            scores = mx.tanh(scores / self.softcap) * self.softcap
        if self.slopes is not None:
            scores = scores + self._fall(scores.shape[3]).astype(scores.dtype)
        scores = _masked(scores, mask)
        if self.sinks is None:
            return softmax(scores)
        sinks = self.sinks.astype(scores.dtype)[:, None, None]
        column = mx.broadcast_to(sinks, (*scores.shape[:3], 1))
        return softmax(mx.concatenate([scores, column], axis=-1))[..., :-1]

    def _fall(self, keys: int) -> mx.array:
        """(H, 1, S); softmax does not care from where distances are counted."""
        assert self.slopes is not None
        return self.slopes[:, None, None] * mx.arange(1 - keys, 1)


@dataclass(frozen=True)
class Latent(Product):
    """See :func:`latent`."""

    scale: float
    turning: int

    latent = True

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        turned, still = mx.split(q, [self.turning], axis=-1)
        scores = _masked(turned @ k.swapaxes(-1, -2), mask)  # (B, H, T, S)
        return mx.fast.scaled_dot_product_attention(still, v, v, scale=self.scale, mask=scores)

    def stored(self, q: mx.array, keys: Shown, values: Mixed, mask: Mask) -> mx.array:
        b, heads, t, dim = q.shape
        turned, still = mx.split(q.reshape(b, 1, heads * t, dim), [self.turning], axis=-1)
        scores = keys.dot(turned) + values.dot(still * self.scale)
        scores = _masked(scores.reshape(b, heads, t, -1), mask)
        weights = softmax(scores)
        mixed = values.mix(weights.reshape(b, 1, heads * t, -1))
        return mixed.reshape(b, heads, t, -1)

    def ranking(self, q: mx.array) -> mx.array:
        turned, still = mx.split(q, [self.turning], axis=-1)
        return mx.concatenate([turned, still * self.scale], axis=-1)


def _masked(scores: mx.array, mask: Mask) -> mx.array:
    """Scores (B, H, T, S), minus infinity where a query does not see a key."""
    if mask is None:
        return scores
    return mx.where(booleans(mask, *scores.shape[2:]), scores, -mx.inf)


def booleans(mask: mx.array | str, queries: int, keys: int) -> mx.array:
    """A cache's mask as booleans, (T, S) or (B, 1, 1, S)."""
    if isinstance(mask, str):
        positions = mx.arange(keys)
        return positions[-queries:, None] >= positions
    return mask
