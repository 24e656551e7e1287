"""Adapters of the parts of projections that a model has fused, and the other way round."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapter_files import write_directory
from conformance.skeleton import read as read_skeleton
from tiny_models import Tiny, nmse

import mlxrun
from converters.gguf.reader import read_gguf
from mlxrun.errors import AdapterError
from mlxrun.loader import load_model
from mlxrun.weights.adapters import AdapterChoice

SAME = 1e-10
TOKENS = np.random.default_rng(5).integers(3, 120, 30).tolist()
LAYER = "model.layers.1."
Pair = tuple[np.ndarray, np.ndarray]


def pair(name: str, rows: int, columns: int) -> Pair:
    rng = np.random.default_rng([*name.encode()])
    return rng.standard_normal((3, columns)) / 8, rng.standard_normal((rows, 3)) / 4


def write(path: Path, pairs: dict[str, Pair], lengths: dict[str, np.ndarray] | None = None) -> Path:
    """An adapter in mlx-lm's format, which has both matrices turned."""
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"{LAYER}{name}.lora_a"] = mx.array(a.T, mx.float32)
        tensors[f"{LAYER}{name}.lora_b"] = mx.array(b.T, mx.float32)
    for name, each in (lengths or {}).items():
        tensors[f"{LAYER}{name}.m"] = mx.array(each, mx.float32)
    config = {"fine_tune_type": "dora" if lengths else "lora"}
    settings = {"rank": 3, "scale": 1.5, "dropout": 0.0}
    return write_directory(
        path, "adapters.safetensors", tensors, config | {"lora_parameters": settings}
    )


def logits(path: Path, adapter: AdapterChoice = (), dtype: str = "float32") -> np.ndarray:
    if path.is_dir():
        model = load_model(path, dtype=dtype, adapter=adapter).model
    else:
        model = load_model(read_gguf(path), dtype=dtype, adapter=adapter).model
    return np.array(model(mx.array([TOKENS]), model.make_cache())[0].astype(mx.float32))


@pytest.fixture
def phi3(tmp_path: Path) -> Path:
    """48 wide, four heads of 12, 68 between the projections."""
    return read_skeleton("phi3-mha").write(tmp_path / "phi3.gguf")


def padded(b: np.ndarray, first: int, rows: int) -> np.ndarray:
    return np.pad(b, ((first, rows - first - len(b)), (0, 0)))


@pytest.mark.parametrize(
    ("part", "first", "whole", "rows"),
    [
        ("self_attn.q_proj", 0, "self_attn.qkv_proj", (48, 144)),
        ("self_attn.k_proj", 48, "self_attn.qkv_proj", (48, 144)),
        ("self_attn.v_proj", 96, "self_attn.qkv_proj", (48, 144)),
        ("mlp.gate_proj", 0, "mlp.gate_up_proj", (68, 136)),
        ("mlp.up_proj", 68, "mlp.gate_up_proj", (68, 136)),
    ],
)
def test_a_part_is_some_rows_of_the_whole(
    phi3: Path, tmp_path: Path, part: str, first: int, whole: str, rows: tuple[int, int]
) -> None:
    a, b = pair(part, rows[0], 48)
    own = write(tmp_path / "part", {part: (a, b)})
    all_rows = write(tmp_path / "whole", {whole: (a, padded(b, first, rows[1]))})
    found = logits(phi3, own)
    assert nmse(found, logits(phi3, all_rows)) < SAME
    assert nmse(found, logits(phi3)) > 1e-3
    mlxrun.convert(phi3, tmp_path / "out", policy="exact", adapter=own)
    assert nmse(logits(tmp_path / "out"), found) < SAME
    for wrong in (rows[0] - 1, rows[1]):
        with pytest.raises(AdapterError, match=f"expected {rows[0]} rows for {LAYER}{part}"):
            logits(phi3, write(tmp_path / "wrong", {part: pair(part, wrong, 48)}))


def test_a_stretched_part_leaves_the_other_rows_as_they_are(phi3: Path, tmp_path: Path) -> None:
    a, b = pair("k", 48, 48)
    lengths = np.random.default_rng(0).uniform(0.5, 2, 48)
    adapter = write(tmp_path / "a", {"self_attn.k_proj": (a, b)}, {"self_attn.k_proj": lengths})
    mlxrun.convert(phi3, tmp_path / "out", policy="exact", adapter=adapter)
    mlxrun.convert(phi3, tmp_path / "plain", policy="exact")
    name = f"{LAYER}self_attn.qkv_proj.weight"
    merged, plain = (
        np.array(mx.load(str(next((tmp_path / d).glob("*.safetensors"))))[name])
        for d in ("out", "plain")
    )
    adapted = plain[48:96] + 1.5 * b @ a
    adapted *= (lengths / np.linalg.norm(adapted, axis=1))[:, None]
    np.testing.assert_allclose(merged[48:96], adapted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        np.delete(merged, np.s_[48:96], 0), np.delete(plain, np.s_[48:96], 0)
    )
    assert nmse(logits(phi3, adapter), logits(tmp_path / "out")) < SAME


def test_parts_take_their_rows_of_a_whole(tmp_path: Path) -> None:
    base = Tiny(arch="qwen3", head_dim=16).write(tmp_path / "x.gguf")
    (a, b), (c, d) = pair("qkv", 128, 64), pair("both", 192, 64)
    whole = write(tmp_path / "a", {"self_attn.qkv_proj": (a, b), "mlp.gate_up_proj": (c, d)})
    places = {"self_attn.q": (0, 64), "self_attn.k": (64, 96), "self_attn.v": (96, 128)}
    parts = {f"{name}_proj": (a, b[slice(*place)]) for name, place in places.items()}
    parts |= {"mlp.gate_proj": (c, d[:96]), "mlp.up_proj": (c, d[96:])}
    found = logits(base, whole)
    assert nmse(found, logits(base, write(tmp_path / "b", parts))) < SAME
    assert nmse(found, logits(base)) > 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_comes_near(phi3: Path, tmp_path: Path, dtype: str) -> None:
    adapter = write(tmp_path / "a", {"self_attn.qkv_proj": pair("x", 144, 48)})
    rough = nmse(logits(phi3, dtype=dtype), logits(phi3))
    assert nmse(logits(phi3, adapter, dtype), logits(phi3, adapter)) < 10 * rough
