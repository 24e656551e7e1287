"""What the kernels work on, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from converters.gguf.types import BLOCKS, GGMLType

__all__ = ["HeadsSpec", "Matrix", "Missing"]


@dataclass(frozen=True)
class Missing:
    """There are no kernels, for a reason of one line."""

    reason: str


@dataclass(frozen=True)
class Matrix:
    """A matrix of weights in GGUF blocks, as it lies in the file.

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
