"""Attention over keys and values: scaled, soft-capped, with sinks, ALiBi or latent.

An :class:`AttentionOp` is chosen once per layer; a cache calls it with the keys and values that its
queries attend to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxrun.kernels.cpu_ops import plain_attention_is_faster, softmax
from mlxrun.kv_cache.formats import KeyView, StoredKV, ValueView, as_stored, reads_packed

if TYPE_CHECKING:
    from mlxrun.kernels.native import Kernels

# None: every query attends to every key; "causal": aligned at the lower right; or booleans that
# broadcast to (R, heads, T, S).
Mask = mx.array | str | None


class AttentionOp(ABC):
    """Attention of one layer.

    Attributes:
        latent: values are keys as well: the first channels of a query are scored against keys, the
            others against values.
    """

    latent = False

    @abstractmethod
    def __call__(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        """Queries (R, heads, T, D), keys and values (R, H, S, D) to (R, heads, T, D)."""

    @abstractmethod
    def attend_quantized(
        self, q: mx.array, keys: KeyView, values: ValueView, mask: Mask
    ) -> mx.array:
        """The same over keys and values as they are stored, without unpacking them."""

    def ranking(self, q: mx.array) -> mx.array:
        """Queries whose plain products with keys (and values, if latent) rank them as scores do."""
        return q


def attend(
    op: AttentionOp, queries: mx.array, keys: StoredKV, values: StoredKV, mask: Mask
) -> mx.array:
    """Attention over stored keys and values, packed or unpacked, whichever is faster."""
    if reads_packed(keys, values, queries):
        return op.attend_quantized(queries, keys, values, mask)
    return op(queries, keys.unpacked(), values.unpacked(), mask)


def scaled(
    scale: float,
    softcap: float | None,
    sinks: mx.array | None,
    kernels: Kernels | None = None,
) -> AttentionOp:
    """Softmax of scaled products.

    Args:
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks: a score per head for attending to nothing, (H,).
    """
    kernel = None if kernels is None else kernels.attention(scale, softcap, sinks)
    return ScaledOp(scale, softcap, sinks, kernel=kernel)


def alibi(scale: float, heads: int, max_bias: float, kernels: Kernels | None = None) -> AttentionOp:
    """Scaled products less a distance times the head's slope (Press et al., 2022)."""
    whole = 1 << (heads.bit_length() - 1)  # the largest power of two among the heads
    steps = [i + 1 for i in range(whole)] + [i + 0.5 for i in range(heads - whole)]
    slopes = mx.array([2 ** (-max_bias * step / whole) for step in steps])
    kernel = None if kernels is None else kernels.attention(scale, slopes=slopes)
    return ScaledOp(scale, slopes=slopes, kernel=kernel)


@dataclass(frozen=True)
class ScaledOp(AttentionOp):
    """See :func:`scaled` and :func:`alibi`."""

    scale: float
    softcap: float | None = None
    sinks: mx.array | None = None
    slopes: mx.array | None = None
    kernel: Callable[[mx.array, mx.array, mx.array, Mask], mx.array] | None = None

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        if self.kernel is not None and q.dtype == k.dtype == v.dtype == mx.float32:
            return self.kernel(q, k, v, mask)
        if self.softcap is not None or plain_attention_is_faster(q, k.shape[2]):
            return self.attend_quantized(q, as_stored(k), as_stored(v), mask)
        if self.slopes is not None:
            biases = self._alibi(k.shape[2])
            if mask is not None:
                biases = mx.where(_booleans(mask, q.shape[2], k.shape[2]), biases, -mx.inf)
            mask = biases.astype(q.dtype)
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=self.scale, mask=mask, sinks=self.sinks
        )

    def attend_quantized(
        self, q: mx.array, keys: KeyView, values: ValueView, mask: Mask
    ) -> mx.array:
        b, heads, t, dim = q.shape
        grouped = (q * self.scale).reshape(b, keys.heads, -1, dim)  # (R, H, heads/H T, D)
        scores = keys.dot(grouped)
        if t == 1 and self.sinks is None and self.slopes is None:
            # All heads use the same mask, and a single token is causal by itself.
            weights = self._weights(scores, None if isinstance(mask, str) else mask)
        else:
            weights = self._weights(scores.reshape(b, heads, t, -1), mask)
        return values.mix(weights.reshape(*grouped.shape[:3], -1)).reshape(b, heads, t, -1)

    def _weights(self, scores: mx.array, mask: Mask) -> mx.array:
        """Softmax of scores (R, heads, T, S), or (R, H, heads/H, S) of single tokens."""
        if self.softcap is not None:
            scores = mx.tanh(scores / self.softcap) * self.softcap
        if self.slopes is not None:
            scores = scores + self._alibi(scores.shape[3]).astype(scores.dtype)
        scores = _masked(scores, mask)
        if self.sinks is None:
            return softmax(scores)
        sinks = self.sinks.astype(scores.dtype)[:, None, None]
        column = mx.broadcast_to(sinks, (*scores.shape[:3], 1))
        return softmax(mx.concatenate([scores, column], axis=-1))[..., :-1]

    def _alibi(self, keys: int) -> mx.array:
        """(heads, 1, S); softmax does not depend on where distances are counted from."""
        assert self.slopes is not None
        return self.slopes[:, None, None] * mx.arange(1 - keys, 1)


@dataclass(frozen=True)
class LatentOp(AttentionOp):
    """Attention whose values are latents and also most of the keys (DeepSeek-V2).

    The first ``rope_dims`` channels of a query are scored against the keys, already scaled; the
    rest against the values.
    """

    scale: float
    rope_dims: int

    latent = True

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        rotated, latent = mx.split(q, [self.rope_dims], axis=-1)
        scores = _masked(rotated @ k.swapaxes(-1, -2), mask)  # (R, heads, T, S)
        return mx.fast.scaled_dot_product_attention(latent, v, v, scale=self.scale, mask=scores)

    def attend_quantized(
        self, q: mx.array, keys: KeyView, values: ValueView, mask: Mask
    ) -> mx.array:
        b, heads, t, dim = q.shape
        rotated, latent = mx.split(q.reshape(b, 1, heads * t, dim), [self.rope_dims], axis=-1)
        scores = keys.dot(rotated) + values.dot(latent * self.scale)
        weights = softmax(_masked(scores.reshape(b, heads, t, -1), mask))
        return values.mix(weights.reshape(b, 1, heads * t, -1)).reshape(b, heads, t, -1)

    def ranking(self, q: mx.array) -> mx.array:
        rotated, latent = mx.split(q, [self.rope_dims], axis=-1)
        return mx.concatenate([rotated, latent * self.scale], axis=-1)


def _masked(scores: mx.array, mask: Mask) -> mx.array:
    """Scores (R, heads, T, S), minus infinity where the mask is false."""
    if mask is None:
        return scores
    return mx.where(_booleans(mask, *scores.shape[2:]), scores, -mx.inf)


def _booleans(mask: mx.array | str, queries: int, keys: int) -> mx.array:
    if isinstance(mask, str):
        positions = mx.arange(keys)
        return positions[-queries:, None] >= positions
    return mask
