"""blocks.h compiled as plain C++: the reference that other kernels are compared with."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from converters.gguf.types import BLOCKS, GGMLType

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "mlxrun" / "kernels"
FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


def compiler() -> str:
    """A C++ compiler, or a skipped test."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        pytest.skip("no C++ compiler")
    return found


def library(source: Path, out: Path, *flags: str) -> ctypes.CDLL:
    """The shared library of a source file."""
    fixed = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    fixed += [f"-I{KERNELS}", f"-I{HERE}"]
    subprocess.run([compiler(), *fixed, *flags, str(source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


@dataclass(frozen=True)
class Described:
    """A row of the list in blocks.h."""

    type: GGMLType
    block: int
    bytes: int
    group: int
    low: int
    high: int
    zero: int
    minimum: int


class Decoders:
    """The decoders of blocks.h."""

    def __init__(self, folder: Path) -> None:
        self.library = library(HERE / "rows.cpp", folder / "rows.so", "-O1")

    def types(self) -> list[Described]:
        table = np.zeros((64, 8), np.int32)
        count = self.library.list(table.ctypes.data_as(ctypes.c_void_p))
        return [Described(GGMLType(row[0]), *row[1:]) for row in table[:count].tolist()]

    def decode(self, kind: GGMLType, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights, codes and scales of bytes: float32 (n, 16), int8 (n, 16), float32 (n, 2)."""
        elements, size = BLOCKS[kind]
        raw = np.ascontiguousarray(raw)
        count = raw.size // size * elements // 16
        w, sm = np.full((count, 16), np.nan, np.float32), np.full((count, 2), np.nan, np.float32)
        q = np.zeros((count, 16), np.int8)
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (raw, w, q, sm)]
        assert self.library.decode(int(kind), pointers[0], count, *pointers[1:]), kind.name
        return w, q, sm

    def values(self, kind: GGMLType, raw: np.ndarray) -> np.ndarray:
        """Weights of rows of blocks (..., bytes): float32 (..., columns)."""
        return self.decode(kind, raw)[0].reshape(*raw.shape[:-1], -1)
