"""Estimate a model's memory before a download, from file names and sizes.

The quantization's name gives the type of most tensors, and the converter the layout of that type.
K/V and scratch follow from the header, which is not downloaded yet, so they are taken as a share of
the weights; the memory plan checks again at loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from converters.gguf.types import GGMLType
from converters.quantize.encode import expected_layout
from converters.quantize.policy import Policy, source_bits
from mlxrun.hub.choice import Choice, size_text
from mlxrun.hub.names import HubName
from mlxrun.kernels.device import device
from mlxrun.memory.device import machine_memory

# KV cache of a few thousand tokens and scratch: a tenth of the weights.
_RUNNING = 1.1
# llama-quantize gives about this part of a file with K-quants or I-quants to the more sensitive
# tensors, at 6 bits: a Q4_K_M file of 4.85 bits a weight is a mixture of 4.5 and 6.56.
_FINER_SHARE, _FINER = 1 / 6, GGMLType.Q6_K
_TYPES = {
    "IQ2_M": GGMLType.IQ2_S,
    "IQ3_XS": GGMLType.IQ3_S,
    "IQ3_M": GGMLType.IQ3_S,
    "FP16": GGMLType.F16,
    "FP32": GGMLType.F32,
} | {kind.name: kind for kind in sorted(GGMLType, key=lambda kind: len(kind.name))}


def needed(choice: Choice) -> int:
    """About how many bytes a model takes while it runs on this machine; on a CPU, the file's."""
    before, after = (1.0, 1.0)
    if not device().keeps_blocks:
        before, after = _bits(choice.label.upper().removeprefix("UD-"))
    return int(choice.size * after / before * _RUNNING)


def fits(choice: Choice) -> bool:
    """Whether this machine has the memory to run a model; True if the memory is unknown."""
    room = machine_memory()
    return not room or needed(choice) <= room


def announcement(name: HubName, choice: Choice, missing: int) -> str:
    """Line to print before a download: its size, and the memory the model will take."""
    here = choice.size - missing
    kept = f", {size_text(here)} of it here already" if here else ""
    room = machine_memory()
    of = f" of the {size_text(room)} that this machine has for models" if room else ""
    what = f"{choice.label} of {name.repo}" if choice.first else name.repo
    return (
        f"downloading {what}, {size_text(choice.size)}{kept}; "
        f"it runs in about {size_text(needed(choice))}{of}"
    )


def warning(choice: Choice, others: Sequence[Choice]) -> str | None:
    """Warning for a model that is too large, with the largest of ``others`` that fits; or None."""
    if fits(choice):
        return None
    smaller = max(filter(fits, others), key=lambda other: other.size, default=None)
    advice = (
        f"the largest of this repository that does is {smaller.label} ({size_text(smaller.size)})"
        if smaller
        else "look for a smaller quantisation or model"
    )
    return f"warning: {choice.label or 'it'} does not fit this machine's memory; {advice}"


@cache
def _bits(label: str) -> tuple[float, float]:
    """Bits per weight in the file and on a GPU; equal for an unknown type."""
    names = [name for name in _TYPES if label.startswith(name)]
    if not names:
        return 16.0, 16.0
    kind = _TYPES[max(names, key=len)]
    mixed = kind.name.startswith("IQ") or "_K" in kind.name
    shares = {kind: 1 - _FINER_SHARE, _FINER: _FINER_SHARE} if mixed else {kind: 1.0}
    if kind is _FINER:
        shares = {kind: 1.0}
    policy = Policy("near", "float16")
    before = sum(share * source_bits(each) for each, share in shares.items())
    after = sum(share * _held(each, policy) for each, share in shares.items())
    return before, after


def _held(kind: GGMLType, policy: Policy) -> float:
    expected = expected_layout(kind, policy, module=True)
    return expected.layout.bits_per_weight if expected else source_bits(kind)
