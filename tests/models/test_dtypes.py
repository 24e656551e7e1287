"""The dtypes of a half-precision run, operation by operation: nothing is silently float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cache_configs import caching
from tiny_models import Tiny, nmse

from converters.gguf.reader import read_gguf
from mlxrun import convert
from mlxrun.loader import load_model
from mlxrun.models.transformer import Transformer

HALVES = {"float16": mx.float16, "bfloat16": mx.bfloat16}
WIDE: dict[str, Any] = {"hidden": 256, "ffn": 256, "heads": 4, "kv_heads": 2}
BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")
MIXED = {
    "*": "Q4_K",
    "output.weight": "Q6_K",
    "blk.0.attn_q.weight": "F16",
    "blk.0.attn_k.weight": "BF16",
    "blk.0.attn_v.weight": "F32",
    "blk.0.ffn_up.weight": "MXFP4",
    "blk.1.ffn_down.weight": "IQ4_XS",
}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
MODELS = {
    "plain": Tiny(biases=BIASES),
    "mixed": Tiny(**WIDE, kinds=MIXED, biases=BIASES),
    "tied": Tiny(**WIDE, kinds={"*": "Q8_0"}, tied=True),
    "yarn": Tiny(keys=YARN),
    "factors": Tiny(rope_freqs=np.linspace(1, 4, 8)),
    "qwen3": Tiny(arch="qwen3", head_dim=32, kinds={"*": "Q5_0"}),
}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[mx.Dtype]]]:
    """Stand-ins for MLX's fused operations that note the dtypes of what they are given.

    A GPU runs each as one kernel with float32 inside; a CPU spells them out in float32, which would
    drown what is looked for. The stand-ins keep shapes and depend on every argument.
    """
    seen: list[tuple[str, set[mx.Dtype]]] = []

    def note(name: str, *arrays: mx.array | None) -> None:
        seen.append((name, {a.dtype for a in arrays if a is not None}))

    def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        note("rms_norm", x, weight)
        return x * weight

    def rope(x: mx.array, dims: int, **options: Any) -> mx.array:
        note("rope", x)
        assert options["freqs"] is None or options["freqs"].dtype == mx.float32
        return -x

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None
    ) -> mx.array:
        note("attention", q, k, v, sinks)
        assert not isinstance(mask, mx.array) or mask.dtype == mx.bool_
        return q * scale + k.sum() + v.sum()

    monkeypatch.setattr(mx.fast, "rms_norm", rms_norm)
    monkeypatch.setattr(mx.fast, "rope", rope)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    return seen


def dtypes_of(function: Callable[[mx.array], mx.array], tokens: mx.array) -> dict[str, set[str]]:
    """The floating dtypes that each kind of primitive of a graph returns."""
    found: dict[str, set[str]] = {}

    def visit(node: dict[str, Any]) -> None:
        if node["type"] != "primitive":
            return
        for _, _, dtype in node["outputs"]:
            if mx.issubdtype(dtype, mx.floating):
                found.setdefault(node["name"], set()).add(str(dtype))

    mx.export_function(visit, function, tokens)
    return found


def assert_all(model: Transformer, dtype: mx.Dtype, fused: list[tuple[str, set[mx.Dtype]]]) -> None:
    for window in (None, 4):
        cache = model.make_cache(caching(window=window, keep=1))
        for tokens in (12, 3, 1, 1):
            ids = mx.array([list(range(5, 5 + tokens))])
            found = dtypes_of(lambda t, cache=cache: model(t, cache), ids)
            assert {"Matmul", "QuantizedMatmul"} & set(found)
            assert {kind: kinds for kind, kinds in found.items() if kinds != {str(dtype)}} == {}
        for memory in cache:
            assert [array.dtype for array in memory.state] == [dtype, dtype]
    assert {name for name, _ in fused} == {"rms_norm", "rope", "attention"}
    assert {d for _, dtypes in fused for d in dtypes} == {dtype}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_a_half_precision_run_is_half_precision_throughout(
    tmp_path: Path, fused: list[tuple[str, set[mx.Dtype]]], name: str, half: str
) -> None:
    source = MODELS[name].write(tmp_path / "x.gguf")
    for policy in ("near", "compact", "exact"):
        model = load_model(read_gguf(source), dtype=half, policy=policy).model
        assert_all(model, HALVES[half], fused)
        fused.clear()
        convert(source, tmp_path / policy, policy=policy)
        assert_all(load_model(tmp_path / policy, dtype=half).model, HALVES[half], fused)
        fused.clear()


@pytest.mark.parametrize("half", HALVES)
def test_half_precision_logits_are_near_float32_ones(tmp_path: Path, half: str) -> None:
    gguf = read_gguf(MODELS["mixed"].write(tmp_path / "x.gguf"))
    ids = mx.array([list(range(5, 45))])
    wide, narrow = (
        load_model(gguf, dtype=dtype, policy="near").model for dtype in ("float32", half)
    )
    got = narrow(ids, narrow.make_cache())
    assert got.dtype == HALVES[half]
    error = nmse(np.array(got.astype(mx.float32)), np.array(wide(ids, wide.make_cache())))
    assert error < {"float16": 1e-4, "bfloat16": 1e-2}[half]


def test_float32_is_the_choice_on_a_cpu(tmp_path: Path) -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("this machine has a GPU")
    loaded = load_model(read_gguf(MODELS["mixed"].write(tmp_path / "x.gguf")))
    assert loaded.model.dtype == mx.float32
