"""Projections fused into one product equal each alone, and take no memory twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Tiny

from converters.huggingface.reader import read_config, weight_files
from converters.huggingface.weights import read_weights
from converters.quantize.layout import Layout, affine, dense, fixed
from mlxrun.conversion import convert
from mlxrun.models.families import model_config
from mlxrun.models.transformer import Transformer
from mlxrun.weights.linear import MLXWeight, Projection, fuse, separate
from mlxrun.weights.lora import LoRA
from mlxrun.weights.parameters import Parameters

COLUMNS = 64
LAYOUTS = [
    dense("float32"),
    dense("float16"),
    affine(4, 32, "float32"),
    affine(4, 32, "float16"),
    affine(6, 32, "float32"),
    fixed("mxfp4"),
]


def _projection(layout: Layout, rows: int, biased: bool, seed: int) -> Projection:
    rng = np.random.default_rng(seed)
    plain = mx.array(rng.standard_normal((rows, COLUMNS)).astype(np.float32))
    bias = mx.array(rng.standard_normal(rows).astype(np.float32)) if biased else None
    if not layout.quantized:
        return Projection(MLXWeight(layout, plain.astype(getattr(mx, layout.dtype))), bias)
    codes, scales, *rest = mx.quantize(
        plain, group_size=layout.group_size, bits=layout.bits, mode=layout.mode
    )
    if not rest:
        return Projection(MLXWeight(layout, codes, scales), bias)
    dtype = getattr(mx, layout.dtype)
    return Projection(MLXWeight(layout, codes, scales.astype(dtype), rest[0].astype(dtype)), bias)


@st.composite
def projections(draw: st.DrawFn) -> list[Projection]:
    count = draw(st.integers(1, 4))
    return [
        _projection(
            draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, 40)), draw(st.booleans()), seed
        )
        for seed in range(count)
    ]


@given(projections(), st.integers(1, 9))
def test_fused_projections_give_what_each_gives_alone(made: list[Projection], tokens: int) -> None:
    x = mx.array(np.random.default_rng(9).standard_normal((2, tokens, COLUMNS)), mx.float32)
    split, views = fuse(made)
    for ours, alone, view in zip(split(x), separate(made)(x), views, strict=True):
        assert ours.shape == alone.shape
        tolerance = 1e-4 * float(mx.abs(alone).max())
        np.testing.assert_allclose(np.array(ours), np.array(alone), atol=tolerance)
        np.testing.assert_allclose(np.array(view.product(x)), np.array(alone), atol=tolerance)
    assert [view.weight.rows for view in views] == [each.weight.rows for each in made]


def test_what_agrees_is_joined_and_what_differs_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (_projection(affine(4, 32, "float32"), 8, False, seed) for seed in range(2))
    v = _projection(affine(6, 32, "float32"), 8, False, 2)
    factored = replace(q, weight=replace(q.weight, factor=mx.ones((1,))))
    built: list[int] = []
    product = MLXWeight.product

    def counted(self: MLXWeight, bias: mx.array | None = None) -> Any:
        built.append(self.rows)
        return product(self, bias)

    monkeypatch.setattr(MLXWeight, "product", counted)
    fuse([q, v, k])
    fuse([factored, q, k])
    assert built == [16, 8, 8, 16]


def _parameters(folder: Path, **options: Any) -> Parameters:
    weights = read_weights(weight_files(folder), read_config(folder))
    return Parameters(weights.arrays, weights.layouts, mx.float32, **options)


def _logits(model: Transformer) -> np.ndarray:
    return np.array(model(mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]), model.make_cache()))


@pytest.mark.parametrize(
    "tiny",
    [
        Tiny(biases=("attn_q", "attn_k", "attn_v"), arch="qwen2"),
        Tiny(kinds={"*": "Q4_0"}),
        Tiny(kinds={"*": "Q4_0", "blk.0.attn_v.weight": "Q8_0", "blk.1.ffn_up.weight": "Q5_0"}),
        Tiny(arch="qwen3", kinds={"blk.0.attn_q.weight": "Q8_0"}),
    ],
)
def test_a_model_with_fused_projections_is_the_same_model(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    convert(tiny.write(tmp_path / "m.gguf"), folder, policy="near")
    config = model_config(read_config(folder))
    alone = Transformer(config, _parameters(folder, fuse=False))
    fused = Transformer(config, _parameters(folder, fuse=True))
    assert fused.module_bytes == alone.module_bytes
    np.testing.assert_allclose(_logits(fused), _logits(alone), rtol=1e-4, atol=1e-5)


def test_adapted_projections_stay_apart_and_count(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    convert(Tiny().write(tmp_path / "m.gguf"), folder, policy="near")
    config = model_config(read_config(folder))
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.standard_normal(size), mx.float32) for size in ((2, 64), (64, 2)))
    updates = {"model.layers.0.self_attn.q_proj": [LoRA("test", a, b, 1.0)]}
    alone = Transformer(config, _parameters(folder, fuse=False, updates=updates))
    fused = Transformer(config, _parameters(folder, fuse=True, updates=updates))
    plain = Transformer(config, _parameters(folder, fuse=True))
    np.testing.assert_allclose(_logits(fused), _logits(alone), rtol=1e-4, atol=1e-5)
    assert np.abs(_logits(fused) - _logits(plain)).max() > 1e-2


@pytest.mark.parametrize(("join", "expand"), [(True, False), (True, True), (False, True)])
def test_no_more_than_a_layer_is_in_memory_twice(join: bool, expand: bool, tmp_path: Path) -> None:
    folder, layers = tmp_path / "model", 8
    tiny = Tiny(hidden=128, ffn=512, layers=layers, kinds={"*": "Q8_0"})
    convert(tiny.write(tmp_path / "m.gguf"), folder, policy="near")
    config = model_config(read_config(folder))
    params = _parameters(folder, fuse=join, expand=expand)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = Transformer(config, params)
    params.settle()
    assert not params.arrays
    peak = mx.get_peak_memory() - before
    assert model.nbytes <= peak < model.nbytes * (1 + 2 / layers)


def test_a_weight_is_handed_out_once() -> None:
    params = Parameters({"a.weight": mx.zeros((2, 3)), "b.weight": mx.zeros(2)}, {}, mx.float32)
    params.linear("a", 2, 3)
    assert params.unused() == ["b.weight"]
    assert params.used == {"a.weight"}
