"""Checkpoints of mlx-lm's classes: packed, half, damaged, hostile, and of several towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm_models import CONFIGS, save, stock, stock_logits
from tiny_models import nmse

import mlxrun
from mlxrun.errors import (
    CheckpointError,
    MlxrunError,
    ParameterError,
    UnsupportedArchitectureError,
)
from mlxrun.loader import definition, load_model
from mlxrun.models.config import ModelConfig
from mlxrun.models.mlx_lm import fill, named_arrays
from mlxrun.models.transformer import Transformer
from mlxrun.weights.parameters import Parameters

TOKENS = [int(t) for t in np.random.default_rng(4).integers(3, 288, 24)]


def logits(path: Path, dtype: str | None = None) -> np.ndarray:
    model = load_model(path, dtype=dtype).model
    return np.array(model(mx.array([TOKENS]), model.make_cache())[0].astype(mx.float32))


def quantized(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Pack a model's modules, some in one way and some in another, and say so in its config."""
    section: dict[str, Any] = {"group_size": 32, "bits": 4, "mode": "affine"}

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        if "o_proj" in path or "out_proj" in path:
            section[path] = {"group_size": 32, "bits": 8, "mode": "affine"}
        elif "up_proj" in path:
            section[path] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        return section.get(path, True)

    nn.quantize(model, 32, 4, class_predicate=form)
    return config | {"quantization": section}


@pytest.mark.parametrize("name", ["falcon_h1", "lfm2_moe", "qwen3_5"])
@pytest.mark.parametrize("expand", [True, False])
def test_packed_modules_give_mlx_lms_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expand: bool
) -> None:
    monkeypatch.setattr("mlxrun.loader.expands", lambda *_, **__: (expand, "asked for"))
    model = stock(CONFIGS[name])
    config = quantized(CONFIGS[name], model)
    save(tmp_path, config, model, tokenizer=False)
    loaded = load_model(tmp_path)
    arrays = named_arrays(loaded.model.module)
    assert any(key.endswith(".scales") for key in arrays) is not expand
    assert nmse(logits(tmp_path), stock_logits(model, [TOKENS])) < (1e-8 if expand else 1e-12)
    assert loaded.unused == []


@pytest.mark.parametrize("name", CONFIGS)
def test_the_names_of_a_module_pass_its_renaming_unchanged(name: str) -> None:
    # What a converter writes has the module's own names, and mlx-lm renames it again.
    model = stock(CONFIGS[name])
    before = named_arrays(model)
    after = model.sanitize(dict(before)) if hasattr(model, "sanitize") else before
    assert before.keys() == after.keys()
    assert all(np.array_equal(np.array(before[n]), np.array(after[n])) for n in before)


def test_rates_of_states_stay_precise_unless_that_makes_everything_float32(tmp_path: Path) -> None:
    for name, rates in (("mamba2", mx.float32), ("mamba", mx.bfloat16)):
        path = save(tmp_path / name, CONFIGS[name], stock(CONFIGS[name]), tokenizer=False)
        model = load_model(path, dtype="bfloat16").model
        memory = model.make_cache()
        arrays = named_arrays(model.module)
        assert {a.dtype for n, a in arrays.items() if n.endswith("A_log")} == {rates}
        assert {a.dtype for n, a in arrays.items() if not n.endswith("A_log")} == {mx.bfloat16}
        for tokens in (TOKENS, TOKENS[:1]):
            assert model(mx.array([tokens]), memory).dtype == mx.bfloat16


def test_plain_experts_in_half_precision_on_the_cpu_are_refused(tmp_path: Path) -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU computes them")
    save(tmp_path, CONFIGS["lfm2_moe"], stock(CONFIGS["lfm2_moe"]), tokenizer=False)
    with pytest.raises(ParameterError, match="float32"):
        load_model(tmp_path, dtype="float16")


@pytest.fixture
def mamba2(tmp_path: Path) -> Path:
    return save(tmp_path, CONFIGS["mamba2"], stock(CONFIGS["mamba2"]), tokenizer=False)


def rewrite(path: Path, change: Any) -> None:
    file = path / "model.safetensors"
    arrays = dict(mx.load(str(file)))
    change(arrays)
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays)


def configure(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_a_missing_parameter_is_named_with_similar_ones(mamba2: Path) -> None:
    def change(arrays: dict[str, mx.array]) -> None:
        arrays["other.weight"] = arrays.pop("backbone.norm_f.weight")

    rewrite(mamba2, change)
    with pytest.raises(CheckpointError, match=r"no backbone.norm_f.weight; they have other.weight"):
        load_model(mamba2)


def test_a_shape_that_contradicts_the_config_is_named(mamba2: Path) -> None:
    rewrite(mamba2, lambda arrays: arrays.update({"backbone.norm_f.weight": mx.ones(65)}))
    with pytest.raises(CheckpointError, match=r"norm_f.weight has the shape \(65,\).*\(64,\)"):
        load_model(mamba2)


def test_parameters_that_the_class_does_not_use_are_reported(mamba2: Path) -> None:
    rewrite(mamba2, lambda arrays: arrays.update({"stray.weight": mx.ones(3)}))
    assert load_model(mamba2).unused == ["stray.weight"]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None}, {"num_heads": "eight"}, {"num_heads": 0}, {"n_groups": 3},
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 3}, {"time_step_limit": 5},
        {"vocab_size": -1}, {"conv_kernel": 0}, {"num_hidden_layers": 0},
    ],
)  # fmt: skip
def test_impossible_configs_are_typed_errors(mamba2: Path, changes: dict[str, Any]) -> None:
    configure(mamba2, **changes)
    with pytest.raises(MlxrunError):
        load_model(mamba2)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3n", {"altup_active_idx": 10**9}), ("gemma3n", {"sliding_window": 0}),
        ("gemma4", {"num_key_value_heads": 0}), ("gemma4", {"sliding_window": float("nan")}),
    ],
)  # fmt: skip
def test_numbers_that_mlx_does_not_check_are_refused_before_it_sees_them(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    config = CONFIGS[name]
    path = save(tmp_path, config, stock(config))
    configure(path, text_config=config["text_config"] | changes)
    with pytest.raises(CheckpointError, match=r"does not describe a|impossible"):
        mlxrun.load(path)


def test_a_missing_key_is_named(mamba2: Path) -> None:
    config = json.loads((mamba2 / "config.json").read_text())
    del config["state_size"]
    (mamba2 / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="state_size"):
        load_model(mamba2)


def test_code_of_a_directory_is_never_run(mamba2: Path) -> None:
    (mamba2 / "evil.py").write_text("raise SystemExit('ran')")
    configure(mamba2, model_file="evil.py")
    with pytest.raises(UnsupportedArchitectureError, match=r"asks to run 'evil\.py'"):
        load_model(mamba2)


@pytest.mark.parametrize(
    "kind",
    ["../evil", "os", "mlx_lm.utils", "..utils", "cache", "base", "switch_layers", "a.b", "", 7,
     None, ["mamba2"], "mamba2\0", "__init__"],
)  # fmt: skip
def test_a_model_type_imports_nothing_but_models(kind: Any) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="is not supported"):
        definition({"model_type": kind})


def test_mlx_lms_other_names_are_known_and_ours_come_first() -> None:
    found = definition({"model_type": "falcon_mamba"})
    assert found
    assert found[0].__module__ == "mlx_lm.models.mamba"
    assert isinstance(definition(CONFIGS["helium"] | {"model_type": "llama"}), ModelConfig)


def test_the_error_of_an_unknown_type_names_the_nearest() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'mamba9'.*mamba"):
        definition({"model_type": "mamba9"})


def test_conv_weights_as_torch_has_them_are_turned(mamba2: Path) -> None:
    expected = logits(mamba2)

    def change(arrays: dict[str, mx.array]) -> None:
        for name in arrays:
            if "conv1d.weight" in name:
                arrays[name] = mx.contiguous(arrays[name].swapaxes(1, 2))

    rewrite(mamba2, change)
    assert np.array_equal(logits(mamba2), expected)


def test_text_of_a_model_with_a_vision_tower(tmp_path: Path) -> None:
    config = CONFIGS["gemma4"]
    model = stock(config)
    save(tmp_path, config, model, tokenizer=False)

    def change(arrays: dict[str, mx.array]) -> None:
        # As the original repository has them.
        for name in list(arrays):
            inner = name.removeprefix("language_model.model.")
            arrays[f"model.language_model.{inner}"] = arrays.pop(name)
        arrays["model.vision_tower.patch.weight"] = mx.ones((4, 4))

    rewrite(tmp_path, change)
    loaded = load_model(tmp_path)
    assert np.array_equal(logits(tmp_path), stock_logits(model, [TOKENS]))
    assert loaded.unused == ["model.vision_tower.patch.weight"]


def test_wrappers_of_our_families_are_ours(tmp_path: Path) -> None:
    config = {
        "model_type": "mistral3",
        "text_config": CONFIGS["helium"] | {"model_type": "mistral"},
    }
    model = stock(config)
    save(tmp_path, config, model, tokenizer=False)
    rewrite(tmp_path, lambda arrays: arrays.update({"vision_tower.x.weight": mx.ones((4, 4))}))
    assert isinstance(load_model(tmp_path).model, Transformer)
    assert nmse(logits(tmp_path), stock_logits(model, [TOKENS])) < 1e-8


def test_a_matrix_that_the_class_keeps_plain_is_unpacked() -> None:
    model = stock(CONFIGS["nemotron_h"])
    module = "backbone.layers.3.mixer.gate"  # a class of its own, which is never packed
    arrays = named_arrays(model)
    parts = mx.quantize(arrays[f"{module}.weight"], group_size=32, bits=8)
    names = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
    packed = dict(zip(names, parts, strict=True))
    fill(model, Parameters(arrays | packed, {}, mx.float32))
    found = np.array(named_arrays(model)[f"{module}.weight"])
    expected = np.array(mx.dequantize(*parts, group_size=32, bits=8))
    assert np.array_equal(found, expected)
