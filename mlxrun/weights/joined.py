"""Projections of one input as one product: the rows of their matrices below each other.

Knows weights in their layouts; knows neither names of parameters nor when joining pays.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import mlx.core as mx

from mlxrun.weights.weight import Form, Product, Weight

Split = Callable[[mx.array], list[mx.array]]


@dataclass(frozen=True)
class Projection:
    """A matrix (rows, columns) with its bias (rows,), or without one."""

    weight: Form
    bias: mx.array | None = None

    @property
    def form(self) -> Hashable:
        """What projections share whose rows can be one matrix; None for one that stays alone.

        What adapters add, and what multiplies a whole matrix, belongs to one projection.
        """
        weight = self.weight
        if not isinstance(weight, Weight) or weight.factor is not None:
            return None
        return weight.layout, *(str(part.dtype) for part in weight.arrays), self.bias is None

    @property
    def function(self) -> Product:
        """``x (..., columns) -> (..., rows)``."""
        return self.weight.product(self.bias)

    def cut(self, start: int, stop: int) -> Projection:
        """The projection to some of the rows, as views."""
        whole, bias = self.weight, self.bias
        assert isinstance(whole, Weight)
        parts = (whole.weight, whole.scales, whole.biases, bias)
        weight, scales, biases, bias = (
            None if part is None else part[start:stop] for part in parts
        )
        assert weight is not None
        return Projection(replace(whole, weight=weight, scales=scales, biases=biases), bias)


def apart(projections: Sequence[Projection]) -> Split:
    """``x (..., columns) -> [(..., rows), ...]``, a product for each."""
    functions = [each.function for each in projections]
    return lambda x: [function(x) for function in functions]


def together(projections: Sequence[Projection]) -> tuple[Split, list[Projection]]:
    """As :func:`apart`, one product for all that have one form; and the projections as views of it.

    What is joined is computed now: once the caller drops the projections it gave, their memory is
    free.
    """
    made, results = list(projections), []
    for places in _groups(projections):
        whole = _joined([projections[place] for place in places])
        edges = list(accumulate(projections[place].weight.rows for place in places))
        for place, start, stop in zip(places, [0, *edges], edges, strict=False):
            made[place] = whole.cut(start, stop) if len(places) > 1 else whole
        results.append((places, whole.function, edges[:-1]))
    if len(results) == len(made):
        return apart(made), made

    def split(x: mx.array) -> list[mx.array]:
        parts: dict[int, mx.array] = {}
        for places, function, edges in results:
            parts |= zip(places, mx.split(function(x), edges, axis=-1), strict=True)
        return [parts[place] for place in range(len(made))]

    return split, made


def _groups(projections: Sequence[Projection]) -> list[list[int]]:
    """Which projections, by their places, become one."""
    found: dict[Hashable, list[int]] = {}
    for place, projection in enumerate(projections):
        form = projection.form
        found.setdefault(place if form is None else form, []).append(place)
    return list(found.values())


def _joined(projections: Sequence[Projection]) -> Projection:
    if len(projections) == 1:
        return projections[0]

    def rows(parts: Sequence[mx.array | None]) -> mx.array | None:
        present = [part for part in parts if part is not None]
        return mx.concatenate(present) if present else None

    weights = [each.weight for each in projections if isinstance(each.weight, Weight)]
    weight = rows([each.weight for each in weights])
    scales, biases = (
        rows([each.scales for each in weights]),
        rows([each.biases for each in weights]),
    )
    bias = rows([each.bias for each in projections])
    assert weight is not None
    mx.eval([part for part in (weight, scales, biases, bias) if part is not None])
    return Projection(replace(weights[0], weight=weight, scales=scales, biases=biases), bias)
