"""What a conversion would do, from types alone: no weight is read.

The converter measures errors and decides tensor by tensor; real models nearly always end where this
says, because rounding errors depend on how a type stores its scales far more than on the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from converters.encode import keeps_codes, supported
from converters.gguf.types import GGMLType
from converters.layout import Layout
from converters.policy import FIXED, FLOATS, Policy

# Types whose scales (and biases) are float16 numbers, so that MLX holds them in float16 exactly.
HALF_SCALES = frozenset(
    {
        GGMLType.Q4_0,
        GGMLType.Q4_1,
        GGMLType.Q5_0,
        GGMLType.Q5_1,
        GGMLType.Q8_0,
        GGMLType.Q1_0,
        GGMLType.Q2_0,
        GGMLType.TQ1_0,
        GGMLType.TQ2_0,
        GGMLType.Q3_K,
        GGMLType.IQ4_NL,
    }
)
# Codes of at least this width are what near takes for types that it requantises.
_NEAR_BITS = 8


@dataclass(frozen=True)
class Expected:
    """The form that a tensor will most likely get, and how faithful it is.

    Attributes:
        layout: the form.
        fidelity: ``exact``, ``rounded`` or ``requantised``, as the report will say.
    """

    layout: Layout
    fidelity: str


def expected_layout(kind: GGMLType, policy: Policy, *, module: bool) -> Expected | None:
    """The usual outcome for a tensor of a type; None for a type that holds no weights.

    Args:
        kind: GGML type of the tensor.
        policy: bound to a floating-point type; see :class:`converters.policy.Policy`.
        module: whether it is a matrix that MLX's quantised modules can hold.
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
        if policy.name == "near" and fidelity == "requantised" and layout.bits < _NEAR_BITS:
            continue
        return Expected(layout, fidelity)
    return None


def least_bits(kind: GGMLType, policy: Policy, *, module: bool) -> float:
    """Bits a weight that a tensor will hardly take less than; as :func:`expected_layout`."""
    expected = expected_layout(kind, policy, module=module)
    if expected is None:
        return 0.0
    layout = expected.layout
    if layout.mode == "affine":  # half-precision scales may do
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
        return "requantised"
    same = layout.dtype == "float32" or (layout.dtype == "float16" and kind in HALF_SCALES)
    return "exact" if same else "rounded"
