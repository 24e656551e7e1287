"""How far one model's predictions are from another's: Kullback-Leibler divergence, and more.

Pure functions on logits; which tokens count is the business of :mod:`mlxrun.quality.windows`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxrun.display import table_of
from mlxrun.kernels.cpu_ops import total
from mlxrun.quality.estimates import Estimate, Floats, mean, root_mean_square, share
from mlxrun.quality.perplexity import Predicted, perplexity_of, predicted

PERCENTILES = (50, 90, 95, 99, 99.9)
# Log ratios below this go through so many terms of a series.
_SMALL, _TERMS = 0.5, 7


@dataclass(frozen=True)
class Comparison:
    """How far a model B is from a model A on the same tokens of a text.

    Attributes:
        divergence: the mean Kullback-Leibler divergence D(A || B) of the two predictions of a
            token, in nats.
        percentiles: of the divergences of single tokens, in nats: "50" is the median.
        largest: the largest of them, in nats.
        agreement: the share of tokens, 0 to 1, for which both think the same token likeliest.
        perplexity_a, perplexity_b: of each.
        log_ratio: ``ln(perplexity_b / perplexity_a)``; its error is that of the paired difference,
            much smaller than those of the perplexities.
        change: the mean of B's probability of the token that followed minus A's, from -1 to 1.
        rms_change: the root mean square of that difference.
        tokens: how many were scored.
        windows: how many were read.
        context: tokens of a window.
        scored: tokens scored at the end of each window.
    """

    divergence: Estimate
    percentiles: Mapping[str, float]
    largest: float
    agreement: Estimate
    perplexity_a: Estimate
    perplexity_b: Estimate
    log_ratio: Estimate
    change: Estimate
    rms_change: Estimate
    tokens: int
    windows: int
    context: int
    scored: int

    def _repr_html_(self) -> str:
        return table_of(self)


class Differences(NamedTuple):
    """What is kept of each token, arrays (T,).

    Attributes:
        surprise_a, surprise_b: negative log-likelihoods, nats.
        divergence: of A's prediction and B's, nats.
        agrees: whether both think the same token likeliest; of several, the first.
    """

    surprise_a: mx.array
    surprise_b: mx.array
    divergence: mx.array
    agrees: mx.array


class Kept(NamedTuple):
    """The same on the host, (N,)."""

    surprise_a: Floats
    surprise_b: Floats
    divergence: Floats
    agrees: npt.NDArray[np.bool_]


def divergences(a: Predicted, b: Predicted) -> mx.array:
    """D(A || B) = sum(p_a * (ln p_a - ln p_b)) of each row, in nats.

    What is summed is ``p_a * (r - 1 - ln r)`` with ``r = p_b / p_a``, whose terms are never
    negative. It is the same, as probabilities sum to one; but an error in a row's normalisation
    counts only squared, and where r is near to one a series has no cancellation. So float32
    resolves divergences far below its own precision of 1e-7.

    Args:
        a, b: what is predicted, (T, V).

    Returns:
        Float32, (T,), at least 0; exactly 0 for equal rows.
    """
    there = a.probabilities > 0  # else r is none, and neither may logarithms be numbers
    x = mx.where(there, a.logs - b.logs, 0)  # - ln r
    near = a.probabilities * x * x * _series(x)
    far = a.probabilities * (x - 1) + b.probabilities
    terms = mx.where(mx.abs(x) < _SMALL, near, far)
    return total(mx.where(there, mx.maximum(terms, 0), b.probabilities))[:, 0]


def _series(x: mx.array) -> mx.array:
    """``(exp(-x) - 1 + x) / x^2`` by its Taylor series, to 1e-6 of it where ``|x| < _SMALL``."""
    series = mx.full((), 1 / math.factorial(_TERMS + 1))
    for n in range(_TERMS, 1, -1):
        series = 1 / math.factorial(n) - x * series
    return series


def differences(a: mx.array, b: mx.array, targets: mx.array) -> Differences:
    """What is kept of some tokens.

    Args:
        a, b: logits of A and of B, float32, (T, V).
        targets: the token that followed each, (T,).
    """
    one, other = predicted(a), predicted(b)
    agree = mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1)
    return Differences(
        one.surprises(targets), other.surprises(targets), divergences(one, other), agree
    )


def comparison(kept: Kept, *, windows: int, context: int, scored: int) -> Comparison:
    """What follows from the tokens that were scored, at least one.

    Percentiles lie on straight lines between the values that are there.
    """
    change = np.exp(-kept.surprise_b) - np.exp(-kept.surprise_a)
    levels = np.percentile(kept.divergence, PERCENTILES)
    return Comparison(
        divergence=mean(kept.divergence),
        percentiles={f"{p:g}": float(x) for p, x in zip(PERCENTILES, levels, strict=True)},
        largest=float(kept.divergence.max()),
        agreement=share(kept.agrees),
        perplexity_a=perplexity_of(kept.surprise_a)[0],
        perplexity_b=perplexity_of(kept.surprise_b)[0],
        log_ratio=mean(kept.surprise_b - kept.surprise_a),
        change=mean(change),
        rms_change=root_mean_square(change),
        tokens=kept.divergence.size,
        windows=windows,
        context=context,
        scored=scored,
    )
