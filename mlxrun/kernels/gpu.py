"""Products over GGUF blocks on a GPU: Metal and CUDA kernels with the decoders of blocks.h.

The text of a kernel is a preamble of its language (``device/metal.h`` or ``cuda.h``), blocks.h, the
numbers of one type and a body (``device/matvec.h``, ``matmul.h`` or ``rows.h``); MLX adds the
function's head and has it compiled when it first runs. Shapes are not compiled in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from converters.gguf.file import GGUFTensor
from converters.gguf.types import GGMLType
from mlxrun.kernels.device import CPU, device, device_name
from mlxrun.kernels.interface import Matrix, Missing, Product
from mlxrun.kernels.machine import SWITCH
from mlxrun.kernels.selftest import kept

__all__ = [
    "CUDA",
    "METAL",
    "TYPES",
    "Device",
    "Kernels",
    "Row",
    "available",
    "device_name",
    "language",
]

FEW = 8  # rows of x that the kernel for few takes at once
PAIRS = 64  # rows with an expert each, up to which none is sorted
FLOATS: Final = {
    GGMLType.F32: mx.float32,
    GGMLType.F16: mx.float16,
    GGMLType.BF16: mx.bfloat16,
}

_HERE = Path(__file__).parent
_SIMDGROUPS, _ROWS = 2, 2  # of a threadgroup of matvec.h; rows of W of each
_NONE = mx.zeros((1,), mx.int32)  # for an input that a kernel does not read


@dataclass(frozen=True)
class Row:
    """A type's row in the list of blocks.h, which explains the numbers; ``grid``: of grids.h."""

    name: str
    grid: bool
    block: int
    bytes: int
    group: int
    low: int
    high: int
    zero: int
    minimum: int


@dataclass(frozen=True)
class Device:
    """A language for kernels.

    Attributes:
        preamble: file with the language's definitions.
        positions: of a thread: ``lane`` of a simdgroup, ``simd`` and ``index`` in its
            threadgroup, ``group_x`` and ``group_y`` of the threadgroup.
        tile: in which type matrices of x's type are multiplied; None for x's own.
    """

    name: str
    preamble: str
    positions: str
    tile: mx.Dtype | None

    @property
    def make(self) -> Callable[..., Any]:
        """MLX's function that makes a kernel of its text."""
        kernel: Callable[..., Any] = getattr(mx.fast, f"{self.name}_kernel")
        return kernel


METAL = Device(
    "metal",
    "metal.h",
    """const int lane = int(thread_index_in_simdgroup), simd = int(simdgroup_index_in_threadgroup);
const int index = int(thread_index_in_threadgroup);
const int group_x = int(threadgroup_position_in_grid.x);
const int group_y = int(threadgroup_position_in_grid.y);
""",
    mx.float32,
)
CUDA = Device(
    "cuda",
    "cuda.h",
    """const int index = int(threadIdx.x), lane = index & 31, simd = index >> 5;
const int group_x = int(blockIdx.x), group_y = int(blockIdx.y);
""",
    None,
)


@cache
def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _types() -> dict[GGMLType, Row]:
    listed = re.compile(r"^  X\((\w+), (.+?)\)", re.M)
    plain, grids = _text("blocks.h").split("#define BLOCKS_GRID_TYPES(X)")
    found = {}
    for grid, text in ((False, plain), (True, grids)):
        for name, values in listed.findall(text):
            number, *rest = (int(value) for value in values.split(","))
            found[GGMLType(number)] = Row(name, grid, *rest)
    return found


#: The types of blocks, by their decoders' list.
TYPES: Final = _types()


@cache
def header(device: Device, kind: GGMLType) -> str:
    """The text before a kernel's function: preamble, decoders, the type's numbers."""
    row = TYPES[kind]
    blocks = _text("blocks.h").replace('#include "grids.h"\n', _text("grids.h"))
    numbers = {
        "DECODE": f"blocks_{row.name}", "BLOCK": row.block, "BYTES": row.bytes, "ZERO": row.zero,
        "MINIMUM": row.minimum, "ROWS": _ROWS, "SIMDGROUPS": _SIMDGROUPS,
    }  # fmt: skip
    if not row.grid:
        start = blocks.index("#ifndef BLOCKS_WITHOUT_GRIDS")
        blocks = blocks[:start] + "#endif\n"
    parts = [_text(f"device/{device.preamble}"), blocks]
    parts += [f"#define {name} {value}\n" for name, value in numbers.items()]
    return "".join([*parts, _text("device/weights.h")])


@cache
def body(device: Device, name: str) -> str:
    """The text of a kernel's function."""
    return device.positions + _text(f"device/{name}.h")


INPUTS: Final = {
    "matvec": ("w", "x", "order", "chosen"),
    "matmul": ("w", "x", "order", "pairs", "starts"),
    "rows": ("w", "ids"),
}


class Kernels:
    """:class:`BlockKernels` of a GPU.

    Args:
        device: the language.
        fused: types whose products of many rows decode tiles; for others the matrix is dequantized
            for each such product, and multiplied by MLX.
        types: default: all.
        make: makes a kernel of its text; default: MLX's function.
    """

    def __init__(
        self,
        device: Device = METAL,
        fused: Collection[GGMLType] = (),
        types: Collection[GGMLType] | None = None,
        make: Callable[..., Any] | None = None,
    ) -> None:
        self._device, self._fused = device, frozenset(fused)
        self._types = frozenset(types if types is not None else {*TYPES, *FLOATS})
        self._make = make or device.make
        self._kernel = cache(self._made)

    @property
    def types(self) -> frozenset[GGMLType]:
        return self._types

    def map(self, tensor: GGUFTensor) -> mx.array:
        """A tensor's bytes, copied."""
        rows = tensor.elements // tensor.shape[-1]
        return mx.array(tensor.raw()).reshape(*tensor.shape[:-1], tensor.nbytes // rows)

    def check(self) -> None:
        """A copy stays whole."""

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
        """Products of an input in float32, float16 or bfloat16."""
        products = [self._product(matrix) for matrix in matrices]
        added = biases or [None] * len(products)
        gated = _gate(gate)

        def run(x: mx.array, *more: mx.array) -> list[mx.array]:
            if norm is not None:
                x = mx.fast.rms_norm(x, *norm)
            outs = [product(x) for product in products]
            outs = [out if b is None else out + b for out, b in zip(outs, added, strict=True)]
            if gated is not None:
                outs = [gated(*outs)]
            return (
                [out + extra for out, extra in zip(outs, more, strict=True)] if residual else outs
            )

        return run

    def experts(
        self,
        matrices: Sequence[Matrix],
        planes: int = 2,
        *,
        biases: Sequence[mx.array | None] | None = None,
        gate: str | None = None,
    ) -> Product:
        products = [self._gathered(matrix) for matrix in matrices]
        added = biases or [None] * len(products)
        gated = _gate(gate)

        def run(x: mx.array, chosen: mx.array) -> list[mx.array]:
            outs = [product(x, chosen) for product in products]
            outs = [
                out if b is None else out + b[chosen][..., None, :]
                for out, b in zip(outs, added, strict=True)
            ]
            return outs if gated is None else [gated(*outs)]

        return run

    def take(self, matrix: Matrix) -> Callable[[mx.array], mx.array]:
        return partial(self._rows, matrix, dtype=mx.float32)

    def dequantize(self, matrix: Matrix) -> mx.array:
        return self._expand(matrix, mx.float32)

    def _rows(self, matrix: Matrix, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        if matrix.order is not None:
            ids = matrix.order[ids]
        if matrix.type in FLOATS:
            return _plain(matrix.blocks[ids], matrix.type).astype(dtype)
        shape, count = ids.shape, ids.size
        (out,) = self._launch(
            "rows", matrix.type, [_stacked(matrix.blocks), ids.reshape(-1).astype(mx.int32)],
            [("T", dtype)], (-(-count * matrix.columns // 16 // 64) or 1, 1), 64,
            (count, matrix.columns), dtype,
        )  # fmt: skip
        return out.reshape(*shape, matrix.columns)

    def _expand(self, matrix: Matrix, dtype: mx.Dtype) -> mx.array:
        stack, rows = matrix.blocks.shape[:-2], matrix.rows
        each = mx.arange(rows) if matrix.order is None else matrix.order
        flat = Matrix(
            matrix.blocks.reshape(-1, matrix.blocks.shape[-1]), matrix.type, matrix.columns
        )
        if stack:
            each = each + rows * mx.arange(stack[0])[:, None]
        return self._rows(flat, each, dtype)

    def _product(self, matrix: Matrix) -> Callable[[mx.array], mx.array]:
        if matrix.type in FLOATS:
            blocks = matrix.blocks if matrix.order is None else matrix.blocks[matrix.order]
            weight = _plain(blocks, matrix.type)
            return lambda x: x @ weight.T.astype(x.dtype)

        def product(x: mx.array) -> mx.array:
            rows = x.reshape(-1, x.shape[-1])
            if len(rows) <= FEW:
                out = self._few(matrix, rows)
            elif matrix.type in self._fused:
                out = self._many(matrix, rows)
            else:
                return x @ self._expand(matrix, x.dtype).T
            return out.reshape(*x.shape[:-1], matrix.rows)

        return product

    def _gathered(self, matrix: Matrix) -> Callable[[mx.array, mx.array], mx.array]:
        if matrix.type in FLOATS:
            order = slice(None) if matrix.order is None else matrix.order
            weight = _plain(matrix.blocks[:, order], matrix.type).swapaxes(-1, -2)
            return lambda x, chosen: mx.gather_mm(x, weight.astype(x.dtype), rhs_indices=chosen)

        def product(x: mx.array, chosen: mx.array) -> mx.array:
            rows, flat = x.reshape(-1, x.shape[-1]), chosen.reshape(-1).astype(mx.int32)
            make = self._few if flat.size <= PAIRS else self._many
            return make(matrix, rows, flat).reshape(*chosen.shape, 1, matrix.rows)

        return product

    def _few(self, matrix: Matrix, x: mx.array, chosen: mx.array | None = None) -> mx.array:
        at_once = 1 if chosen is not None else next(n for n in (1, 2, 4, 8) if n >= len(x))
        count = len(x) if chosen is None else chosen.size
        ordered = matrix.order is not None
        (out,) = self._launch(
            "matvec",
            matrix.type,
            [_stacked(matrix.blocks), x, _or_none(matrix.order), _or_none(chosen)],
            [
                ("T", x.dtype),
                ("XROWS", at_once),
                ("ORDERED", ordered),
                ("GATHER", chosen is not None),
            ],
            (-(-matrix.rows // (_ROWS * _SIMDGROUPS)), -(-count // at_once)),
            32 * _SIMDGROUPS,
            (count, matrix.rows),
            x.dtype,
        )
        return out

    def _many(self, matrix: Matrix, x: mx.array, chosen: mx.array | None = None) -> mx.array:
        count, pairs, starts = len(x), _NONE, _NONE
        tiles = -(-count // 32)
        if chosen is not None:
            count, experts = chosen.size, matrix.blocks.shape[0]
            pairs = mx.argsort(chosen).astype(mx.int32)
            starts = (chosen < mx.arange(experts + 1)[:, None]).sum(axis=-1).astype(mx.int32)
            tiles = -(-count // 32) + min(experts, count)  # at most, whatever the experts' shares
        ordered = matrix.order is not None
        tile = self._device.tile or x.dtype
        (out,) = self._launch(
            "matmul",
            matrix.type,
            [_stacked(matrix.blocks), x, _or_none(matrix.order), pairs, starts],
            [("T", x.dtype), ("TILE", tile), ("ORDERED", ordered), ("GATHER", chosen is not None)],
            (-(-matrix.rows // 64), tiles),
            128,
            (count, matrix.rows),
            x.dtype,
        )
        return out

    def _launch(
        self,
        name: str,
        kind: GGMLType,
        inputs: list[mx.array],
        template: list[tuple[str, Any]],
        groups: tuple[int, int],
        threads: int,
        shape: tuple[int, ...],
        dtype: mx.Dtype,
    ) -> list[mx.array]:
        if dtype not in FLOATS.values():
            raise TypeError(f"a GPU's products are of float32, float16 or bfloat16, not {dtype}")
        outs: list[mx.array] = self._kernel(name, kind)(
            inputs=inputs,
            template=template,
            grid=(groups[0] * threads, groups[1], 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
        )
        return outs

    def _made(self, name: str, kind: GGMLType) -> Any:
        return self._make(
            name=f"{TYPES[kind].name}_{name}",
            input_names=list(INPUTS[name]),
            output_names=["out"],
            source=body(self._device, name),
            header=header(self._device, kind),
        )


def _stacked(blocks: mx.array) -> mx.array:
    return blocks if blocks.ndim == 3 else blocks[None]


def _or_none(array: mx.array | None) -> mx.array:
    return _NONE if array is None else array


def _plain(blocks: mx.array, kind: GGMLType) -> mx.array:
    return blocks.view(FLOATS[kind])


def _gate(name: str | None) -> Callable[[mx.array, mx.array], mx.array] | None:
    """A gate by its name, which is that of the CPU's kernels."""
    return None if name is None else _GATES[name]


def _clamped_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    gate, up = mx.minimum(gate, 7.0), mx.clip(up, -7.0, 7.0)
    return gate * mx.sigmoid(1.702 * gate) * (up + 1)


def _gelu_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


_GATES: Final[dict[str, Callable[[mx.array, mx.array], mx.array]]] = {
    "silu": lambda gate, up: gate * mx.sigmoid(gate) * up,
    "gelu_tanh": lambda gate, up: _gelu_tanh(gate) * up,
    "clamped_swiglu": _clamped_swiglu,
}


def language() -> Device | None:
    """The language of this machine's GPU; None where MLX computes on the CPU."""
    if device() is CPU:
        return None
    return METAL if mx.metal.is_available() else CUDA


def available(types: Iterable[GGMLType]) -> Kernels | Missing:
    """Kernels for those of some types that this GPU multiplies faster as blocks.

    Known once ``mlxrun kernels --selftest`` has passed on it.
    """
    found = language()
    if found is None:
        return Missing("no GPU")
    if os.environ.get(SWITCH) == "0":
        return Missing(f"switched off by {SWITCH}=0")
    passed = kept(device_name())
    if passed is None:
        return Missing("'mlxrun kernels --selftest' has not passed on this GPU with this version")
    served = passed.served() & frozenset(types)
    if not served:
        return Missing("this GPU is faster with MLX's own forms")
    return Kernels(found, passed.fused(), served)
