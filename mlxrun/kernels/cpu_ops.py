"""Operations that MLX's CPU backend does slowly or inexactly, made of others; elsewhere MLX's own.

Its ``exp`` takes 16 ns a number, and so do sigmoid and softmax; its power of two takes 6 (x86-64,
one core). Its rotation is spelled out of many small operations, sines and cosines for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx

FEW = 1 << 18  # numbers up to which three arrays of them cost nothing
ADDED = 64  # numbers that are added one after the other
_PER_E = math.log2(math.e)


def sigmoid(x: mx.array) -> mx.array:
    """``1 / (1 + exp(-x))``."""
    return 1 / (1 + mx.power(2.0, x * -_PER_E)) if _by_twos(x) else mx.sigmoid(x)


def silu(x: mx.array) -> mx.array:
    """``x * sigmoid(x)``."""
    return x / (1 + mx.power(2.0, x * -_PER_E)) if _by_twos(x) else x * mx.sigmoid(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh form of GELU (Hendrycks and Gimpel, 2016, arXiv:1606.08415), as ggml computes it.

    ggml looks it up in a table of half-precision numbers between -10 and 10, whatever the type of
    the run; equal rounding makes results equal to llama.cpp's.
    """
    half = x.astype(mx.float16)
    y = _gelu_table()[half.view(mx.uint16)] if _by_twos(x) else _gelu_of_half(half)
    return mx.where(x >= 10, x, mx.where(x <= -10, 0, y.astype(x.dtype)))


def _gelu_of_half(half: mx.array) -> mx.array:
    h = half.astype(mx.float32)
    return (0.5 * h * (1 + mx.tanh(0.7978845608028654 * h * (1 + 0.044715 * h * h)))).astype(
        mx.float16
    )


@lru_cache(maxsize=1)
def _gelu_table() -> mx.array:
    """Of every half-precision number, by its bits, float32."""
    table = _gelu_of_half(mx.arange(1 << 16).astype(mx.uint16).view(mx.float16))
    table = table.astype(mx.float32)
    mx.eval(table)
    return table


def softmax(x: mx.array) -> mx.array:
    """Along the last axis, summed in float32.

    For few numbers only: three copies are alive at once, and MLX's own works in place.
    """
    if not _by_twos(x) or x.size > FEW:
        return mx.softmax(x, axis=-1, precise=True)
    powers = mx.power(2.0, (x - x.max(axis=-1, keepdims=True)) * _PER_E)
    return powers / powers.sum(axis=-1, keepdims=True)


def plain_attention_is_faster(q: mx.array, keys: int) -> bool:
    """Whether queries (B, H, T, D) attend faster by products and a softmax of their own.

    MLX's fused attention on the CPU is made of the same products, one for each head rather than
    one for those that share keys, and of a slower softmax.
    """
    return q.shape[0] * q.shape[1] * q.shape[2] * keys <= FEW and _by_twos(q)


def exp(x: mx.array) -> mx.array:
    """``e ** x``."""
    return mx.power(2.0, x * _PER_E) if _by_twos(x) else mx.exp(x)


def total(x: mx.array) -> mx.array:
    """The sum along the last axis, (..., V) to (..., 1), of sums of a few numbers each.

    MLX adds one number after the other in each lane of a vector, which over a vocabulary of 262,144
    costs up to 1e-3 of the sum; this costs less than 1e-6.
    """
    while (width := x.shape[-1]) > ADDED:
        whole = width - width % ADDED
        sums = x[..., :whole].reshape(*x.shape[:-1], -1, ADDED).sum(axis=-1)
        x = sums if whole == width else mx.concatenate([sums, x[..., whole:]], axis=-1)
    return x.sum(axis=-1, keepdims=True)


def log_softmax(x: mx.array) -> mx.array:
    """Log-probabilities of logits (..., V), whose exponentials sum to 1 within 1e-6."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - mx.log(total(exp(shifted)))


def _by_twos(x: mx.array) -> bool:
    return bool(x.dtype == mx.float32 and mx.default_device() == mx.cpu)


def rotation_of_single_tokens(
    dims: int, base: float, scale: float, traditional: bool, periods: tuple[float, ...] | None
) -> Callable[[mx.array, mx.array], mx.array]:
    """``(x (B, H, 1, D), positions (B,)) -> x`` as ``mx.fast.rope`` computes it, to the bit.

    Made of the same arrays, sines and cosines are the same in all layers of a compiled step.
    """
    frequencies, signs = _frequencies(base, dims, traditional, periods)

    def rotate(x: mx.array, positions: mx.array) -> mx.array:
        where = positions.astype(mx.float32)[:, None, None, None]  # (B, 1, 1, 1)
        angles = where * scale * frequencies
        cos, sin = mx.cos(angles).astype(x.dtype), (mx.sin(angles) * signs).astype(x.dtype)
        whole = x.shape[-1] == dims
        head = x if whole else x[..., :dims]
        rotated = head * cos + _partners(head, traditional) * sin
        return rotated if whole else mx.concatenate([rotated, x[..., dims:]], axis=-1)

    return rotate


def _partners(x: mx.array, traditional: bool) -> mx.array:
    """The other number of each rotated pair (..., D): its neighbor, or the one D / 2 away."""
    if traditional:
        return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([second, first], axis=-1)


@lru_cache(maxsize=16)
def _frequencies(
    base: float, dims: int, traditional: bool, periods: tuple[float, ...] | None
) -> tuple[mx.array, mx.array]:
    """Radians per position and the signs of sines, (dims,); shared by layers of equal RoPE."""
    if periods is not None:
        frequencies = mx.reciprocal(mx.array(periods))
    else:
        steps = mx.arange(0, -(dims // 2), -1, mx.float32)
        frequencies = mx.exp(steps * (math.log(base) / (dims // 2)))
    first, axis = -mx.ones(dims // 2), 1 if traditional else 0
    pair = mx.stack([frequencies, frequencies], axis).flatten()
    signs = mx.stack([first, -first], axis).flatten()
    mx.eval(pair, signs)
    return pair, signs
