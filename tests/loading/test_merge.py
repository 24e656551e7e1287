"""Merged models against the same adapters applied in addition to the weights."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapter_files import write_mlx_lm
from gguf_adapters import CASES, write, write_adapter
from mlx_lm.utils import load_model as load_stock
from tiny_models import Tiny, nmse

import mlxrun
from converters.gguf.reader import read_gguf
from mlxrun.errors import AdapterError
from mlxrun.loader import load_model
from mlxrun.weights.adapters import AdapterChoice

SAME = 1e-10
TOKENS = np.random.default_rng(5).integers(3, 120, 40).tolist()
MODULES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"]


def logits(path: Path, adapter: AdapterChoice = ()) -> np.ndarray:
    if path.is_dir():
        model = load_model(path, dtype="float32", adapter=adapter).model
    else:
        model = load_model(read_gguf(path), dtype="float32", adapter=adapter).model
    return np.array(model(mx.array([TOKENS]), model.make_cache())[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "mixtral", "gpt-oss"])
def test_exactly_merged_is_applied(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    base, one = write(case, tmp_path)
    _, two = write(case, tmp_path, seed=1)
    both = [(one, case.strength), (two, -0.5)]
    report = mlxrun.convert(base, tmp_path / "out", policy="exact", adapter=both)
    assert nmse(logits(tmp_path / "out"), logits(base, both)) < SAME
    assert report.fidelity()["merged"] == len(_merged(report)) > 2
    if name != "gemma3":  # whose activation we round as llama.cpp does
        model, _ = load_stock(tmp_path / "out")
        assert nmse(np.array(model(mx.array([TOKENS]))[0]), logits(tmp_path / "out")) < 1e-8


def _merged(report: mlxrun.ConversionReport) -> list[str]:
    return [record.target for record in report.tensors if record.fidelity == "merged"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_kind_of_adapter_can_be_merged(tmp_path: Path, kind: str) -> None:
    base = Tiny().write(tmp_path / "x.gguf")
    mlxrun.convert(base, tmp_path / "plain", policy="exact")
    keys = [*MODULES, "model.embed_tokens", "lm_head"]
    one = write_mlx_lm(tmp_path / "plain", tmp_path / "one", keys, kind=kind)
    two = write_mlx_lm(tmp_path / "plain", tmp_path / "two", keys[1:], kind="lora", seed=1)
    both = [(one, 0.75), two]
    mlxrun.convert(base, tmp_path / "out", policy="exact", adapter=both)
    assert nmse(logits(tmp_path / "out"), logits(base, both)) < SAME


def test_a_full_fine_tune_can_be_merged(tmp_path: Path) -> None:
    base = Tiny().write(tmp_path / "x.gguf")
    rng = np.random.default_rng(0)
    new = {
        "model.layers.1.mlp.up_proj.weight": mx.array(rng.standard_normal((96, 64)) / 8),
        "model.norm.weight": mx.array(rng.uniform(0.5, 2, 64)),
    }
    (tmp_path / "a").mkdir()
    new = {name: array.astype(mx.float32) for name, array in new.items()}
    mx.save_safetensors(str(tmp_path / "a" / "adapters.safetensors"), new)
    (tmp_path / "a" / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    report = mlxrun.convert(base, tmp_path / "out", policy="exact", adapter=tmp_path / "a")
    assert sorted(_merged(report)) == sorted(new)
    assert nmse(logits(tmp_path / "out"), logits(base, tmp_path / "a")) < SAME


@pytest.mark.parametrize("policy", ["exact", "near", "compact"])
def test_the_reported_error_is_against_the_exact_sum(tmp_path: Path, policy: str) -> None:
    sizes = {"hidden": 256, "ffn": 512, "layers": 1}
    base = Tiny(**sizes, kinds={"*": "Q4_0"}).write(tmp_path / "x.gguf")
    shapes = {f"blk.0.{name}.weight": (256, 256) for name in ("attn_q", "attn_output")}
    adapter = write_adapter(tmp_path / "a.gguf", "llama", shapes)
    options = {"adapter": [(adapter, 0.5)]}
    mlxrun.convert(base, tmp_path / "exact", policy="exact", **options)
    report = mlxrun.convert(base, tmp_path / "out", policy=policy, **options)
    assert len(_merged(report)) == 2
    whole, kept = load_model(tmp_path / "exact"), load_model(tmp_path / "out")
    assert nmse(logits(tmp_path / "exact"), logits(base, [(adapter, 0.5)])) < SAME
    assert kept.config["quantization"]["bits"] == 4
    expected, _ = load_stock(tmp_path / "exact")
    found, _ = load_stock(tmp_path / "out")
    for name in ("q_proj", "o_proj"):
        (record,) = [r for r in report.tensors if r.target.endswith(f"{name}.weight")]
        ours = found.layers[0].self_attn[name]
        exact = np.array(expected.layers[0].self_attn[name].weight.astype(mx.float32))
        plain = ours.weight
        if "scales" in ours:
            scales, biases = (ours[k].astype(mx.float32) for k in ("scales", "biases"))
            plain = mx.dequantize(plain, scales, biases, ours.group_size, ours.bits)
        difference = np.array(plain.astype(mx.float32)) - exact
        rmse = np.sqrt((difference**2).sum() / (exact**2).sum())
        assert record.rmse == pytest.approx(rmse, rel=1e-3, abs=1e-9)
        limit = {"exact": (0, 32), "near": (0.01, 9), "compact": (0.2, 5)}[policy]
        assert record.rmse <= limit[0]
        assert record.bits_after <= limit[1]
    assert whole.unused == kept.unused == []


def test_adapters_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = Tiny().write(tmp_path / "x.gguf")
    for name, shape in (("blk.9.attn_q.weight", (64, 64)), ("blk.0.attn_k.weight", (64, 64))):
        adapter = write_adapter(tmp_path / "a.gguf", "llama", {name: shape})
        with pytest.raises(AdapterError, match="made for this very model"):
            mlxrun.convert(base, tmp_path / "out", adapter=adapter)
        assert not (tmp_path / "out").exists()
    (tmp_path / "b").mkdir()
    mx.save_safetensors(
        str(tmp_path / "b" / "adapters.safetensors"), {"model.norm.weight": mx.ones(63)}
    )
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full"}))
    with pytest.raises(AdapterError, match=r"model.norm.weight has the shape .63,."):
        mlxrun.convert(base, tmp_path / "out", adapter=tmp_path / "b")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_merged_into_directories(tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    mlxrun.convert(Tiny(layers=1).write(tmp_path / "x.gguf"), base, policy="exact")
    keys = [*MODULES, "model.embed_tokens"]
    one = write_mlx_lm(base, tmp_path / "one", keys, kind=kind, layers=1)
    expected = logits(base, [(one, 0.5)])
    report = mlxrun.convert(base, tmp_path / "out", dtype="float32", adapter=[(one, 0.5)])
    assert report.fidelity()["merged"] == len(keys)
    assert nmse(logits(tmp_path / "out"), expected) < SAME
    # Packed weights stay packed, at the cost that the report states.
    mlxrun.convert(base, tmp_path / "packed", bits=8, group_size=32, dtype="float32")
    report = mlxrun.convert(tmp_path / "packed", tmp_path / "merged", adapter=one)
    assert len(_merged(report)) == len(keys)
    assert {r.form for r in report.tensors if r.fidelity == "merged"} == {"affine8 g32 float32"}
    assert all(0 < (r.rmse or 0) < 0.01 for r in report.tensors if r.fidelity == "merged")
    assert nmse(logits(tmp_path / "merged"), logits(tmp_path / "packed", one)) < 1e-3
    with pytest.raises(AdapterError, match="no such module"):
        other = write_adapter(tmp_path / "a.gguf", "llama", {"blk.9.attn_q.weight": (64, 64)})
        mlxrun.convert(base, tmp_path / "none", adapter=other)
    assert not (tmp_path / "none").exists()
