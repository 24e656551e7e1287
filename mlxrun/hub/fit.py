"""How much memory a model will take here, from its files' names and sizes: before a download.

What the tensors are is known only once the file is here; ``mlxrun inspect`` tells that. A
quantisation's name says which type most of them have, and the converter which form that type gets.

The memory plan of :mod:`mlxrun.planning` is of no use yet: keys, values and scratch follow from
layers, heads and widths, which stand in the header of a file that has not been downloaded. So they
are taken for a share of the weights, and loading asks the plan as soon as there is a header.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from converters.estimate import expected_layout
from converters.gguf.types import GGMLType
from converters.policy import Policy, source_bits
from mlxrun.hub.choice import Choice, size_text
from mlxrun.hub.names import HubName
from mlxrun.memory import machine_memory, on_cpu

# Caches of a few thousand tokens, and what a step needs besides: a tenth of the weights.
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
    """About how many bytes a model takes while it runs on this machine.

    On the CPU it stays as it is in its file, but for families of which only the file tells.
    """
    before, after = (1.0, 1.0) if on_cpu() else _bits(choice.label.upper().removeprefix("UD-"))
    return int(choice.size * after / before * _RUNNING)


def fits(choice: Choice) -> bool:
    """Whether this machine has the memory to run a model; yes where the system does not say."""
    room = machine_memory()
    return not room or needed(choice) <= room


def announcement(name: HubName, choice: Choice, missing: int) -> str:
    """What to tell before a download: its size, and what it will take of this machine's memory."""
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
    """What to tell of a model that is too large; None of one that fits.

    Args:
        choice: what will be downloaded.
        others: the models of the same repository.
    """
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
    """Bits a weight in the file, and on a GPU; the same of both for what has no known type."""
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
