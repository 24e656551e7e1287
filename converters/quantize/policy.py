"""Which MLX forms a tensor may take, in order of preference, and when one is good enough.

``exact``
    every weight bit-equal to the source in float32: packed with half-precision scales where they
    hold it, with float32 scales where only those do, else plain float32.
``near`` (default)
    the source's own codes wherever MLX can hold them (only scales are rounded to half precision);
    other types are requantized to the smallest form with a relative RMSE of at most
    1%. Tensors that are floats stay floats, in half precision.
``compact``
    as near, but no tensor grows by more than half a bit a weight, whatever the error, or takes the
    smallest form there is, 2.25 bits, where that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from converters.errors import ConversionError
from converters.gguf.quants import CODECS
from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.affine import ErrorStats
from converters.quantize.layout import BITS, GROUPS, Layout, affine, dense, fixed

POLICIES = ("exact", "near", "compact")
NEAR_RMSE = 0.01
COMPACT_GROWTH = 0.5

FLOATS = {
    GGMLType.F32: "float32",
    GGMLType.F16: "float16",
    GGMLType.BF16: "bfloat16",
    GGMLType.F64: "float32",
}
FIXED = {GGMLType.MXFP4: "mxfp4", GGMLType.NVFP4: "nvfp4"}


def check_policy(policy: str) -> str:
    """The policy's name, if it is one."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ConversionError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    return policy


@dataclass(frozen=True)
class Policy:
    """A policy bound to the floating-point type of plain arrays and of scales.

    Attributes:
        name: ``exact``, ``near`` or ``compact``.
        half: the type that ``near`` and ``compact`` round to: float16 or bfloat16 for a
            checkpoint, float32 for a run in float32.
        packed: use MLX's quantized forms at all; a CPU multiplies plain float32 faster.
        factors: keep a matrix's factor as an array of its own, which a checkpoint for stock mlx-lm
            has no place for.
        narrow: store scales in half precision where that loses nothing.
    """

    name: str
    half: str = "float16"
    packed: bool = True
    factors: bool = False
    narrow: bool = False

    def candidates(
        self, kind: GGMLType, *, module: bool, factored: bool = False
    ) -> Iterator[Layout]:
        """Forms to try, best first.

        Args:
            kind: GGML type of the tensor.
            module: whether MLX's quantized modules can hold it: a matrix.
            factored: whether the matrix is multiplied by a factor.
        """
        if kind in FLOATS:
            yield from self._floats(FLOATS[kind])
            return
        if module and kind in FIXED and (self.factors or not factored):
            yield fixed(FIXED[kind])
        elif kind in FIXED:
            if module and self.name != "exact":
                yield from by_size(lambda layout: layout.bits >= 4, self.half)
        elif module and self.packed:
            if self.name == "compact":
                yield from self._compact(kind)
                return
            yield from self._packed(kind)
        yield from self._floats("float32")

    def merged(self, kind: GGMLType, *, module: bool) -> Iterator[Layout]:
        """Forms to try for a tensor with something merged into it, best first.

        Its own codes are gone: exact keeps floats, near takes the smallest form that is near
        enough, compact the best one of about the tensor's size.
        """
        if module and self.packed and kind not in FLOATS and self.name != "exact":
            if self.name == "near":
                yield from by_size(lambda layout: True, self.half)
            else:
                yield from self._within(source_bits(kind) + COMPACT_GROWTH)
        yield from self._floats("float32" if self.name == "exact" else FLOATS.get(kind, "float32"))

    def accept(self, error: ErrorStats, layout: Layout) -> bool:
        """Whether a form with this error keeps the policy's promise."""
        if self.narrow and layout.mode == "affine" and layout.dtype != self.half:
            return error.equal
        if self.name == "exact":
            return error.equal
        if self.name == "near":
            return error.rmse <= NEAR_RMSE
        return error.rmse < float("inf")

    def _floats(self, own: str) -> Iterator[Layout]:
        order = [own, "float32"] if self.name == "exact" else [self.half, own, "float32"]
        for dtype in dict.fromkeys(order):
            yield dense(dtype)

    def _packed(self, kind: GGMLType) -> Iterator[Layout]:
        codec = CODECS[kind]
        group, bits = codec.mlx_group, codec.bits
        if group:
            first = ("float16",) if self.narrow else ()
            for dtype in dict.fromkeys((*first, self.half, "float32")):
                yield affine(bits, group, dtype)
        elif self.name == "near":
            yield from by_size(lambda layout: layout.bits >= bits, self.half)

    def _compact(self, kind: GGMLType) -> Iterator[Layout]:
        limit = source_bits(kind) + COMPACT_GROWTH
        codec = CODECS[kind]
        if codec.mlx_group:
            own = affine(codec.bits, codec.mlx_group, self.half)
            if own.bits_per_weight <= limit:
                yield own
        yield from self._within(limit)

    def _within(self, bits: float) -> Iterator[Layout]:
        """The forms of at most so many bits per weight, largest first, and the smallest of all."""
        fitting = list(by_size(lambda layout: layout.bits_per_weight <= bits, self.half))
        yield from reversed(fitting)
        yield affine(2, 128, self.half)  # nothing in MLX is as small as the 1-bit types


def by_size(condition: Callable[[Layout], bool], dtype: str) -> Iterator[Layout]:
    """The affine forms that fulfill a condition, smallest first."""
    forms = (affine(bits, group, dtype) for bits in BITS for group in reversed(GROUPS))
    yield from sorted(filter(condition, forms), key=lambda layout: layout.bits_per_weight)


def source_bits(kind: GGMLType) -> float:
    """Bits per weight of a GGML type."""
    elements, size = BLOCKS[kind]
    return 8 * size / elements
