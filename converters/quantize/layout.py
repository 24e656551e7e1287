"""How one tensor is stored in MLX. A new form is one more ``mode``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

DENSE = "dense"
# Modes that fix their (group size, bits) and have one-byte scales.
FIXED_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
MODES = ("affine", *FIXED_MODES)
# Of affine forms.
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
DEFAULT_GROUP = 64

FLOAT_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


@dataclass(frozen=True)
class Layout:
    """The form of a tensor in MLX.

    Attributes:
        mode: ``dense`` (a plain array) or a quantization mode of MLX (``affine``, ``mxfp4``,
            ``mxfp8``, ``nvfp4``).
        dtype: of the plain array, or of the scales and biases of an affine form; empty in a form
            that is asked for whatever the checkpoint's floats are (see :meth:`with_dtype`).
        bits: width of a code; 0 when dense.
        group_size: neighbors along the last axis that share a scale; 0 when dense.
    """

    mode: str
    dtype: str = ""
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
        """A module's entry in the ``quantization`` section of ``config.json``, as mlx-lm has it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def with_dtype(self, dtype: str) -> Layout:
        """The same form in a checkpoint whose floats are of ``dtype``."""
        return self if self.mode in FIXED_MODES else replace(self, dtype=dtype)

    def __str__(self) -> str:
        if self.mode == DENSE:
            return self.dtype or "float"
        if self.mode == "affine":
            return f"affine{self.bits} g{self.group_size} {self.dtype}".rstrip()
        return self.mode


def dense(dtype: str = "") -> Layout:
    """A plain array of ``float16``, ``bfloat16`` or ``float32``."""
    return Layout(DENSE, dtype)


def affine(bits: int, group_size: int, dtype: str = "") -> Layout:
    """``w = scale * code + bias`` with codes of ``bits`` bits in groups along the last axis."""
    return Layout("affine", dtype, bits, group_size)


def fixed(mode: str) -> Layout:
    """``mxfp4``, ``mxfp8`` or ``nvfp4``: one-byte scales, no biases."""
    group_size, bits = FIXED_MODES[mode]
    return Layout(mode, "uint8", bits, group_size)
