"""Head counts that do not divide what they count are refused, not computed with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import conformance.skeleton as conformance
from converters.gguf.reader import read_gguf
from mlxrun.errors import GGUFError
from mlxrun.loader import load_model


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("plamo-13b", {"attention.head_count_kv": 5}),
        ("plamo-13b", {"attention.head_count": 10}),
        ("smollm3-eight", {"attention.head_count": 64}),
        ("llama4-scout", {"attention.head_count_kv": 3}),
    ],
)
def test_refused(tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    skeleton = conformance.read(name)
    changed = dataclasses.replace(skeleton, keys={**skeleton.keys, **keys})
    with pytest.raises(GGUFError, match=r"head_count|attn_"):
        load_model(read_gguf(changed.write(tmp_path / "x.gguf")), dtype="float32")
