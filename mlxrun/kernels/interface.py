"""The interface of block kernels, and the values that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import mlx.core as mx

from converters.gguf.file import GGUFTensor
from converters.gguf.types import BLOCKS, GGMLType

__all__ = ["BlockKernels", "HeadsSpec", "Matrix", "Missing", "Product"]

#: Inputs to outputs, lazily.
Product = Callable[..., list[mx.array]]


@dataclass(frozen=True)
class Missing:
    """There are no kernels, for a reason of one line."""

    reason: str


@dataclass(frozen=True)
class Matrix:
    """A matrix in GGUF blocks, as in the file.

    Attributes:
        blocks: uint8 (rows, bytes per row), or (experts, rows, bytes per row) of a stack of
            matrices.
        type: of the blocks.
        columns: numbers in a row.
        order: int32 (rows,): row ``i`` of the matrix is row ``order[i]`` of the blocks.

    Raises:
        ValueError: the bytes of a row are not those of so many columns.
    """

    blocks: mx.array
    type: GGMLType
    columns: int
    order: mx.array | None = None

    def __post_init__(self) -> None:
        numbers, size = BLOCKS[self.type]
        fits = self.blocks.ndim in (2, 3) and self.blocks.dtype == mx.uint8
        if not fits or self.blocks.shape[-1] * numbers != self.columns * size:
            raise ValueError(
                f"blocks {self.blocks.dtype} {self.blocks.shape} are not {self.columns} columns "
                f"of {self.type.name}"
            )
        if self.order is not None and self.order.shape != (self.rows,):
            raise ValueError(f"an order {self.order.shape} of {self.rows} rows")

    @property
    def rows(self) -> int:
        """Of one matrix of a stack."""
        return int(self.blocks.shape[-2])


@dataclass(frozen=True)
class HeadsSpec:
    """How the heads of one projection (B, T, heads dim) become (B, heads, T, dim).

    Attributes:
        heads, dim: their number and size.
        norm_at: an RMS norm of each head before or after the rotation, or none.
        norm: its weight (dim,); None for ones.
        eps: of the norm.
        frequencies: radians per position, float32 (dims / 2,), of the leading ``dims`` dimensions
            that rotate; None for no rotation.
        scale: of positions.
        traditional: whether neighbors rotate together, rather than numbers ``dims / 2`` apart.
    """

    heads: int
    dim: int
    norm_at: Literal["before", "after"] | None = None
    norm: mx.array | None = None
    eps: float = 0.0
    frequencies: mx.array | None = None
    scale: float = 1.0
    traditional: bool = False


class BlockKernels(Protocol):
    """Products over GGUF blocks on one kind of device.

    Functions that these methods return build lazy arrays, as MLX's own operations do: they can be
    compiled, and evaluated on any stream. They raise ValueError or TypeError at once where shapes
    or types do not fit.
    """

    @property
    def types(self) -> frozenset[GGMLType]:
        """The types of blocks that these kernels multiply."""

    def map(self, tensor: GGUFTensor) -> mx.array:
        """A tensor's bytes, uint8 (..., bytes per row); without a copy where the device can.

        Raises:
            GGUFError: the file has been cut short, or cannot be mapped.
        """

    def check(self) -> None:
        """Check that mapped files are still whole; to be called before results are used.

        Raises:
            GGUFError: one has been cut short: results since then are wrong.
        """

    def product(
        self,
        matrices: Sequence[Matrix],
        planes: int = 2,
        *,
        norm: tuple[mx.array | None, float] | None = None,
        biases: Sequence[mx.array | None] | None = None,
        gate: str | None = None,
        residual: bool = False,
    ) -> Product:
        """Products of one input with matrices, ``[x @ W.T + bias, ...]``.

        Args:
            matrices: with the same columns.
            planes: activations have 8 bits times this, 1 to 3; a GPU multiplies floats.
            norm: weight (columns,) or None, and epsilon, of an RMS norm of ``x`` before.
            biases: one per matrix, (rows,) or None.
            gate: one of GATES; makes one output of two matrices: ``gate(first) * second``.
            residual: the function takes another array, which is added to its one output.

        Returns:
            ``f(x)`` or ``f(x, residual)``: x (..., columns) to [(..., rows), ...] in x's dtype.
        """

    def experts(
        self,
        matrices: Sequence[Matrix],
        planes: int = 2,
        *,
        biases: Sequence[mx.array | None] | None = None,
        gate: str | None = None,
    ) -> Product:
        """As :meth:`product`, of stacks of matrices, chosen by index.

        Args:
            biases: one per stack, (experts, rows) or None.

        Returns:
            ``f(x (..., 1 or K, 1, columns), chosen (..., K)) -> [(..., K, 1, rows), ...]``.
        """

    def take(self, matrix: Matrix) -> Callable[[mx.array], mx.array]:
        """Rows by index: ``ids (...) -> (..., columns)`` float32."""

    def dequantize(self, matrix: Matrix) -> mx.array:
        """All weights: (rows, columns) or (experts, rows, columns) float32."""
