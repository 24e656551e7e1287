"""The numbers of the GGUF format: tensor types, their blocks, metadata types, and the limits.

Ids and block sizes are those of ``ggml.h`` and ``ggml-common.h`` of llama.cpp (November 2026).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

#: A metadata value. Arrays of numbers or booleans are 1-D numpy arrays, whatever their length;
#: arrays of strings and nested arrays are lists. Bytes of a string that are not UTF-8 appear as
#: lone surrogates: ``value.encode("utf-8", "surrogateescape")`` gives the file's bytes back.
Value: TypeAlias = "bool | int | float | str | list[Any] | npt.NDArray[Any]"

MAX_DIMS: Final = 4


class GGMLType(IntEnum):
    """Every tensor type that a current GGUF file may carry: its id, elements and bytes of a block.

    Blocks run along the last (contiguous) axis of a tensor.
    """

    block: tuple[int, int]

    def __new__(cls, number: int, elements: int = 0, nbytes: int = 0) -> Self:
        member = int.__new__(cls, number)
        member._value_ = number
        member.block = elements, nbytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 36
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18


#: Elements and bytes of one block.
BLOCKS: Final[dict[GGMLType, tuple[int, int]]] = {kind: kind.block for kind in GGMLType}

#: Ids that llama.cpp has removed.
REMOVED: Final[dict[int, str]] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


class ValueType(IntEnum):
    """The type of a metadata value, or of the elements of an array."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


#: How a fixed-size metadata value is stored: little-endian, whatever this machine is.
SCALARS: Final[dict[ValueType, np.dtype[Any]]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("<u1"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}


def show(value: object, limit: int = 60) -> str:
    """A short, printable form of anything a file may hold, for error messages."""
    if isinstance(value, str):
        text = repr(value[:limit])
    elif isinstance(value, (list, np.ndarray)):
        text = f"an array of {len(value)}"
    else:
        text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def printable(name: str, limit: int = 100) -> str:
    """A field's name, with control characters escaped."""
    return name if name.isprintable() and len(name) <= limit else show(name, limit)[1:-1]
