"""A tensor into its MLX form: chunks of rows in a pool of threads, with the error over all weights.

Small chunks keep intermediate arrays in the cores' caches and memory bounded; numpy releases the
interpreter's lock. :func:`encode` tries the forms that a policy allows and keeps the first that is
good enough; :func:`expected_layout` predicts that form from the type alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from converters.gguf.file import GGUFTensor
from converters.gguf.quants import CODECS, Codes, Products
from converters.gguf.types import GGMLType
from converters.quantize.affine import (
    Arrays,
    ErrorStats,
    Packed,
    pack_codes,
    pack_floats,
    regroup,
    repack,
    requantize,
    requantize_integers,
)
from converters.quantize.layout import Layout, dense
from converters.quantize.packing import Bytes, Floats, from_float
from converters.quantize.policy import FIXED, FLOATS, Policy

Change = Callable[[Floats], Floats]
Rows = npt.NDArray[np.intp]
#: A merge into some rows of a parameter: (values (n, columns), their row numbers (n,)) -> values,
#: float32. Leading axes count as rows; a parameter without any is a single row.
Patch = Callable[[Floats, Rows], Floats]
Map = Callable[[Callable[[slice], ErrorStats], list[slice]], Iterator[ErrorStats]]

# With chunks of half this size threads wait for the interpreter's lock: two took as long as one.
CHUNK_WEIGHTS = 1 << 20
# A file's own codes take a byte each or less.
OWN_CODES_AT_ONCE = 4
SAMPLE_WEIGHTS = 1 << 16
# More threads mostly wait for the interpreter's lock, each with some 20 MB of its own.
_MAX_THREADS = 8
# Just below glibc's limit, 32 MiB with its own bookkeeping.
_REUSED_BLOCK = (1 << 25) - (1 << 16)


class Merge(Protocol):
    """Changes of a model's parameters, by Hugging Face name."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise AdapterError if a changed parameter does not exist or has another shape."""

    def patch(self, name: str) -> Patch | None:
        """The merge into a parameter, None where it stays as it is."""


#: From ``config.json`` in Hugging Face terms to the merge into that model.
PrepareMerge = Callable[[Mapping[str, Any]], Merge]


def workers() -> ThreadPoolExecutor:
    """Threads for chunks, one for each core up to eight.

    Freeing a large block makes glibc keep what the threads free for the next chunk instead of
    returning it to the system (mallopt(3), "M_MMAP_THRESHOLD"). Other allocators ignore it.
    """
    np.empty(_REUSED_BLOCK, np.uint8)
    return ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS))


def chunks(rows: int, columns: int, weights: int) -> list[slice]:
    """Slices of at most ``weights`` weights and at least one row; at least one slice."""
    step = max(1, weights // max(1, columns))
    return [slice(a, min(a + step, rows)) for a in range(0, rows, step)] or [slice(0, 0)]


def gather(
    pack: Callable[[slice], Packed], parts: list[slice], over: Map
) -> tuple[Arrays, ErrorStats]:
    """Whole arrays (rows, ...) from the chunks that ``pack`` makes, and their common error.

    Args:
        over: ``map``, or that of a pool. The thread that makes a chunk also copies it to its place,
            while it is in the core's cache.
    """
    arrays: Arrays = {}
    creating = threading.Lock()

    def place(part: slice) -> ErrorStats:
        packed = pack(part)
        for name, chunk in packed.arrays.items():
            if len(parts) == 1:
                arrays[name] = chunk
                continue
            with creating:
                if name not in arrays:
                    arrays[name] = np.empty((parts[-1].stop, chunk.shape[1]), chunk.dtype)
            arrays[name][part] = chunk
        return packed.error

    error = ErrorStats()
    for each in over(place, parts):
        error.merge(each)
    return arrays, error


@dataclass(frozen=True)
class Encoded:
    """A whole tensor in MLX form.

    Attributes:
        arrays: by suffix; leading axes are the tensor's own.
        error: over all weights, against the source or, of a merge, against the exact sum.
        fidelity: see :class:`converters.report.TensorRecord`.
    """

    layout: Layout
    arrays: Arrays
    error: ErrorStats
    fidelity: str


def fidelity(error: ErrorStats, *, own_codes: bool, merged: bool) -> str:
    """The report's word for a tensor that has its own codes (or floats), or new ones."""
    if merged:
        return "merged"
    if error.equal:
        return "exact"
    return "rounded" if own_codes else "requantized"


def supported(kind: GGMLType) -> bool:
    """Whether weights of a type can be converted."""
    return kind in CODECS or kind in FLOATS or kind in FIXED


def encode(
    tensor: GGUFTensor,
    policy: Policy,
    *,
    module: bool,
    pool: ThreadPoolExecutor,
    change: Change | None = None,
    factor: Floats | None = None,
    patch: Patch | None = None,
) -> Encoded:
    """Convert a tensor by a policy.

    Args:
        module: whether MLX's quantized modules can hold it (a matrix, not a norm or a bias).
        change: function of every element of a tensor of floats, applied first.
        factor: of the whole matrix, (1,), or of each expert, (experts,). An array of its own where
            the policy allows that and the form has no other place for it.
        patch: merge into its dequantized rows, applied last; the error is against the result.

    Raises:
        GGUFError: scales are not finite, or no form that the policy allows holds the tensor.
    """
    shape, kind, data = tensor.shape, tensor.type, tensor.stored_rows()
    # Packed forms leave the factors to an array of their own.
    apart = factor is not None and policy.factors and kind in FIXED and patch is None
    factors = None if factor is None else np.repeat(factor, len(data) // len(factor))

    def packed(layout: Layout, part: slice) -> Packed:
        """A chunk of rows in a form."""
        raw = data[part]
        each = None if factors is None or (apart and layout.quantized) else factors[part]
        with np.errstate(invalid="ignore", over="ignore"):
            if patch is None:
                return _encode_rows(raw, tensor, layout, change, each)
            plain = _encode_rows(raw, tensor, dense("float32"), change, each)
            values = plain.arrays["weight"].astype(np.float32, copy=False)
            return pack(patch(values, np.arange(len(data))[part]), layout)

    if patch is None:
        candidates = policy.candidates(kind, module=module, factored=factor is not None)
    else:
        candidates = policy.merged(kind, module=module)
    sample = slice(0, max(1, SAMPLE_WEIGHTS // shape[-1]))
    for layout in candidates:
        if layout.quantized and shape[-1] % layout.group_size:
            continue
        own_codes = patch is None and keeps_codes(kind, layout)
        most = CHUNK_WEIGHTS * (OWN_CODES_AT_ONCE if own_codes and layout.quantized else 1)
        parts = chunks(len(data), shape[-1], most)
        if len(parts) > 1 and not policy.accept(packed(layout, sample).error, layout):
            continue
        arrays, error = gather(partial(packed, layout), parts, pool.map)
        if not policy.accept(error, layout):
            continue
        arrays = {name: a.reshape(*shape[:-1], a.shape[-1]) for name, a in arrays.items()}
        if apart and layout.quantized:
            arrays["factor"] = np.asarray(factor)
        word = fidelity(error, own_codes=own_codes, merged=patch is not None)
        return Encoded(layout, arrays, error, word)
    raise tensor.error(
        expected=f"weights that policy {policy.name!r} can keep",
        found=f"{kind.name} blocks with values that no MLX form holds",
    )


def keeps_codes(kind: GGMLType, layout: Layout) -> bool:
    """Whether a layout holds the codes (or floats) of a type as they are."""
    if kind in FIXED and layout.mode == "affine":
        return False
    if kind not in CODECS or not layout.quantized:
        return True
    return layout.bits == CODECS[kind].bits and layout.group_size == CODECS[kind].mlx_group


def _encode_rows(
    raw: Bytes,
    tensor: GGUFTensor,
    layout: Layout,
    change: Change | None = None,
    factor: Floats | None = None,
) -> Packed:
    """Rows of raw blocks (n, bytes per row) in one layout, each times its factor (n,)."""
    rows, kind = len(raw), tensor.type
    if kind in _ALIKE and _ALIKE[kind] == layout.dtype and change is None and factor is None:
        return Packed(layout, {"weight": _stored(raw, kind)})
    if kind in FLOATS:
        floats = from_float(_stored(raw, kind), FLOATS[kind])
        floats = floats if factor is None else floats * factor[:, None]
        return pack_floats(change(floats) if change else floats, layout.dtype)
    if kind in FIXED:
        if factor is None:
            return repack(raw, kind, layout)
        values = repack(raw, kind, dense("float32")).arrays["weight"].astype(np.float32)
        return pack(values * factor[:, None], layout)
    own_codes = layout.quantized and keeps_codes(kind, layout)
    codec = CODECS[kind]
    blocks: Products | Codes = (None if own_codes else codec.products(raw)) or codec.decode(raw)
    blocks = blocks if factor is None else blocks.times(factor)
    if not blocks.finite:
        raise tensor.error(
            expected="finite scales",
            found="blocks with infinite or not-a-number ones",
            hint="The file is damaged: download or quantize it again",
        )
    if isinstance(blocks, Products) and layout.quantized:
        unit = np.repeat(blocks.unit, blocks.p.shape[1] // layout.group_size, axis=1)
        return requantize_integers(blocks.p.reshape(rows, -1), unit, layout)
    if isinstance(blocks, Codes) and own_codes:
        return pack_codes(regroup(blocks, rows, layout.group_size), layout)
    return pack(blocks.values().reshape(rows, -1), layout)


def pack(values: Floats, layout: Layout) -> Packed:
    """Rows (n, columns) of float32 in an affine or dense form."""
    return requantize(values, layout) if layout.quantized else pack_floats(values, layout.dtype)


def plain_floats(tensor: GGUFTensor) -> Floats:
    """A whole tensor dequantized, (rows, columns)."""
    rows = tensor.raw().reshape(tensor.elements // tensor.shape[-1], -1)
    return _encode_rows(rows, tensor, dense("float32")).arrays["weight"].astype(np.float32)


# Floats that GGUF and MLX store in the same way; bfloat16 as bit patterns.
_ALIKE = {GGMLType.F32: "float32", GGMLType.F16: "float16", GGMLType.BF16: "bfloat16"}
_STORED = {GGMLType.F32: "<f4", GGMLType.F16: "<f2", GGMLType.BF16: "<u2", GGMLType.F64: "<f8"}


def _stored(raw: Bytes, kind: GGMLType) -> npt.NDArray[np.generic]:
    """Plain weights as the file has them (n, c)."""
    return np.ascontiguousarray(raw).view(_STORED[kind])


# Near requantizes to codes of at least this width.
_NEAR_BITS = 8


@dataclass(frozen=True)
class Expected:
    """The form that a tensor will most likely get, and its fidelity in the report."""

    layout: Layout
    fidelity: str


def expected_layout(kind: GGMLType, policy: Policy, *, module: bool) -> Expected | None:
    """The usual form of a tensor of a type, from the type alone; None if it holds no weights.

    :func:`encode` measures errors and decides by them. Real models nearly always get this form:
    rounding errors depend on how a type stores its scales far more than on the weights.
    """
    if not supported(kind):
        return None
    for layout in policy.candidates(kind, module=module):
        fidelity = _fidelity(kind, layout)
        narrowed = policy.narrow and layout.mode == "affine" and layout.dtype != policy.half
        if narrowed and fidelity != "exact":
            continue
        if policy.name == "exact" and fidelity != "exact":
            continue
        if policy.name == "near" and fidelity == "requantized" and layout.bits < _NEAR_BITS:
            continue
        return Expected(layout, fidelity)
    return None


def least_bits(kind: GGMLType, policy: Policy, *, module: bool) -> float:
    """A lower bound in practice of the bits per weight that a tensor will take."""
    expected = expected_layout(kind, policy, module=module)
    if expected is None:
        return 0.0
    layout = expected.layout
    if layout.mode == "affine":  # half-precision scales may be enough
        layout = replace(layout, dtype=policy.half)
    return layout.bits_per_weight


def _fidelity(kind: GGMLType, layout: Layout) -> str:
    if kind in FLOATS:
        return "exact" if layout.dtype in (FLOATS[kind], "float32") else "rounded"
    if kind in FIXED or (layout.dtype == "float32" and not layout.quantized):
        return "exact"
    if not layout.quantized:
        return "rounded"
    if not keeps_codes(kind, layout):
        return "requantized"
    same = layout.dtype == "float32" or (layout.dtype == "float16" and CODECS[kind].half_scales)
    return "exact" if same else "rounded"
