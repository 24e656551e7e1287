"""Layout: how one tensor is laid out in MLX, without the tensor itself.

The converter chooses layouts, the loader builds weights from them, and the memory plan and the
roofline read them. A new form (say, native two-level K-quants) is one more ``mode`` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DENSE = "dense"
# Modes whose group size, code width and one-byte scales are fixed by their definition.
FIXED_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
FLOAT_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


@dataclass(frozen=True)
class Layout:
    """The form of a tensor in MLX.

    Attributes:
        mode: ``dense`` (a plain array) or a quantisation mode of MLX (``affine``, ``mxfp4``,
            ``mxfp8``, ``nvfp4``).
        dtype: of the plain array, or of the scales and biases of an affine form.
        bits: width of a code; 0 when dense.
        group_size: neighbours along the last axis that share a scale; 0 when dense.
    """

    mode: str
    dtype: str
    bits: int = 0
    group_size: int = 0

    @property
    def quantized(self) -> bool:
        return self.mode != DENSE

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and biases included."""
        if self.mode == DENSE:
            return float(FLOAT_BITS[self.dtype])
        if self.mode == "affine":
            return self.bits + 2 * FLOAT_BITS[self.dtype] / self.group_size
        return self.bits + 8 / self.group_size

    @property
    def module_config(self) -> dict[str, Any]:
        """What ``config.json`` says of a module with this layout, in mlx-lm's terms."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        if self.mode == DENSE:
            return self.dtype
        if self.mode == "affine":
            return f"affine{self.bits} g{self.group_size} {self.dtype}"
        return self.mode


def dense(dtype: str) -> Layout:
    """A plain array of ``float16``, ``bfloat16`` or ``float32``."""
    return Layout(DENSE, dtype)


def affine(bits: int, group_size: int, dtype: str) -> Layout:
    """``w = scale * code + bias`` with codes of ``bits`` bits in groups along the last axis."""
    return Layout("affine", dtype, bits, group_size)


def fixed(mode: str) -> Layout:
    """``mxfp4``, ``mxfp8`` or ``nvfp4``: one-byte scales, no biases."""
    group_size, bits = FIXED_MODES[mode]
    return Layout(mode, "uint8", bits, group_size)
