"""Perplexity: how surprised a model is by a text.

Pure functions on logits; which tokens count is the business of :mod:`mlxrun.quality.windows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlxrun.display import table_of
from mlxrun.kernels.cpu_ops import exp, total
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

    def _repr_html_(self) -> str:
        return table_of(self)


class Predicted(NamedTuple):
    """What a model expects after each of T tokens, float32 (T, V).

    Attributes:
        logs: natural logarithms of the probabilities.
        probabilities: the same, maybe rounded to 0 where they are smaller than float32 goes.
    """

    logs: mx.array
    probabilities: mx.array

    def surprises(self, targets: mx.array) -> mx.array:
        """How unlikely each token was that followed, (T,): ``-ln p``, nats, (T,)."""
        return -mx.take_along_axis(self.logs, targets[:, None], axis=-1)[:, 0]


def predicted(logits: mx.array) -> Predicted:
    """The softmax of logits, float32, (T, V), and its logarithm."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    powers = exp(shifted)
    whole = total(powers)
    return Predicted(shifted - mx.log(whole), powers / whole)


def perplexity_of(surprised: Floats) -> tuple[Estimate, Estimate]:
    """Perplexity, and the mean that it is the exponential of, of surprises (N,) in nats."""
    average = mean(surprised)
    return exponential(average), average
