"""gpt-oss with MXFP4 experts: exact, in MLX's own mode, and no larger than its file."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from oracle_models import expected
from tiny_models import nmse

from converters.convert import stream
from converters.gguf.reader import read_gguf
from converters.gguf.source import gguf_tensors, open_gguf
from converters.quantize.policy import Policy
from mlxrun import convert
from mlxrun.loader import Loaded, load_model


@pytest.fixture(scope="module")
def source(oracle: Path) -> Path:
    return oracle / "quants" / "gpt-oss-MXFP4.gguf"


def logits(loaded: Loaded, tokens: list[int]) -> np.ndarray:
    model = loaded.model
    return np.array(model(mx.array([tokens]), model.make_cache())[0].astype(mx.float32))


def test_experts_are_exact_and_in_mlxs_mode(source: Path) -> None:
    file = read_gguf(source)
    wanted = {t.name: t for t in gguf.GGUFReader(str(source)).tensors}
    seen = 0
    for converted in stream(
        gguf_tensors(open_gguf(file).names, Policy("near", "float32", narrow=True))
    ):
        if converted.record is None or "_exps.weight" not in converted.record.name:
            continue
        assert converted.layout.mode == "mxfp4"
        arrays = {
            name.rsplit(".", 1)[-1]: mx.array(np.ascontiguousarray(array))
            for name, array, _ in converted.named_arrays()
        }
        got = mx.dequantize(
            arrays["weight"], arrays["scales"], group_size=32, bits=4, mode="mxfp4",
            dtype=mx.float32,
        )  # fmt: skip
        tensor = wanted[converted.record.name]
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(np.array(got), plain.reshape(got.shape))
        seen += 1
    assert seen == 12


@pytest.mark.parametrize("policy", [None, "exact", "near"])
def test_logits_are_those_of_the_weights(oracle: Path, source: Path, policy: str | None) -> None:
    tokens, wanted = expected(oracle, "quants/gpt-oss-MXFP4")
    loaded = load_model(read_gguf(source), dtype="float32", policy=policy)
    assert nmse(logits(loaded, tokens), wanted) <= 1e-8


def test_an_exact_directory_has_the_same_logits(oracle: Path, source: Path, tmp_path: Path) -> None:
    tokens, wanted = expected(oracle, "quants/gpt-oss-MXFP4")
    convert(source, tmp_path / "out", policy="exact")
    assert nmse(logits(load_model(tmp_path / "out", dtype="float32"), tokens), wanted) <= 1e-8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_loaded_model_is_as_large_as_its_file(source: Path, dtype: str) -> None:
    loaded = load_model(read_gguf(source), dtype=dtype)
    assert loaded.model.nbytes <= 1.05 * source.stat().st_size


def test_in_float32_scales_stay_as_narrow_as_they_are(source: Path, tmp_path: Path) -> None:
    """Half of this file is Q8_0: its float16 scales stay, with biases that follow from them."""
    loaded = load_model(read_gguf(source), dtype="float32", policy="near")
    assert loaded.model.nbytes <= 1.05 * source.stat().st_size
    convert(source, tmp_path / "out")
    directory = load_model(tmp_path / "out", dtype="float32").model
    assert directory.nbytes <= 1.05 * source.stat().st_size
