"""Projections with the norm before and the gate or sum after them, as one operation.

The kernels of :mod:`mlxrun.kernels` can do that; elsewhere each is an operation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlxrun.kernels.native import GATES
from mlxrun.weights.blocks import BlockWeight
from mlxrun.weights.linear import GatheredProduct, Product, Projection, Split


class Added(Protocol):
    """A function of ``x`` that can be added to a residual on its way."""

    def __call__(self, x: mx.array, residual: mx.array | None = None, /) -> mx.array:
        """``f(x)``, or ``residual + f(x)``."""


@dataclass(frozen=True)
class Gate:
    """How a gate and a linear side become one, by name and as a function."""

    name: str
    function: Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square normalization over the last axis (arXiv:1910.07467).

    Attributes:
        weight: (columns,), or None.
        eps: added to the mean square.
        kernel: the norm of ``x``, plus a residual, as one operation; None where there is none.
    """

    weight: mx.array | None
    eps: float
    kernel: Callable[..., mx.array] | None = None

    def __call__(self, x: mx.array, residual: mx.array | None = None, /) -> mx.array:
        """The norm of ``x`` (..., columns), plus a residual."""
        if self.kernel is not None:
            return self.kernel(x) if residual is None else self.kernel(x, residual)
        y = mx.fast.rms_norm(x, self.weight, self.eps)
        return y if residual is None else residual + y


def linear(projection: Projection, norm: Product | None) -> Added:
    """``(x, residual) -> residual + projection(norm(x))``."""
    alone = _one_operation([projection], norm)
    added = _one_operation([projection], norm, residual=True)
    if alone is None or added is None:
        product = projection.product

        def plain(x: mx.array, residual: mx.array | None = None, /) -> mx.array:
            y = product(x if norm is None else norm(x))
            return y if residual is None else residual + y

        return plain

    def fused(x: mx.array, residual: mx.array | None = None, /) -> mx.array:
        return alone(x)[0] if residual is None else added(x, residual)[0]

    return fused


def split(projections: Sequence[Projection], norm: Product | None) -> Split | None:
    """``x -> [projection(norm(x)), ...]`` as one operation; None where it cannot be one."""
    return _one_operation(projections, norm)


def gated(projections: Sequence[Projection], gate: Gate, norm: Product | None) -> Product | None:
    """``x -> gate(first(norm(x)), second(norm(x)))`` as one operation; None where it cannot be."""
    product = _one_operation(projections, norm, gate=gate.name) if gate.name in GATES else None
    return None if product is None else lambda x: product(x)[0]


def gated_experts(projections: Sequence[Projection], gate: Gate) -> GatheredProduct | None:
    """As :func:`gated`, of stacked matrices that an index chooses from."""
    blocks = _blocks(projections)
    if not blocks or gate.name not in GATES:
        return None
    product = blocks[0].kernels.experts(
        [each.matrix for each in blocks],
        blocks[0].planes,
        biases=[each.bias for each in projections],
        gate=gate.name,
    )
    return lambda x, chosen: product(x, chosen)[0]


def _one_operation(
    projections: Sequence[Projection],
    norm: Product | None,
    *,
    gate: str | None = None,
    residual: bool = False,
) -> Callable[..., list[mx.array]] | None:
    """The products of one input, its norm and what follows; None unless all are GGUF blocks."""
    blocks = _blocks(projections)
    if not blocks:
        return None
    product = blocks[0].kernels.product(
        [each.matrix for each in blocks],
        blocks[0].planes,
        norm=(norm.weight, norm.eps) if isinstance(norm, RMSNorm) else None,
        biases=[each.bias for each in projections],
        gate=gate,
        residual=residual,
    )
    if norm is None or isinstance(norm, RMSNorm):
        return product
    return lambda x, *residuals: product(norm(x), *residuals)


def _blocks(projections: Sequence[Projection]) -> list[BlockWeight]:
    """The matrices if all are GGUF blocks without a factor, else none."""
    blocks = [each.weight for each in projections if isinstance(each.weight, BlockWeight)]
    whole = len(blocks) == len(projections) and all(each.factor is None for each in blocks)
    return blocks if whole else []
