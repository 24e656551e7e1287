"""The compiled kernels as functions of MLX arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from converters.errors import GGUFError
from converters.gguf.file import GGUFTensor
from converters.gguf.types import GGMLType
from mlxrun.kernels.interface import HeadsSpec, Matrix, Product

__all__ = ["Kernels", "Native"]

_NORM_AT: Final = {None: 0, "before": 1, "after": 2}
#: How a gate and a linear side become one.
GATES: Final = {"silu": 1, "gelu_tanh": 2, "clamped_swiglu": 3}

_INT, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
_OBJECT, _INTS = ctypes.py_object, ctypes.POINTER(ctypes.c_int32)


class LayoutError(Exception):
    """The compiled objects do not fit this Python, MLX or each other."""


class Native:
    """The loaded libraries: the core, one of each type, and the glue to MLX.

    Raises:
        LayoutError: they do not fit.
        OSError: one cannot be loaded.
    """

    def __init__(self, core: Path, glue: Path, formats: Mapping[GGMLType, Path]) -> None:
        self._libraries = [ctypes.CDLL(str(core))]
        self.glue = ctypes.PyDLL(str(glue))
        self._declare()
        functions = self._libraries[0].mlxrun_core
        functions.restype = _POINTER
        blank = mx.array(0.0)
        # Referred to by the library from now on.
        self._create = blank.__copy__
        if self.glue.glue_start(functions(), object.__basicsize__, mx.array, None, self._create):
            raise LayoutError("the kernels are of another version")
        self._probe()
        self.types: set[GGMLType] = set()
        self.add(formats)
        self._cuts = _INT.from_address(self.glue.glue_cuts())

    def add(self, formats: Mapping[GGMLType, Path]) -> None:
        """Load the kernels of more types."""
        for type, path in formats.items():
            library = ctypes.CDLL(str(path))
            library.mlxrun_format.restype = _POINTER
            self._libraries.append(library)
            if self.glue.glue_add(library.mlxrun_format()):
                raise LayoutError(f"the kernels of {type.name} are of another version")
            self.types.add(type)

    def set_threads(self, count: int, spin: float, pinned: bool) -> None:
        """Set the pool while it is idle; ``spin`` is in seconds of busy waiting."""
        self.glue.glue_threads(count, spin, pinned)

    def operation(self, name: str, *arguments: Any) -> Any:
        """A new operation of the glue, by the function that makes it."""
        return getattr(self.glue, name)(*arguments)

    def _declare(self) -> None:
        glue = self.glue
        free = glue.glue_free
        free.argtypes, free.restype = [_POINTER], None

        class Operation(ctypes.c_void_p):
            def __del__(self) -> None:
                free(self)

        def declare(name: str, result: Any, *arguments: Any) -> None:
            function = getattr(glue, name)
            function.restype, function.argtypes = result, arguments

        declare("glue_start", _INT, _POINTER, ctypes.c_ssize_t, _OBJECT, _OBJECT, _OBJECT)
        declare("glue_threads", None, _INT, ctypes.c_double, _INT)
        declare("glue_add", _INT, _POINTER)
        declare("glue_probe", _INT, _OBJECT, _INTS, _INT)
        declare("glue_apply", _OBJECT, _POINTER, _OBJECT)
        declare("glue_cuts", _POINTER)
        declare("glue_first_missing", ctypes.c_int64, ctypes.c_int64)
        declare(
            "glue_map", _OBJECT, _INT, ctypes.c_int64, _INTS, _INT, ctypes.POINTER(ctypes.c_int64)
        )
        declare(
            "glue_product", Operation, _INT, _INTS, _INT, _INT, _INT, _FLOAT, _INT, _INT, _OBJECT
        )
        declare("glue_experts", Operation, _INT, _INTS, _INT, _INT, _INT, _OBJECT)
        declare("glue_take", Operation, _INT, _INT, _OBJECT)
        declare("glue_rms_norm", Operation, _FLOAT, _OBJECT)
        declare("glue_heads", Operation, _INT, _INTS, ctypes.POINTER(_FLOAT), _OBJECT)
        declare("glue_attention", Operation, _FLOAT, _FLOAT, _INT, _OBJECT)
        declare("glue_gated", Operation, _INT)
        declare("glue_softmax", Operation)

    def _probe(self) -> None:
        """Compare the glue's view of an array with the array itself."""
        found = (_INT * 8)()
        array = mx.zeros((3, 5, 7), mx.float16)
        self.glue.glue_probe(array, found, len(found))
        if list(found)[:5] != [3, 2, 3, 5, 7]:
            raise LayoutError("arrays lie in memory in another way than expected")


class Kernels:
    """:class:`BlockKernels` of the CPU, and the other operations of a transformer's step."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self._apply = native.glue.glue_apply
        self._mapped: dict[int, GGUFTensor] = {}  # by the mapping's id, one tensor of each file

    @property
    def types(self) -> frozenset[GGMLType]:
        return frozenset(self._native.types)

    def map(self, tensor: GGUFTensor) -> mx.array:
        """A tensor's bytes; the file is mapped once, for as long as an array refers to it."""
        rows = tensor.elements // tensor.shape[-1]
        shape = (*tensor.shape[:-1], tensor.nbytes // rows)
        sizes, mapping = (_INT * len(shape))(*shape), ctypes.c_int64()
        try:
            array: mx.array = self._native.glue.glue_map(
                tensor.descriptor, tensor.offset, sizes, len(shape), ctypes.byref(mapping)
            )
        except (OSError, ValueError) as error:
            raise tensor.error(expected="a file that can be mapped", found=str(error)) from error
        self._mapped.setdefault(mapping.value, tensor)
        return array

    def check(self) -> None:
        if self._native._cuts.value == 0:
            return
        for mapping, tensor in self._mapped.items():
            missing = self._native.glue.glue_first_missing(mapping)
            if missing >= 0:
                raise GGUFError(
                    tensor.path,
                    field="the tensors' data",
                    offset=missing,
                    expected="a file that stays as it is while it is in use",
                    found="the end of the file",
                    hint="The file has been cut short since it was opened: fetch it again",
                )

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
        weights, types = self._weights(matrices, planes, biases, gate, 2)
        weight, eps = norm or (None, 0.0)
        _require(
            weight is None or weight.shape == (matrices[0].columns,),
            "the norm is of another size than the columns",
        )
        _require(
            not residual or len(matrices) == 1 or gate is not None,
            "a residual is added to one output",
        )
        operation = self._native.operation(
            "glue_product", len(matrices), types, matrices[0].columns, planes, norm is not None,
            eps, GATES[gate] if gate else 0, residual, (*weights, _floats(weight)),
        )  # fmt: skip
        return self._function(operation)

    def experts(
        self,
        matrices: Sequence[Matrix],
        planes: int = 2,
        *,
        biases: Sequence[mx.array | None] | None = None,
        gate: str | None = None,
    ) -> Product:
        weights, types = self._weights(matrices, planes, biases, gate, 3)
        operation = self._native.operation(
            "glue_experts", len(matrices), types, matrices[0].columns, planes,
            GATES[gate] if gate else 0, tuple(weights),
        )  # fmt: skip
        return self._function(operation)

    def take(self, matrix: Matrix) -> Callable[[mx.array], mx.array]:
        weights, types = self._weights([matrix], 1, None, None, 2)
        operation = self._native.operation("glue_take", types[0], matrix.columns, tuple(weights))
        return self._single(operation)

    def dequantize(self, matrix: Matrix) -> mx.array:
        *stack, rows, size = matrix.blocks.shape
        order = mx.arange(rows) if matrix.order is None else matrix.order
        ids = (mx.arange(prod(stack))[:, None] * rows + order).reshape(*stack, rows)
        flat = replace(matrix, blocks=matrix.blocks.reshape(-1, size), order=None)
        return self.take(flat)(ids)

    def rms_norm(self, weight: mx.array | None, eps: float) -> Callable[..., mx.array]:
        """``f(x)`` or ``f(x, residual)``: ``x / rms(x) * weight + residual`` over the last axis."""
        return self._single(self._native.operation("glue_rms_norm", eps, (_floats(weight),)))

    def heads(
        self, specs: Sequence[HeadsSpec]
    ) -> Callable[[Sequence[mx.array], int | mx.array], list[mx.array]]:
        """Heads of projections, normalized and rotated, in one operation.

        Returns:
            ``f([x (B, T, heads dim) or (B, heads dim), ...], positions)`` to
            [(B, heads, T, dim), ...]; ``positions`` is that of the first token, or of each row's
            first, (B,).
        """
        kinds, numbers = [], []
        constants: list[mx.array | None] = []
        for spec in specs:
            kinds += [spec.heads, spec.dim, _NORM_AT[spec.norm_at], spec.traditional]
            numbers += [spec.eps, spec.scale]
            constants += [_floats(spec.norm), _floats(spec.frequencies)]
        operation = self._native.operation(
            "glue_heads", len(specs), (_INT * len(kinds))(*kinds),
            (_FLOAT * len(numbers))(*numbers), tuple(constants),
        )  # fmt: skip
        apply = self._apply

        def heads(projections: Sequence[mx.array], positions: int | mx.array) -> list[mx.array]:
            if isinstance(positions, int):
                positions = mx.array(positions)
            made: list[mx.array] = apply(operation, (*projections, positions))
            return made

        return heads

    def attention(
        self,
        scale: float,
        softcap: float | None = None,
        sinks: mx.array | None = None,
        slopes: mx.array | None = None,
    ) -> Callable[[mx.array, mx.array, mx.array, mx.array | str | None], mx.array]:
        """Softmax attention of queries with grouped heads.

        Args:
            softcap: scores become ``softcap * tanh(score / softcap)``.
            sinks: a score of each head, (H,), for attending to nothing.
            slopes: of ALiBi, (H,).

        Returns:
            ``f(q (B, H, T, D), k (B, K, S, D), v (B, K, S, E), mask)`` to (B, H, T, E), which lies
            in memory as (B, T, H, E). ``mask`` is None, ``"causal"`` (token t sees the keys up to
            S - T + t) or booleans that broadcast to (B, 1, T, S).
        """
        constants = (_floats(sinks), _floats(slopes))
        make, apply = self._native.operation, self._apply
        plain = make("glue_attention", scale, softcap or 0.0, False, constants)
        causal = make("glue_attention", scale, softcap or 0.0, True, constants)

        def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
            if mask is None:
                made = apply(plain, (q, k, v))
            elif isinstance(mask, str):
                if mask != "causal":
                    raise ValueError(f"a mask {mask!r} is not known")
                made = apply(causal, (q, k, v))
            else:
                made = apply(plain, (q, k, v, mask))
            result: mx.array = made[0]
            return result

        return attend

    def gated(self, name: str) -> Callable[[mx.array, mx.array], mx.array]:
        """``f(a, b) -> gate(a) * b``, of one of GATES."""
        return self._single(self._native.operation("glue_gated", GATES[name]))

    @cached_property
    def softmax(self) -> Callable[[mx.array], mx.array]:
        """Along the last axis."""
        return self._single(self._native.operation("glue_softmax"))

    def _function(self, operation: Any) -> Product:
        apply = self._apply
        return lambda *inputs: apply(operation, inputs)

    def _single(self, operation: Any) -> Callable[..., mx.array]:
        apply = self._apply
        return lambda *inputs: apply(operation, inputs)[0]

    @staticmethod
    def _weights(
        matrices: Sequence[Matrix],
        planes: int,
        biases: Sequence[mx.array | None] | None,
        gate: str | None,
        axes: int,
    ) -> tuple[list[mx.array | None], Any]:
        """Blocks, order and bias of each matrix, and the numbers of their types."""
        _require(planes in (1, 2, 3), f"{planes} planes of activations: there are 1 to 3")
        _require(len({matrix.columns for matrix in matrices}) == 1, "matrices of several widths")
        _require(
            all(matrix.blocks.ndim == axes for matrix in matrices),
            "a stack of matrices where one is needed, or the reverse",
        )
        if gate is not None:
            same = len({matrix.blocks.shape[:-1] for matrix in matrices}) == 1
            _require(len(matrices) == 2 and same, "a gate takes two matrices of the same rows")
        arrays: list[mx.array | None] = []
        for matrix, bias in zip(matrices, biases or [None] * len(matrices), strict=True):
            _require(
                bias is None or bias.shape == matrix.blocks.shape[:-1],
                "a bias has another number of rows than its matrix",
            )
            arrays += [_settled(matrix.blocks, mx.uint8), _settled(matrix.order, mx.int32)]
            arrays.append(_floats(bias))
        return arrays, (_INT * len(matrices))(*[matrix.type for matrix in matrices])


def _require(met: bool, otherwise: str) -> None:
    if not met:
        raise ValueError(otherwise)


def _floats(array: mx.array | None) -> mx.array | None:
    return _settled(array, mx.float32)


def _settled(array: mx.array | None, dtype: mx.Dtype) -> mx.array | None:
    """A constant of a type, computed now: any thread may compute with it."""
    if array is None:
        return None
    settled = array.astype(dtype, stream=mx.cpu)
    mx.eval(settled)
    return settled
