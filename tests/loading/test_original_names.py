"""Original repositories load directly and convert; mlx-lm's own loading of them is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from original_names import (
    CONFIGS,
    INV_FREQ,
    MIXTRAL,
    SAME,
    VISION,
    Undo,
    both,
    fused,
    parameters,
    renamed,
    save_arrays,
    stock,
    whole_latent,
    with_extra,
)
from tiny_models import nmse

import mlxrun
from converters.huggingface.names import normalize, text_config
from converters.huggingface.reader import read_config, weight_files
from converters.huggingface.weights import read_weights
from mlxrun.errors import CheckpointError
from mlxrun.loader import load_model

TOKENS = mx.array([[1, *range(5, 285, 7)]])


def agree(name: str, ours: np.ndarray, expected: np.ndarray) -> bool:
    """Float noise; gemma's GELU is rounded to half precision as ggml does it, mlx-lm's is not."""
    return nmse(ours, expected) < (1e-6 if name.startswith("gemma") else 1e-9)


# Name: (config, what its repository looks like, whether mlx-lm reads that).
SOURCES: dict[str, tuple[str, Undo, bool]] = {
    "llama": ("llama", INV_FREQ, True),
    "mixtral": ("mixtral", MIXTRAL, True),
    "mixtral fused": (
        "mixtral",
        both(
            fused("experts.gate_up_proj", "experts.down_proj"),
            lambda arrays: {n.replace(".block_sparse_moe.", ".mlp."): a for n, a in arrays.items()},
        ),
        False,
    ),
    "qwen2_moe": ("qwen2_moe", SAME, True),
    "qwen3_moe": ("qwen3_moe", SAME, True),
    "qwen3_moe fused": (
        "qwen3_moe",
        fused("experts.gate_up_proj", "experts.down_proj"),
        False,
    ),
    "qwen3_moe fused the other way": (
        "qwen3_moe",
        fused("experts.gate_up_proj", "experts.down_proj", turned=True),
        False,
    ),
    "olmoe": ("olmoe", SAME, True),
    "granitemoe": (
        "granitemoe",
        fused("input_linear.weight", "output_linear.weight"),
        True,
    ),
    "gpt_oss": (
        "gpt_oss",
        fused("experts.gate_up_proj", "experts.down_proj", turned=True, interleaved=True),
        False,
    ),
    "deepseek_v2": ("deepseek_v2", SAME, True),
    "deepseek_v3": ("deepseek_v3", both(SAME, whole_latent), True),
    "deepseek": ("deepseek", SAME, True),
    "dots1": ("dots1", SAME, True),
    "glm4_moe": ("glm4_moe", SAME, True),
    "gemma3": ("gemma3", with_extra(*VISION), True),
    "gemma3 of transformers 5": (
        "gemma3",
        both(renamed("language_model.model.", "model.language_model."),
             with_extra(*(f"model.{name}" for name in VISION))),
        False,
    ),
    "mistral3": ("mistral3", with_extra(*VISION), True),
    "mistral3 of transformers 5": (
        "mistral3",
        both(renamed("language_model.lm_head.", "lm_head."),
             renamed("language_model.model.", "model.language_model.")),
        True,
    ),
}  # fmt: skip


def logits(path: Path) -> np.ndarray:
    loaded = load_model(path, dtype="float32")
    assert loaded.unused == []
    return np.array(loaded.model(TOKENS, loaded.model.make_cache())[0])


def theirs(path: Path) -> np.ndarray:
    from mlx_lm.utils import load_model as load_stock

    model, _ = load_stock(path)
    return plain(model)


def plain(model: nn.Module) -> np.ndarray:
    model.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    return np.array(model(TOKENS)[0])


def source(path: Path, name: str, dtype: mx.Dtype = mx.float32, *, judged: bool = False) -> Path:
    """A repository; or, where mlx-lm does not read that, the same weights under its names."""
    kind, undo, readable = SOURCES[name]
    arrays = parameters(stock(CONFIGS[kind], dtype))
    if kind == "gemma3":  # the embedding is the head
        del arrays["language_model.lm_head.weight"]
    return save_arrays(path, CONFIGS[kind], undo(arrays) if readable or not judged else arrays)


@pytest.mark.parametrize("name", SOURCES)
def test_original_repositories_load_directly(tmp_path: Path, name: str) -> None:
    expected = theirs(source(tmp_path / "judge", name, judged=True))
    assert agree(name, logits(source(tmp_path / "m", name)), expected)


@pytest.mark.parametrize("name", SOURCES)
def test_original_repositories_convert(tmp_path: Path, name: str) -> None:
    path = source(tmp_path / "m", name, mx.bfloat16)
    report = mlxrun.convert(path, tmp_path / "out", bits=4, group_size=32)
    assert {t.fidelity for t in report.tensors} == {"exact", "requantized"}
    assert agree(name, logits(tmp_path / "out"), theirs(tmp_path / "out"))
    copied = mlxrun.convert(path, tmp_path / "copy")
    assert {t.fidelity for t in copied.tensors} == {"exact"}
    assert np.array_equal(logits(tmp_path / "copy"), logits(path))


def row_major(path: Path) -> dict[str, bool]:
    """Which weights of a repository lie row by row in memory, under our names."""
    config = text_config(read_config(path))
    weights = read_weights(weight_files(path), config)
    normalize(config, weights)
    return {
        name: np.array(array, copy=False).flags.c_contiguous
        for name, array in weights.arrays.items()
    }


@pytest.mark.parametrize("name", SOURCES)
def test_weights_of_original_repositories_lie_row_by_row(tmp_path: Path, name: str) -> None:
    found = row_major(source(tmp_path / "m", name))
    assert [name for name, right in found.items() if not right] == []


def experts_in_blocks(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """MXFP4 experts as gpt-oss ships them: gate and up interleaved, bytes by group, and scales."""
    found = {}
    for name, array in arrays.items():
        base, _, kind = name.rpartition(".")
        if ".experts." not in name:
            found[name] = array
            continue
        if base.endswith("up_proj"):
            continue
        if base.endswith("gate_proj"):
            up = arrays[name.replace("gate_proj", "up_proj")]
            array = mx.stack([array, up], axis=2).flatten(1, 2)
            base = base.replace("gate_proj", "gate_up_proj")
        if kind == "weight":
            raw = array.view(mx.uint8)
            array = raw.reshape(*raw.shape[:-1], -1, 16)
        found[base + {"weight": "_blocks", "scales": "_scales", "bias": "_bias"}[kind]] = array
    return found


def gpt_oss(path: Path, dtype: mx.Dtype = mx.bfloat16) -> tuple[Path, dict[str, mx.array]]:
    model = stock(CONFIGS["gpt_oss"], dtype)
    nn.quantize(
        model,
        group_size=32,
        bits=4,
        mode="mxfp4",
        class_predicate=lambda name, module: (
            ".experts." in name and hasattr(module, "to_quantized")
        ),
    )
    arrays = parameters(model)
    config = CONFIGS["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4"}}
    return save_arrays(path, config, experts_in_blocks(arrays)), arrays


def test_the_blocks_of_gpt_oss_stay_bit_for_bit(tmp_path: Path) -> None:
    path, arrays = gpt_oss(tmp_path / "m")
    assert nmse(logits(path), theirs(path)) < 1e-9
    for number, options in enumerate(({}, {"bits": 8}, {"bits": 4, "keep": "router=float"})):
        report = mlxrun.convert(path, tmp_path / f"{number}", **options)  # type: ignore[arg-type]
        experts = [t for t in report.tensors if "_blocks" in t.name]
        assert {(t.type, t.form, t.fidelity, t.rmse) for t in experts} == {
            ("mxfp4", "mxfp4", "exact", 0.0)
        }
        stored = mx.load(str(tmp_path / f"{number}" / "model.safetensors"))
        assert isinstance(stored, dict)
        packed = [name for name in arrays if arrays[name].dtype in (mx.uint32, mx.uint8)]
        assert packed
        assert all(bool(mx.array_equal(stored[name], arrays[name])) for name in packed)
        assert nmse(logits(tmp_path / f"{number}"), theirs(tmp_path / f"{number}")) < 1e-9


def test_the_blocks_of_gpt_oss_lie_row_by_row(tmp_path: Path) -> None:
    found = row_major(gpt_oss(tmp_path / "m", mx.float16)[0])
    assert [name for name, right in found.items() if not right] == []


def test_the_blocks_of_gpt_oss_become_what_is_asked_of_them(tmp_path: Path) -> None:
    path, _ = gpt_oss(tmp_path / "m")
    report = mlxrun.convert(path, tmp_path / "out", bits=4, keep="experts=3/32")
    experts = [t for t in report.tensors if "_blocks" in t.name]
    assert {(t.form, t.fidelity) for t in experts} == {("affine3 g32 bfloat16", "requantized")}
    assert nmse(logits(tmp_path / "out"), theirs(tmp_path / "out")) < 1e-9


def fp8(path: Path, arrays: dict[str, mx.array], config: dict[str, Any], block: int) -> Path:
    """Matrices as eight-bit floats with a scale per block."""
    found = {}
    draw = np.random.default_rng(2)
    for name, array in arrays.items():
        found[name] = array
        if not name.endswith("_proj.weight") or array.ndim != 2:
            continue
        rows, columns = array.shape
        scale = draw.uniform(1e-3, 2e-3, (-(-rows // block), -(-columns // block)))
        each = np.kron(scale, np.ones((block, block)))[:rows, :columns].astype(np.float32)
        found[name] = mx.to_fp8(array.astype(mx.float32) / mx.array(each))
        found[f"{name}_scale_inv"] = mx.array(scale.astype(np.float32))
    return save_arrays(path, config, found)


@pytest.mark.parametrize("block", [128, 32])
def test_eight_bit_floats_of_deepseek_are_decoded(tmp_path: Path, block: int) -> None:
    config = CONFIGS["deepseek_v3"] | {"hidden_size": 160, "intermediate_size": 200}
    arrays = both(SAME, whole_latent)(parameters(stock(config, mx.bfloat16)))
    how = {"quant_method": "fp8", "weight_block_size": [block, block]}
    path = fp8(tmp_path / "m", arrays, config | {"quantization_config": how}, block)
    report = mlxrun.convert(path, tmp_path / "out", bits=8, group_size=32)
    assert {t.type for t in report.tensors} == {"float8_e4m3", "bfloat16"}
    assert nmse(logits(tmp_path / "out"), theirs(tmp_path / "out")) < 1e-9
    if block == 128:  # the size that mlx-lm takes for granted
        judge = fp8(tmp_path / "judge", arrays, config, block)
        assert nmse(logits(path), theirs(judge)) < 1e-8
    assert nmse(logits(tmp_path / "out"), logits(path)) < 1e-2


def test_eight_bit_floats_with_one_scale(tmp_path: Path) -> None:
    arrays = parameters(stock(CONFIGS["llama"], mx.bfloat16))
    name = "model.layers.0.mlp.up_proj.weight"
    coded = arrays | {
        name: mx.to_fp8(arrays[name].astype(mx.float32) * 100),
        f"{name}_scale_inv": mx.array(0.01, mx.bfloat16),
        "model.layers.0.mlp.up_proj.activation_scale": mx.array(1.0),
    }
    how = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    path = save_arrays(tmp_path / "m", CONFIGS["llama"] | how, coded)
    scale = mx.array(0.01, mx.bfloat16).astype(mx.float32)
    plain = arrays | {name: mx.from_fp8(coded[name], dtype=mx.float32) * scale}
    expected = logits(save_arrays(tmp_path / "plain", CONFIGS["llama"], plain))
    assert nmse(logits(path), expected) < 1e-4


LAYER = "model.layers.0"
DAMAGE: dict[str, tuple[str, Undo, str]] = {
    "an expert is missing": (
        "mixtral",
        lambda a: {n: x for n, x in MIXTRAL(a).items() if not n.endswith("experts.2.w1.weight")},
        "expert 2 of model.layers.0.block_sparse_moe",
    ),
    "an expert of another shape": (
        "qwen3_moe",
        lambda a: SAME(a) | {"model.layers.0.mlp.experts.1.up_proj.weight": mx.zeros((48, 60))},
        "differ in shape",
    ),
    "experts one by one and stacked": (
        "qwen3_moe",
        lambda a: a | SAME(a),
        r"both model.layers.\d.mlp.experts.0.* and model.layers.\d.mlp.switch_mlp",
    ),
    "fused experts of another shape": (
        "qwen3_moe",
        lambda a: fused("experts.gate_up_proj", "experts.down_proj")(a)
        | {"model.layers.1.mlp.experts.gate_up_proj": mx.zeros((4, 97, 64))},
        "do not agree|implies",
    ),
    "blocks without scales": (
        "gpt_oss",
        lambda a: a | {f"{LAYER}.mlp.experts.down_proj_blocks": mx.zeros((4, 64, 2, 16), mx.uint8)},
        "no scales that fit",
    ),
    "a latent of another shape": (
        "deepseek_v3",
        lambda a: whole_latent(SAME(a)) | {f"{LAYER}.self_attn.kv_b_proj.weight": mx.zeros((7, 5))},
        "do not agree",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_repositories_say_what_is_wrong(tmp_path: Path, name: str) -> None:
    kind, undo, match = DAMAGE[name]
    path = save_arrays(tmp_path / "m", CONFIGS[kind], undo(parameters(stock(CONFIGS[kind]))))
    with pytest.raises(CheckpointError, match=match):
        load_model(path)
    with pytest.raises(CheckpointError, match=match):
        mlxrun.convert(path, tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()
