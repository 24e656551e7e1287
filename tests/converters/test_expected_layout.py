"""What the estimate expects of each type is what the encoder does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from converters.gguf.reader import read_gguf
from converters.gguf.types import GGMLType
from converters.quantize.encode import encode, expected_layout, least_bits, supported
from converters.quantize.policy import POLICIES, Policy


@pytest.mark.parametrize("half", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("policy", POLICIES)
def test_on_real_quantizations(oracle: Path, policy: str, half: str) -> None:
    """One tensor of each type, quantized by llama.cpp."""
    tensors = {}
    for path in sorted((oracle / "quants").glob("*.gguf")):
        for tensor in read_gguf(path).tensors:
            tensors.setdefault((tensor.type, len(tensor.shape) > 1), tensor)
    assert len(tensors) > 25
    bound = Policy(policy, half)
    with ThreadPoolExecutor(2) as pool:
        for (kind, module), tensor in tensors.items():
            expected = expected_layout(kind, bound, module=module)
            found = encode(tensor, bound, module=module, pool=pool)
            assert expected is not None
            assert expected.layout == found.layout, kind.name
            # A float tensor may happen to hold only values that the smaller type has, too.
            assert expected.fidelity == found.fidelity or found.fidelity == "exact", kind.name
            taken, least = found.layout.bits_per_weight, least_bits(kind, bound, module=module)
            assert 0.6 * taken < least <= taken, kind.name


@pytest.mark.parametrize("kind", GGMLType)
def test_only_types_without_weights_have_none(kind: GGMLType) -> None:
    expected = expected_layout(kind, Policy("near"), module=True)
    assert (expected is not None) == supported(kind)
