"""A model that one thread has loaded runs in any other, also where the first never computed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import conformance.skeleton as conformance
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from mlxrun.loader import load_model

#: One of each kind of constant that a model may keep in addition to its weights.
KINDS = (
    "arcee-tied", "bloom-560m", "deepseek2-lite", "falcon-h1-500m", "gemma3-windows",
    "gpt-oss-small", "gpt2-small", "granitemoe-ten", "llama-factors", "mamba2-130m",
    "mistral3-warm", "olmo-clipped", "phi2-turning", "phi3-partial",
    "qwen3next-80b", "qwen2moe-gqa", "stablelm-biased",
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_another_thread_computes_with_a_fresh_model(tmp_path: Path, name: str) -> None:
    path = conformance.read(name).write(tmp_path / "x.gguf")
    model = load_model(read_gguf(path), dtype="float32").model

    def compute(_: int) -> np.ndarray:
        return np.array(model(mx.array([[5, 6, 7]]), model.make_cache()))

    results = []
    for _ in range(2):  # each in a thread of its own, one after the other
        with ThreadPoolExecutor(1) as pool:
            results.append(pool.submit(compute, 0).result())
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(results[0], compute(0))


def test_no_thread_outlives_a_load_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("converters.convert.Converted.named_arrays", full)
    before = set(threading.enumerate())
    with pytest.raises(MemoryError) as failure:
        load_model(read_gguf(Tiny().write(tmp_path / "x.gguf")))
    assert set(threading.enumerate()) <= before, failure
