"""Every architecture against llama.cpp's logits, however its tokens are put through the caches."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conformance.measure import SAME, left_out, load, logits
from oracle_models import SKELETONS, expected, write_skeleton
from tiny_models import nmse

from mlxrun.kv_cache.sliding_window import RotatingCache

#: Skeletons with windows, all of 32 tokens: which layers see everything, and how many there are.
WINDOWED = {
    "cohere2": ({3}, 5),
    "gemma2": ({1, 3}, 4),
    "gemma3": ({5}, 7),
    "gpt-oss": ({1, 3}, 4),
    "olmo3-window": ({3}, 5),
}


@pytest.fixture(scope="module", params=SKELETONS)
def skeleton(
    request: pytest.FixtureRequest, oracle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    name: str = request.param
    return name, write_skeleton(oracle, name, tmp_path_factory.mktemp("skeleton") / f"{name}.gguf")


def test_logits_are_llama_cpps(oracle: Path, skeleton: tuple[str, Path]) -> None:
    name, path = skeleton
    loaded = load(path)
    assert left_out(loaded) == []
    tokens, wanted = expected(oracle, f"logits/{name}")
    assert len(tokens) == 160
    for chunks in ([160], [1, 7, 1, 1, 64, 2, 33, 51], [120, *[1] * 40]):
        assert nmse(logits(loaded.model, tokens, chunks), wanted) <= SAME


def test_half_precision_stays_half_and_near(oracle: Path, skeleton: tuple[str, Path]) -> None:
    name, path = skeleton
    model = load(path, "bfloat16").model
    tokens, wanted = expected(oracle, f"logits/{name}")
    cache = model.make_cache()
    got = model(mx.array([tokens]), cache)
    assert got.dtype == mx.bfloat16
    assert {array.dtype for memory in cache for array in memory.state} == {mx.bfloat16}
    # Random experts are near each other: rounding sends a token to others now and then.
    assert nmse(np.array(got[0].astype(mx.float32)), wanted) < 2e-2


def test_windowed_layers_cache_their_window_only(skeleton: tuple[str, Path]) -> None:
    name, path = skeleton
    cache = load(path).model.make_cache()
    everything = {i for i, memory in enumerate(cache) if not isinstance(memory, RotatingCache)}
    assert (everything, len(cache)) == WINDOWED.get(name, ({*range(len(cache))}, len(cache)))
