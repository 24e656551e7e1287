"""Stages that drop candidates: each maps logits (B, K) to logits with -inf where it dropped one.

Candidates are sorted as by ``ranked``: likeliest first, equal ones by ascending id. Parameters are
floats, or arrays (B, 1) with a value for each row. Each stage takes probabilities over the
candidates left by the stages before it. At least one candidate of a row always survives.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlxrun.kernels.cpu_ops import log_softmax

Value = float | mx.array

_BLOCK = 64  # tokens per block of the first pass
_MAX_SOFTMAX = 1024  # candidates up to which MLX's softmax is accurate to 1e-6


def ranked(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k likeliest of logits (B, V) float32 and their ids, both (B, k), in order.

    Of equal logits the lower id comes first, on every device.
    """
    ids = mx.arange(logits.shape[-1], dtype=mx.int64)[None]
    if k * _BLOCK < logits.shape[-1]:
        ids = _best_blocks(logits, k)
        order = _first(mx.take_along_axis(logits, ids, axis=-1), ids, k)
    else:
        order = _first(logits, ids, k)
    return mx.take_along_axis(logits, order, axis=-1), order


def _best_blocks(logits: mx.array, k: int) -> mx.array:
    """Ids (B, K) of the k blocks with the likeliest tokens, and of the last, partial block.

    The k likeliest tokens are among them: the peaks of all k blocks precede the tokens of any other
    block, since an equal one of an earlier block has a lower id.
    """
    rows, size = logits.shape
    whole = size - size % _BLOCK
    peaks = logits[:, :whole].reshape(rows, -1, _BLOCK).max(axis=-1)
    blocks = _first(peaks, mx.arange(peaks.shape[-1], dtype=mx.int64)[None], k)
    ids = (blocks[..., None].astype(mx.int64) * _BLOCK + mx.arange(_BLOCK)).reshape(rows, -1)
    rest = mx.broadcast_to(mx.arange(whole, size, dtype=mx.int64), (rows, size - whole))
    return mx.concatenate([ids, rest], axis=-1) if whole < size else ids


def _first(logits: mx.array, ids: mx.array, k: int) -> mx.array:
    """The ids (B, k) uint32 of the k likeliest, in order, of logits (B, K) and ids (B or 1, K).

    Each logit and its id make one 64-bit key that sorts that way.
    """
    bits = (logits + 0.0).view(mx.int32)  # + 0.0 turns -0.0 into 0.0, its equal
    ascending = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = ((~ascending).astype(mx.int64) << 32) | ids
    if k < keys.shape[-1]:
        keys = mx.partition(keys, k - 1, axis=-1)[:, :k]
    return (mx.sort(keys, axis=-1) & 0xFFFFFFFF).astype(mx.uint32)


def top_p(logits: mx.array, p: Value) -> mx.array:
    """Keep the likeliest tokens until their probabilities reach p (0 to 1).

    Holtzman et al. 2020, "The curious case of neural text degeneration" (nucleus sampling).
    """
    before = mx.cumsum(_probabilities(logits), axis=-1, inclusive=False)
    # Only dropped candidates precede the first survivor: it has 0 before it and stays.
    return _keep(logits, (before < p) | (before == 0))


def min_p(logits: mx.array, p: Value) -> mx.array:
    """Keep tokens at least p (0 to 1) times as likely as the likeliest. Any order of candidates.

    Nguyen et al. 2024, "Turning up the heat: min-p sampling for creative and coherent LLM outputs".
    """
    peak = mx.max(logits, axis=-1, keepdims=True)
    return _keep(logits, logits >= peak + mx.log(mx.array(p)))


def typical_p(logits: mx.array, p: Value) -> mx.array:
    """Keep tokens whose surprise is nearest to the entropy until their probabilities exceed p.

    Meister et al. 2023, "Locally typical sampling".
    """
    logprobs = log_softmax(logits)
    probs = mx.exp(logprobs)
    surprise = mx.where(probs > 0, -logprobs, 0)
    entropy = mx.sum(probs * surprise, axis=-1, keepdims=True)
    distance = mx.where(probs > 0, mx.abs(surprise - entropy), mx.inf)
    order = mx.argsort(distance, axis=-1)
    ordered = mx.take_along_axis(probs, order, axis=-1)
    near = mx.cumsum(ordered, axis=-1, inclusive=False) <= p
    return _keep(logits, mx.put_along_axis(mx.zeros_like(near), order, near, axis=-1))


def xtc(logits: mx.array, threshold: Value, active: mx.array) -> mx.array:
    """Drop all but the least likely of the tokens with a probability of at least ``threshold``.

    ``active`` (B, 1) bool are the rows it applies to. "Exclude top choices", by
    p-e-w 2024: https://github.com/oobabooga/text-generation-webui/pull/6335
    """
    top = _probabilities(logits) >= threshold
    less_likely = mx.cumsum(top.astype(mx.int32), axis=-1, reverse=True, inclusive=False)
    return _keep(logits, ~(active & top & (less_likely > 0)))


def mirostat(logits: mx.array, mu: Value) -> mx.array:
    """Keep tokens whose surprise is at most mu bits, or the likeliest alone. Any order.

    Basu et al. 2021, "Mirostat: a neural text decoding algorithm that directly controls
    perplexity", in the second version of its reference implementation.
    """
    logprobs = log_softmax(logits)
    likeliest = mx.argmax(logits, axis=-1, keepdims=True)
    is_likeliest = mx.arange(logits.shape[-1]) == likeliest
    return _keep(logits, (-logprobs <= mu * math.log(2)) | is_likeliest)


def _probabilities(logits: mx.array) -> mx.array:
    """The softmax of logits (B, K)."""
    if logits.shape[-1] <= _MAX_SOFTMAX:
        return mx.softmax(logits, axis=-1)
    return mx.exp(log_softmax(logits))


def _keep(logits: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask, logits, -mx.inf)
