"""The CPU kernels' objects, compiled as users have them and called by ctypes, without MLX."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.types import GGMLType
from mlxrun.kernels import build
from mlxrun.kernels.cache import ObjectCache, place
from mlxrun.kernels.machine import ISAS, runnable_isas

SOURCES = Path(__file__).parents[2] / "mlxrun" / "kernels" / "cpu"
FLAGS = {isa.name: list(isa.flags) for isa in ISAS}

GATES = {"silu": 1, "gelu_tanh": 2, "clamped_swiglu": 3}


class Matrix(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rows", ctypes.c_int32),
    ]


class Product(ctypes.Structure):
    _fields_ = [
        ("matrices", ctypes.POINTER(Matrix)),
        ("count", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("normed", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("norm", ctypes.c_void_p),
        ("biases", ctypes.POINTER(ctypes.c_void_p)),
        ("gate", ctypes.c_int32),
        ("residual", ctypes.c_void_p),
        ("outs", ctypes.POINTER(ctypes.c_void_p)),
    ]


class Experts(ctypes.Structure):
    _fields_ = [
        ("matrices", ctypes.POINTER(Matrix)),
        ("count", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("experts", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("used", ctypes.c_int32),
        ("rows_per_token", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("biases", ctypes.POINTER(ctypes.c_void_p)),
        ("gate", ctypes.c_int32),
        ("outs", ctypes.POINTER(ctypes.c_void_p)),
    ]


class Take(ctypes.Structure):
    _fields_ = [
        ("matrix", Matrix),
        ("columns", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("ids", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


class Core(ctypes.Structure):
    _fields_ = [
        ("abi", ctypes.c_int32),
        ("threads", ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_double, ctypes.c_int32)),
        ("add", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)),
        ("known", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)),
        ("product", ctypes.CFUNCTYPE(None, ctypes.POINTER(Product))),
        ("experts", ctypes.CFUNCTYPE(None, ctypes.POINTER(Experts))),
        ("take", ctypes.CFUNCTYPE(None, ctypes.POINTER(Take))),
        ("rms_norm", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("heads", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)),
        ("attention", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("gated", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("softmax", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ]


Array = npt.NDArray[Any]


@functools.cache
def processor() -> list[str]:
    """The instruction sets that this machine can run, best first."""
    return [isa.name for isa in runnable_isas()]


@functools.cache
def compiled(isa: str, names: tuple[str, ...]) -> dict[str, Path]:
    """The core ("core") and some types, from the cache or compiled in parallel."""
    types = frozenset(GGMLType[name] for name in names)
    chosen = next(each for each in ISAS if each.name == isa)
    paths, _ = build.build(build.objects(types, chosen), ObjectCache(place()))
    return paths


@functools.cache
def core(isa: str) -> Core:
    library = ctypes.CDLL(str(compiled(isa, ())["core"]))
    library.mlxrun_core.restype = ctypes.POINTER(Core)
    table: Core = library.mlxrun_core().contents
    table.threads(2, 2e-5, 0)
    return table


@functools.cache
def add(isa: str, *names: str) -> None:
    """Make types known to the core."""
    paths = compiled(isa, names)
    for name in names:
        library = ctypes.CDLL(str(paths[name]))
        library.mlxrun_format.restype = ctypes.c_void_p
        assert core(isa).add(library.mlxrun_format()) == 0


def address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


def pointers(arrays: Sequence[Array | None]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*map(address, arrays))


def matrix(blocks: Array, kind: int, order: Array | None = None) -> Matrix:
    return Matrix(address(blocks), address(order), kind, blocks.shape[-2])


def product(
    isa: str,
    matrices: Sequence[Matrix],
    x: Array,
    planes: int,
    *,
    normed: bool = False,
    norm: Array | None = None,
    eps: float = 0.0,
    biases: Sequence[Array | None] | None = None,
    gate: int = 0,
    residual: Array | None = None,
) -> list[Array]:
    x = np.ascontiguousarray(x, np.float32)
    rows, columns = x.shape
    widths = [m.rows for m in (matrices[::2] if gate else matrices)]
    outs = [np.full((rows, width), 7, np.float32) for width in widths]
    call = Product(
        (Matrix * len(matrices))(*matrices),
        len(matrices),
        columns,
        planes,
        rows,
        address(x),
        normed,
        eps,
        address(norm),
        None if biases is None else pointers(biases),
        gate,
        address(residual),
        pointers(outs),
    )
    core(isa).product(ctypes.byref(call))
    return outs


def experts(
    isa: str,
    matrices: Sequence[Matrix],
    x: Array,
    chosen: Array,
    count: int,
    planes: int,
    *,
    biases: Sequence[Array | None] | None = None,
    gate: int = 0,
) -> list[Array]:
    """x (tokens, 1 or used, columns), chosen (tokens, used)."""
    x = np.ascontiguousarray(x, np.float32)
    chosen = np.ascontiguousarray(chosen, np.uint32)
    widths = [m.rows for m in (matrices[::2] if gate else matrices)]
    outs = [np.full((*chosen.shape, width), 7, np.float32) for width in widths]
    call = Experts(
        (Matrix * len(matrices))(*matrices),
        len(matrices),
        x.shape[-1],
        planes,
        count,
        *chosen.shape,
        x.shape[1],
        address(x),
        address(chosen),
        None if biases is None else pointers(biases),
        gate,
        pointers(outs),
    )
    core(isa).experts(ctypes.byref(call))
    return outs


def take(isa: str, weights: Matrix, columns: int, ids: Sequence[int]) -> Array:
    numbers = np.asarray(ids, np.int32)
    out = np.full((len(numbers), columns), 7, np.float32)
    call = Take(weights, columns, len(numbers), address(numbers), address(out))
    core(isa).take(ctypes.byref(call))
    return out
