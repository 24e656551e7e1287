"""Directories of models that only mlx-lm defines: quantized as its classes want it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm_models import CONFIGS, save, stock
from tiny_models import nmse

import mlxrun
from mlxrun.errors import CheckpointError
from mlxrun.loader import load_model

TOKENS = mx.array([[1, *range(5, 285, 7)]])
# State-space, hybrid, mixtures whose routers keep 8 bits, a text model of a larger one.
NAMES = ("mamba2", "jamba", "qwen3_next", "lfm2_moe", "gemma4")


def ours(path: Path) -> np.ndarray:
    loaded = load_model(path, dtype="float32")
    assert loaded.unused == []
    return np.array(loaded.model(TOKENS, loaded.model.make_cache())[0])


def theirs(path: Path) -> np.ndarray:
    from mlx_lm.utils import load_model as load_stock

    model, _ = load_stock(path)
    model.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    return np.array(model(TOKENS)[0])


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_they_load_in_both(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = save(tmp_path / "m", CONFIGS[name], stock(CONFIGS[name]))
    report = mlxrun.convert(path, tmp_path / "out", dtype="float32", **options)
    assert ("requantized" in report.fidelity()) == bool(options)
    assert nmse(ours(tmp_path / "out"), theirs(tmp_path / "out")) < 1e-6
    if not options:
        assert np.array_equal(ours(tmp_path / "out"), ours(path))


def test_routers_keep_the_bits_that_their_class_wants(tmp_path: Path) -> None:
    path = save(tmp_path / "m", CONFIGS["qwen3_next"], stock(CONFIGS["qwen3_next"]))
    report = mlxrun.convert(
        path, tmp_path / "out", bits=3, group_size=32, keep="layers.1.mlp.gate=6"
    )
    forms = {t.target: t.form for t in report.tensors if t.target.endswith("mlp.gate.weight")}
    assert set(forms.values()) == {"affine8 g64 float16", "affine6 g32 float16"}
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert section["bits"] == 3
    assert {form["bits"] for form in section.values() if isinstance(form, dict)} == {6, 8}


def test_packed_ones_stay_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "m", CONFIGS["mamba2"], stock(CONFIGS["mamba2"]))
    mlxrun.convert(path, tmp_path / "four", bits=4, group_size=32)
    report = mlxrun.convert(tmp_path / "four", tmp_path / "copy")
    assert set(report.fidelity()) == {"exact"}
    assert np.array_equal(ours(tmp_path / "copy"), ours(tmp_path / "four"))


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "m", CONFIGS["mamba2"], stock(CONFIGS["mamba2"]))
    arrays = dict(mx.load(str(path / "model.safetensors")))  # type: ignore[arg-type]
    mx.eval(arrays)
    gone = next(name for name in arrays if name.endswith("norm_f.weight"))
    del arrays[gone]
    mx.save_safetensors(str(path / "model.safetensors"), arrays)
    with pytest.raises(CheckpointError, match=gone.rpartition(".")[0]):
        mlxrun.convert(path, tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()
