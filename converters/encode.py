"""One GGUF tensor into its MLX form: try the policy's candidates, keep the first good one.

Knows how GGML types and MLX layouts meet; knows nothing of names, files or models. Works in chunks
of rows that a pool of threads shares, so that intermediate arrays stay in the processor's caches
and memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from converters.chunks import cut, gather
from converters.errors import GGUFError
from converters.forms import (
    Arrays,
    Error,
    Packed,
    keep_codes,
    keep_floats,
    regroup,
)
from converters.gguf.quants import CODECS, Codes, Products
from converters.gguf.tensor import GGUFTensor, StoredRows
from converters.gguf.types import GGMLType
from converters.layout import Layout, dense
from converters.merge import Patch
from converters.microscaling import repack
from converters.policy import FIXED, FLOATS, Policy, kept_group
from converters.requantise import requantise, requantise_integers
from converters.rounding import Floats, from_float

Bytes = npt.NDArray[np.uint8]
Change = Callable[[Floats], Floats]

# Each step on a chunk takes so long that threads seldom meet at the interpreter's lock: with half
# of this, two needed as long as one. On one thread the size makes no difference.
CHUNK_WEIGHTS = 1 << 20
# Codes that are kept take a byte each or less.
KEPT_AT_ONCE = 4
SAMPLE_WEIGHTS = 1 << 16


@dataclass(frozen=True)
class Encoded:
    """A whole tensor in MLX form.

    Attributes:
        layout: the form.
        arrays: by suffix; leading axes are the tensor's own.
        error: against the source, over all weights.
        kept: whether the source's own codes (or floats) were kept.
        merged: whether something was merged into it, which the error is then measured against.
    """

    layout: Layout
    arrays: Arrays
    error: Error
    kept: bool
    merged: bool = False

    @property
    def fidelity(self) -> str:
        if self.merged:
            return "merged"
        if self.error.equal:
            return "exact"
        return "rounded" if self.kept else "requantised"


def supported(kind: GGMLType) -> bool:
    """Whether weights of a type can be converted at all."""
    return kind in CODECS or kind in FLOATS or kind in FIXED


@dataclass(frozen=True)
class _Rows:
    """A tensor as rows, and what they go through on their way into a form.

    Attributes:
        data: raw bytes (rows, bytes per row).
        change, patch: see :func:`encode`.
        factors: of each row, (rows,).
        apart: whether a packed form leaves the factors to an array of their own.
    """

    tensor: GGUFTensor
    data: StoredRows | Bytes
    change: Change | None
    patch: Patch | None
    factors: Floats | None
    apart: bool

    def packed(self, layout: Layout, part: slice) -> Packed:
        """Some of the rows in a form."""
        raw, factors = self.data[part], None
        if self.factors is not None and not (self.apart and layout.quantized):
            factors = self.factors[part]
        with np.errstate(invalid="ignore", over="ignore"):
            if self.patch is None:
                return _encode_rows(raw, self.tensor, layout, self.change, factors)
            plain = _encode_rows(raw, self.tensor, dense("float32"), self.change, factors)
            values = plain.arrays["weight"].astype(np.float32, copy=False)
            return _requantised(self.patch(values, np.arange(len(self.data))[part]), layout)

    def encode(self, layout: Layout, policy: Policy, pool: ThreadPoolExecutor) -> Encoded | None:
        """All of them in a form; None where it does not keep the policy's promise."""
        shape, kind = self.tensor.shape, self.tensor.type
        kept = self.patch is None and keeps_codes(kind, layout)
        most = CHUNK_WEIGHTS * (KEPT_AT_ONCE if kept and layout.quantized else 1)
        parts = cut(len(self.data), shape[-1], most)
        sample = slice(0, max(1, SAMPLE_WEIGHTS // shape[-1]))
        if len(parts) > 1 and not policy.accept(self.packed(layout, sample).error, layout):
            return None
        arrays, error = gather(partial(self.packed, layout), parts, pool.map)
        if not policy.accept(error, layout):
            return None
        shaped = {name: a.reshape(*shape[:-1], a.shape[-1]) for name, a in arrays.items()}
        return Encoded(layout, shaped, error, kept, merged=self.patch is not None)


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
        module: whether MLX's quantised modules can hold it (a matrix, not a norm or a bias).
        change: what every element of a tensor of floats goes through first.
        factor: what the whole matrix is to be multiplied by, (1,), or each expert, (experts,). It
            becomes an array of its own where the policy allows and the form has no other place.
        patch: what its rows, dequantised, go through last; the error is against the result.

    Raises:
        GGUFError: blocks have not-a-number or infinite scales, or nothing that the policy allows
            can hold the tensor.
    """
    columns = tensor.shape[-1]
    data = tensor.stored_rows()
    apart = factor is not None and policy.factors and tensor.type in FIXED and patch is None
    factors = None if factor is None else np.repeat(factor, len(data) // len(factor))
    rows = _Rows(tensor, data, change, patch, factors, apart)
    candidates = (
        policy.candidates(tensor.type, module=module, factored=factor is not None)
        if patch is None
        else policy.merged(tensor.type, module=module)
    )
    for layout in candidates:
        if layout.quantized and columns % layout.group_size:
            continue
        encoded = rows.encode(layout, policy, pool)
        if encoded is None:
            continue
        if apart and layout.quantized:
            encoded.arrays["factor"] = np.asarray(factor)
        return encoded
    raise GGUFError(
        tensor.path,
        field=f"tensor {tensor.name}",
        offset=tensor.offset,
        expected=f"weights that policy {policy.name!r} can keep",
        found=f"{tensor.type.name} blocks with values that no MLX form holds",
    )


def keeps_codes(kind: GGMLType, layout: Layout) -> bool:
    """Whether a layout holds the codes (or floats) of a type as they are."""
    if kind in FIXED and layout.mode == "affine":
        return False
    if kind not in CODECS or not layout.quantized:
        return True
    return layout.bits == CODECS[kind].bits and layout.group_size == kept_group(kind)


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
        floats = _floats(raw, kind)
        floats = floats if factor is None else floats * factor[:, None]
        return keep_floats(change(floats) if change else floats, layout.dtype)
    if kind in FIXED and factor is None:
        return repack(raw, kind, layout)
    if kind in FIXED and factor is not None:
        values = repack(raw, kind, dense("float32")).arrays["weight"].astype(np.float32)
        return _requantised(values * factor[:, None], layout)
    kept = layout.quantized and keeps_codes(kind, layout)
    codec = CODECS[kind]
    found = None if kept else codec.products(raw)
    blocks: Products | Codes = found or codec.decode(raw)
    blocks = blocks if factor is None else blocks.times(factor)
    if not blocks.finite:
        raise tensor.error(
            expected="finite scales",
            found="blocks with infinite or not-a-number ones",
            hint="The file is damaged: download or quantise it again",
        )
    if isinstance(blocks, Products) and layout.quantized:
        return _requantised_products(blocks, rows, layout)
    if isinstance(blocks, Codes) and kept:
        return keep_codes(regroup(blocks, rows, layout.group_size), layout)
    return _requantised(blocks.values().reshape(rows, -1), layout)


def _requantised(values: Floats, layout: Layout) -> Packed:
    return requantise(values, layout) if layout.quantized else keep_floats(values, layout.dtype)


def _requantised_products(products: Products, rows: int, layout: Layout) -> Packed:
    groups = products.p.shape[1] // layout.group_size
    return requantise_integers(
        products.p.reshape(rows, -1), np.repeat(products.unit, groups, axis=1), layout
    )


def plain_floats(tensor: GGUFTensor) -> Floats:
    """A whole tensor dequantised, (rows, columns)."""
    rows = tensor.raw().reshape(tensor.elements // tensor.shape[-1], -1)
    return _encode_rows(rows, tensor, dense("float32")).arrays["weight"].astype(np.float32)


# Floats that both worlds store alike; bfloat16 travels as bit patterns.
_ALIKE = {GGMLType.F32: "float32", GGMLType.F16: "float16", GGMLType.BF16: "bfloat16"}
_STORED = {GGMLType.F32: "<f4", GGMLType.F16: "<f2", GGMLType.BF16: "<u2", GGMLType.F64: "<f8"}


def _stored(raw: Bytes, kind: GGMLType) -> npt.NDArray[np.generic]:
    """Plain weights as the file has them (n, c)."""
    return np.ascontiguousarray(raw).view(_STORED[kind])


def _floats(raw: Bytes, kind: GGMLType) -> Floats:
    """Plain weights as float32 (n, c)."""
    stored = _stored(raw, kind)
    return from_float(stored, "bfloat16" if kind is GGMLType.BF16 else "float32")
