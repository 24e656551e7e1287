"""Means with their standard errors, of numbers that come in parts.

Knows nothing of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, both in the same unit.

    Attributes:
        value: the estimate.
        error: one standard error; not a number for a single observation. Tokens of a text are taken
            as independent, as llama.cpp takes them; they are not quite, so it is a little small.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.error:.2g}"


def mean(values: Floats) -> Estimate:
    """The mean of observations (N,), with ``sqrt(variance / (N - 1))`` as its error."""
    error = math.sqrt(values.var() / (values.size - 1)) if values.size > 1 else math.nan
    return Estimate(float(values.mean()), error)


def share(true: npt.NDArray[np.bool_]) -> Estimate:
    """How many of (N,) are true, from 0 to 1, with the error of a binomial share."""
    return mean(true.astype(np.float64))  # sqrt(p (1 - p) / (N - 1))


def root_mean_square(values: Floats) -> Estimate:
    """``sqrt(mean(x^2))``; its error follows from that of the mean of squares, to first order."""
    squares = mean(values**2)
    root = math.sqrt(squares.value)
    return Estimate(root, 0.5 * squares.error / root if root else squares.error)


def exponential(of: Estimate) -> Estimate:
    """``exp(x)`` of an estimate, its error to first order."""
    try:
        value = math.exp(of.value)
    except OverflowError:
        value = math.inf
    return Estimate(value, value * of.error if of.error else 0.0)
