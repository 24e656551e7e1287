"""Perplexity: how surprised a model is by a text.

Pure functions on logits; which tokens count is the business of :mod:`mlxrun.quality.windows`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxrun.quality.estimates import Estimate, Floats, exponential, mean


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: ``exp(surprise)``: among how many equally likely tokens the model chooses, as
            it were. 1 is certainty.
        surprise: the mean negative log-likelihood of a token, in nats.
        tokens: how many were scored.
        windows: how many were read.
        context: tokens of a window.
        scored: tokens scored at the end of each window.
    """

    perplexity: Estimate
    surprise: Estimate
    tokens: int
    windows: int
    context: int
    scored: int


def surprises(logits: mx.array, targets: mx.array) -> mx.array:
    """How unlikely each token was: ``log(sum(exp(logits))) - logits[target]``.

    Args:
        logits: float32, (T, V).
        targets: the token that followed each, (T,).

    Returns:
        Negative log-likelihoods, nats, float32, (T,).
    """
    own = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits, axis=-1) - own


def perplexity_of(surprised: Floats) -> tuple[Estimate, Estimate]:
    """Perplexity, and the mean that it is the exponential of, of surprises (N,) in nats."""
    average = mean(surprised)
    return exponential(average), average
