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
    outside, parts = _before(norm, [projection])
    if parts is None:
        product = projection.product

        def plain(x: mx.array, residual: mx.array | None = None, /) -> mx.array:
            y = product(x if norm is None else norm(x))
            return y if residual is None else residual + y

        return plain
    alone, added = parts.product(), parts.product(residual=True)

    def fused(x: mx.array, residual: mx.array | None = None, /) -> mx.array:
        x = x if outside is None else outside(x)
        return alone(x)[0] if residual is None else added(x, residual)[0]

    return fused


def split(projections: Sequence[Projection], norm: Product | None) -> Split | None:
    """``x -> [projection(norm(x)), ...]`` as one operation; None where it cannot be one."""
    outside, parts = _before(norm, projections)
    if parts is None:
        return None
    product = parts.product()
    return product if outside is None else lambda x: product(outside(x))


def gated(projections: Sequence[Projection], gate: Gate, norm: Product | None) -> Product | None:
    """``x -> gate(first(norm(x)), second(norm(x)))`` as one operation; None where it cannot be."""
    outside, parts = _before(norm, projections)
    if parts is None or gate.name not in GATES:
        return None
    product = parts.product(gate=gate.name)
    return lambda x: product(x if outside is None else outside(x))[0]


def gated_experts(projections: Sequence[Projection], gate: Gate) -> GatheredProduct | None:
    """As :func:`gated`, of stacked matrices that an index chooses from."""
    _, parts = _before(None, projections)
    if parts is None or gate.name not in GATES:
        return None
    product = parts.experts(gate.name)
    return lambda x, chosen: product(x, chosen)[0]


@dataclass(frozen=True)
class _Parts:
    """Projections whose matrices are all GGUF blocks, and the norm that is fused with them."""

    blocks: Sequence[BlockWeight]
    biases: Sequence[mx.array | None]
    norm: RMSNorm | None

    def product(
        self, *, gate: str | None = None, residual: bool = False
    ) -> Callable[..., list[mx.array]]:
        first, norm = self.blocks[0], self.norm
        return first.kernels.product(
            [each.matrix for each in self.blocks],
            first.planes,
            norm=None if norm is None else (norm.weight, norm.eps),
            biases=self.biases,
            gate=gate,
            residual=residual,
        )

    def experts(self, gate: str) -> Callable[[mx.array, mx.array], list[mx.array]]:
        first = self.blocks[0]
        matrices = [each.matrix for each in self.blocks]
        return first.kernels.experts(matrices, first.planes, biases=self.biases, gate=gate)


def _before(
    norm: Product | None, projections: Sequence[Projection]
) -> tuple[Product | None, _Parts | None]:
    """The norm that stays an operation of its own, and the projections if they can be one."""
    blocks = [each.weight for each in projections if isinstance(each.weight, BlockWeight)]
    if len(blocks) < len(projections) or any(each.factor is not None for each in blocks):
        return norm, None
    biases = [each.bias for each in projections]
    if isinstance(norm, RMSNorm):
        return None, _Parts(blocks, biases, norm)
    return norm, _Parts(blocks, biases, None)
