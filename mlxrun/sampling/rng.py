"""Per-request random numbers: a pure function of (seed, step, token id).

The noise of a token does not depend on the rest of the batch, nor on the other candidates and their
order. So a request samples the same tokens alone and in a batch, a step can be replayed after a
rollback, and candidates whose logits differ by rounding may swap places without effect. Built on
MLX's Threefry generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3");
``mx.random``'s global state is neither read nor changed.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx

# Stands for the step itself; token ids are far below.
_STEP_ITSELF: Final = 0xFFFFFFFF

_hash_keys = mx.vmap(lambda key: mx.random.split(key, 1)[0])  # (N, 2) -> (N, 2)


def request_key(seed: int) -> mx.array:
    """The key (1, 2) uint32 of a request; adjacent seeds give unrelated keys."""
    return mx.random.split(mx.random.key(seed), 1)


def fold_in(key: mx.array, number: mx.array) -> mx.array:
    """A key (..., 2) for each pair of a key (..., 2) and a number (...) uint32, broadcast."""
    high, low = key[..., 0], key[..., 1] ^ number
    pairs = mx.stack(list(mx.broadcast_arrays(high, low)), axis=-1)
    return _hash_keys(pairs.reshape(-1, 2)).reshape(pairs.shape)


def uniform(key: mx.array, step: mx.array) -> mx.array:
    """One number (B, 1) in [0, 1) for the step ``step`` (B,) of requests with ``key`` (B, 2)."""
    bits = fold_in(fold_in(key, step), mx.array(_STEP_ITSELF, dtype=mx.uint32))[:, :1]
    return (bits >> 8).astype(mx.float32) * 2.0**-24


def gumbel(key: mx.array, step: mx.array, ids: mx.array) -> mx.array:
    """Standard Gumbel noise (B, K) for the tokens ``ids`` (B, K) or (1, K) at ``step`` (B,).

    Adding it to log-probabilities and taking the argmax samples from the distribution (Gumbel 1954;
    Maddison et al. 2014, "A* sampling").
    """
    bits = fold_in(fold_in(key, step)[:, None], ids.astype(mx.uint32))[..., 0]  # (B, K)
    # -log1p(-u) is the exponential variate that resolves rare events best: u near 0 has fine steps.
    u = mx.minimum((bits.astype(mx.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -mx.log(-mx.log1p(-u))
