"""Metadata to ``config.json``: defaults, rotary scalings, and values per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import Tiny

from converters.architectures.rope import (
    llama3_factors,
    longrope_attention_factor,
    yarn_attention_factor,
    yarn_factors,
)
from converters.errors import GGUFError
from converters.gguf.source import open_gguf


def config_of(tmp_path: Path, model: Tiny) -> dict[str, Any]:
    return open_gguf(model.write(tmp_path / "x.gguf")).config


def llama31(dims: int, factor: float = 8.0, base: float = 500000.0) -> np.ndarray:
    """The factors of Llama 3.1 as its own description spells them, wavelength by wavelength."""
    factors = []
    for i in range(0, dims, 2):
        wavelength = 2 * np.pi * base ** (i / dims)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_keys_are_spelt_as_hugging_face_spells_them(tmp_path: Path) -> None:
    model = Tiny(arch="qwen3", head_dim=32, tied=True, keys={"rope.freq_base": 1e6})
    config = config_of(tmp_path, model)
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    expected = {
        "model_type": "qwen3", "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert "rope_scaling" not in config


OPTIONAL = ("attention.head_count_kv", "rope.dimension_count", "rope.freq_base", "vocab_size")


@pytest.mark.parametrize("key", OPTIONAL)
def test_optional_keys_have_llama_cpps_defaults(tmp_path: Path, key: str) -> None:
    whole = config_of(tmp_path, Tiny(kv_heads=4))
    assert config_of(tmp_path, Tiny(kv_heads=4, keys={key: None})) == whole


def test_values_per_layer_that_agree_are_one_value(tmp_path: Path) -> None:
    arrays = {"attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]}
    assert config_of(tmp_path, Tiny(keys=arrays)) == config_of(tmp_path, Tiny())


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_a_bias_in_any_layer_is_a_bias(tmp_path: Path, layers: tuple[int, ...]) -> None:
    config = config_of(tmp_path, Tiny(biases=("attn_v",), bias_layers=layers))
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is False
    config = config_of(tmp_path, Tiny(biases=("ffn_up",), bias_layers=layers))
    assert config["attention_bias"] is False
    assert config["mlp_bias"] is True


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("dim", [64, 128])
def test_llama_3_factors_are_recognized(tmp_path: Path, factor: float, dim: int) -> None:
    model = Tiny(head_dim=dim, keys={"rope.freq_base": 5e5}, rope_freqs=llama31(dim, factor))
    assert config_of(tmp_path, model)["rope_scaling"] == {
        "rope_type": "llama3", "type": "llama3", "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


def test_other_factors_are_written_out(tmp_path: Path) -> None:
    factors = llama31(32)
    factors[9] *= np.float32(1.0001)
    model = Tiny(head_dim=32, keys={"rope.freq_base": 5e5}, rope_freqs=factors)
    scaling = config_of(tmp_path, model)["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    np.testing.assert_array_equal(np.array(scaling["long_factor"], np.float32), factors)
    assert longrope_attention_factor(2048, scaling["original_max_position_embeddings"]) == 1


@pytest.mark.parametrize("attention", [0.8, 1.0, 1.7])
@pytest.mark.parametrize("factor", [2.0, 40.0])
def test_yarn_keeps_its_attention_factor(tmp_path: Path, attention: float, factor: float) -> None:
    """What queries and keys are multiplied by: attn_factor * (1 + 0.1 ln factor)."""
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.attn_factor": attention,
    }
    scaling = config_of(tmp_path, Tiny(keys=keys))["rope_scaling"]
    assert scaling["original_max_position_embeddings"] == 2048
    expected = attention * (1 + 0.1 * np.log(factor))
    assert yarn_attention_factor(scaling) == pytest.approx(expected, rel=1e-6)


def test_an_original_context_of_zero_is_none(tmp_path: Path) -> None:
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 0,
    }
    scaling = config_of(tmp_path, Tiny(keys=keys))["rope_scaling"]
    assert scaling["original_max_position_embeddings"] == 2048


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
        {"rope.scaling.type": "linear"},
        {"rope.scaling.factor": 0.0},
    ],
)
def test_scalings_that_scale_nothing_are_left_out(tmp_path: Path, keys: dict[str, Any]) -> None:
    assert "rope_scaling" not in config_of(tmp_path, Tiny(keys=keys))


def test_llama3_factors_by_wavelength() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    np.testing.assert_allclose(llama3_factors(128, 5e5, scaling), llama31(128), rtol=1e-6)


@pytest.mark.parametrize("dims", [8, 64, 128])
def test_yarn_leaves_fast_dimensions_and_stretches_slow_ones(dims: int) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 4096}
    factors = yarn_factors(dims, 10000.0, scaling)
    turns = 4096 / (2 * np.pi * 10000.0 ** (np.arange(0, dims, 2) / dims))
    assert (factors[turns > 32 * 10000 ** (2 / dims)] == 1).all()
    assert (factors[turns < 10000 ** (-2 / dims)] == 4).all()
    assert (np.diff(factors) >= 0).all()


@pytest.mark.parametrize("width", [1, 7, 15])
def test_heads_of_an_odd_width_cannot_be_rotated(tmp_path: Path, width: int) -> None:
    with pytest.raises(GGUFError, match=f"even width.*{width}"):
        config_of(tmp_path, Tiny(head_dim=width))
