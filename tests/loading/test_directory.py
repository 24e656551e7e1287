"""Model directories as Hugging Face and mlx-lm write them, and damaged ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import Tiny, nmse, random_blocks

from converters.gguf.reader import read_gguf
from mlxrun import convert
from mlxrun.cli.inspection import inspect_model
from mlxrun.errors import CheckpointError, MlxrunError, ParameterError, UnsupportedArchitectureError
from mlxrun.loader import load_model, open_model
from mlxrun.memory.device import SHARE
from mlxrun.weights.adapters import read_adapters

TOKENS = mx.array([[1, *range(5, 285, 7)]])
BASE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "llama tied": BASE | {"tie_word_embeddings": True},
    "llama biases": BASE | {"attention_bias": True, "mlp_bias": True},
    "llama head_dim": BASE | {"head_dim": 32},
    "llama3": BASE
    | {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama linear": BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen2": BASE | {"model_type": "qwen2"},
    "qwen2 yarn": BASE
    | {
        "model_type": "qwen2",
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
        },
    },
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
}  # fmt: skip


def stock(config: dict[str, Any], dtype: mx.Dtype = mx.float32) -> nn.Module:
    """mlx-lm's own model of a config, with seeded weights, norms and biases included."""
    from mlx_lm.utils import _get_classes

    mx.random.seed(7)
    kind, arguments = _get_classes(config)
    model = kind(arguments.from_dict(config))
    weights = [
        (name, (a + 0.1 * mx.random.normal(a.shape) if a.ndim == 1 else a).astype(dtype))
        for name, a in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    return model  # type: ignore[no-any-return]


def save(path: Path, config: dict[str, Any], model: nn.Module, shards: int = 1) -> Path:
    """Write a directory as ``save_pretrained`` would."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    weights = tree_flatten(model.parameters())
    if shards == 1:
        mx.save_safetensors(str(path / "model.safetensors"), dict(weights))
        return path
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(weights[number::shards])
        mx.save_safetensors(str(path / name), part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def logits(path: Path, dtype: str = "float32") -> np.ndarray:
    model = load_model(path, dtype=dtype).model
    return np.array(model(TOKENS, model.make_cache())[0].astype(mx.float32))


def expected(model: nn.Module) -> np.ndarray:
    model.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    return np.array(model(TOKENS)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_directories_give_mlx_lms_logits(tmp_path: Path, name: str) -> None:
    model = stock(CONFIGS[name])
    assert nmse(logits(save(tmp_path / "m", CONFIGS[name], model)), expected(model)) < 1e-9


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_half_precision_directories(tmp_path: Path, dtype: mx.Dtype, shards: int) -> None:
    model = stock(BASE, dtype)
    path = save(tmp_path / "m", BASE, model, shards)
    assert nmse(logits(path), expected(model)) < 1e-9


MODES: dict[str, dict[str, Any]] = {
    "4 bits": {"group_size": 64, "bits": 4},
    "3 bits": {"group_size": 32, "bits": 3},
    "8 bits": {"group_size": 32, "bits": 8},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama tied", "llama biases", "qwen3"])
@pytest.mark.parametrize("mode", MODES)
def test_quantized_directories(
    tmp_path: Path, mode: str, name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:  # as where memory is short or on a GPU
        monkeypatch.setenv(SHARE, "0")
    model = stock(CONFIGS[name])
    nn.quantize(model, **MODES[mode])
    config = CONFIGS[name] | {"quantization": MODES[mode]}
    assert nmse(logits(save(tmp_path / "m", config, model)), expected(model)) < 1e-9


@pytest.mark.parametrize("section", ["quantization", "quantization_config"])
def test_modules_quantized_each_in_its_way(tmp_path: Path, section: str) -> None:
    own: dict[str, Any] = {
        "model.layers.0.self_attn.q_proj": {"group_size": 32, "bits": 8},
        "model.layers.1.mlp.down_proj": MODES["mxfp4"],
        "lm_head": False,
        "model.layers.0.mlp.up_proj": False,
    }
    common = MODES["4 bits"]
    model = stock(BASE)

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        choice: bool | dict[str, Any] = own.get(path, common)
        return choice

    nn.quantize(model, class_predicate=form)
    path = save(tmp_path / "m", BASE | {section: common | own}, model)
    assert nmse(logits(path), expected(model)) < 1e-9


OWN = "model.layers.1.mlp.down_proj"
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no bits": ({"group_size": 64, "bits": 8}, {"group_size": 32}),
    "no group size": ({"group_size": 32, "bits": 3}, {"bits": 8}),
    "no mode": (MODES["mxfp4"], {"group_size": 64, "bits": 8}),
    "a mode alone": ({"group_size": 64, "bits": 8}, {"mode": "mxfp4"}),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", PARTIAL)
def test_what_a_modules_own_entry_leaves_out(
    tmp_path: Path, name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm takes its mode's defaults; so do loader, memory plan and report."""
    from mlx_lm.utils import load_model as load_stock

    if packed:
        monkeypatch.setenv(SHARE, "0")
    common, own = PARTIAL[name]
    model = stock(BASE)
    shapes = {n: a.shape for n, a in tree_flatten(model.parameters())}

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return own if path == OWN else hasattr(module, "to_quantized")

    nn.quantize(model, **common, class_predicate=form)
    path = save(tmp_path / "m", BASE | {"quantization": common | {OWN: own}}, model)
    assert nmse(logits(path), expected(load_stock(path)[0])) < 1e-9
    assert open_model(path).storage().nbytes == load_model(path).model.nbytes
    facts = inspect_model(path, context=None)
    assert {t["name"]: tuple(t["shape"]) for t in facts["tensors"]} == shapes


def test_mlx_lms_own_conversion_of_ours(tmp_path: Path) -> None:
    """GGUF to a directory, which mlx-lm quantizes, which is loaded again."""
    import mlx_lm

    convert(Tiny().write(tmp_path / "x.gguf"), tmp_path / "ours", policy="exact")
    mlx_lm.convert(str(tmp_path / "ours"), str(tmp_path / "theirs"), quantize=True, q_group_size=32)
    model, _ = mlx_lm.load(str(tmp_path / "theirs"))
    assert load_model(tmp_path / "theirs").unused == []
    assert nmse(logits(tmp_path / "theirs"), expected(model)) < 1e-9


def test_unused_parameters_are_named(tmp_path: Path) -> None:
    model = stock(BASE)
    path = save(tmp_path / "m", BASE, model)
    extra = {"model.layers.0.self_attn.rotary_emb.extra": mx.zeros(8)}
    mx.save_safetensors(str(path / "model-extra.safetensors"), extra)
    loaded = load_model(path)
    assert loaded.unused == list(extra)


Damage = Callable[[Path], object]


def config_with(**changes: Any) -> Damage:
    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))

    return apply


def config_without(key: str) -> Damage:
    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        del config[key]
        (path / "config.json").write_text(json.dumps(config))

    return apply


def arrays_with(**changes: mx.array | None) -> Damage:
    """``a__b`` stands for ``a.b``; None removes an array."""

    def apply(path: Path) -> None:
        arrays = dict(mx.load(str(path / "model.safetensors")))
        mx.eval(arrays)
        for name, array in changes.items():
            if array is None:
                del arrays[name.replace("__", ".")]
            else:
                arrays[name.replace("__", ".")] = array
        mx.save_safetensors(str(path / "model.safetensors"), arrays)

    return apply


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pipe(path: Path) -> None:
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")


NORM = "model__layers__1__input_layernorm__weight"
UP = "model__layers__1__mlp__up_proj__weight"
UP_SCALES = "model__layers__1__mlp__up_proj__scales"
Q_BIAS = "model__layers__0__self_attn__q_proj__bias"
DAMAGE: dict[str, tuple[Damage, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda p: (p / "config.json").write_text("{"), "cannot read"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), r"no model\*\.safetensors"),
    "cut short": (cut, "model.safetensors|cannot read"),
    "not safetensors": (lambda p: (p / "model.safetensors").write_bytes(b"x" * 99), "cannot read"),
    "index names a missing file": (
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
        "lacks b",
    ),
    "index leads out of the directory": (
        lambda p: (p / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../m/model.safetensors"}}'
        ),
        "no file of this directory",
    ),
    "index names what no file is called": (
        lambda p: (p / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "a" * 5000}})
        ),
        "no file of this directory",
    ),
    "config is nested without end": (
        lambda p: (p / "config.json").write_text("[" * 100_000),
        "cannot read",
    ),
    "config is a pipe": (pipe, "no config.json"),
    "as many layers as can be counted": (config_with(num_hidden_layers=2**40), "from 1 to 512"),
    "index is not an index": (
        lambda p: (p / "model.safetensors.index.json").write_text("[]"),
        "index.json is not a JSON object",
    ),
    "missing key": (config_without("hidden_size"), "hidden_size"),
    "zero heads": (config_with(num_attention_heads=0), "heads|impossible"),
    "odd heads": (config_with(num_key_value_heads=3), "4 heads cannot share 3"),
    "a word for a number": (config_with(num_hidden_layers="two"), "impossible"),
    "a missing matrix": (arrays_with(**{UP: None}), r"layers\.1\.mlp\.up_proj\.weight"),
    "a missing norm": (arrays_with(**{NORM: None}), r"layers\.1\.input_layernorm\.weight"),
    "more layers than weights": (config_with(num_hidden_layers=3), r"layers\.2\."),
    "a matrix of another shape": (arrays_with(**{UP: mx.zeros((128, 60))}), r"up_proj"),
    "a norm of another shape": (arrays_with(**{NORM: mx.zeros((32,))}), "input_layernorm"),
    "a bias of another shape": (arrays_with(**{Q_BIAS: mx.zeros((3,))}), r"q_proj\.bias"),
    "heads that the matrices do not have": (config_with(head_dim=32), "q_proj"),
    "another vocabulary": (config_with(vocab_size=299), "embed_tokens"),
    "scales and nobody says of what": (
        arrays_with(**{UP_SCALES: mx.zeros((128, 1))}),
        "does not say how",
    ),
    "integers for weights": (
        arrays_with(**{UP: mx.zeros((128, 64), mx.uint8)}),
        "up_proj",
    ),
    "unknown scaling": (config_with(rope_scaling={"rope_type": "spiral"}), "spiral"),
    "scaling without a type": (config_with(rope_scaling={"factor": 8.0}), "no known type"),
    "scaling by infinity": (
        config_with(rope_scaling={"rope_type": "linear", "factor": float("inf")}),
        "impossible",
    ),
    "scaling to nothing": (
        config_with(rope_scaling={"rope_type": "yarn", "factor": 0.0}),
        "impossible",
    ),
    "not-a-number for epsilon": (config_with(rms_norm_eps=float("nan")), "at most 1, not NaN"),
    "scaling without a factor": (config_with(rope_scaling={"rope_type": "linear"}), "factor"),
    "unknown activation": (config_with(hidden_act="gelu_fast"), 'one of silu.*not "gelu_fast"'),
    "no activation": (config_with(hidden_act=None), "hidden_act must be one of silu.*not null"),
    "a number for an activation": (config_with(hidden_act=0), "hidden_act must be.*not 0"),
    **{
        f"{value!r} for epsilon": (
            config_with(rms_norm_eps=value),
            f"rms_norm_eps must be a finite number above 0 and at most 1, not {shown}",
        )
        for value, shown in (
            ("256", '"256"'),
            (1e308, r"1e\+308"),
            (2**63, str(2**63)),
            (True, "true"),
            (0, "0"),
        )
    },
    **{
        f"{value!r} for the base of rotations": (
            config_with(rope_theta=value),
            f"rope_theta must be a finite number above 0, not {shown}",
        )
        for value, shown in ((0, "0"), (True, "true"), ("256", '"256"'), (-1.5, "-1.5"))
    },
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("plain") / "m", BASE, stock(BASE))


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directories_say_what_is_wrong(tmp_path: Path, plain: Path, name: str) -> None:
    damage, match = DAMAGE[name]
    path = shutil.copytree(plain, tmp_path / "m")
    damage(path)
    with pytest.raises(CheckpointError, match=match):
        load_model(path)


def test_a_directory_that_is_cut_while_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "m", BASE, stock(BASE))

    def cut(*arguments: Any) -> Any:
        os.truncate(path / "model.safetensors", 100_000)
        return read_adapters(*arguments)

    monkeypatch.setattr("mlxrun.loader.read_adapters", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* cut short"):
        load_model(path)


QUANTIZATION_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no bits": (config_with(quantization={"group_size": 64}), "quantization"),
    "half bits": (config_with(quantization={"group_size": 64, "bits": 4.0}), "4.0 bits"),
    "own bits": (config_with(quantization=MODES["4 bits"] | {OWN: {"bits": 7}}), "7 bits"),
    "unknown mode": (config_with(quantization=MODES["4 bits"] | {"mode": "x"}), "mode 'x'"),
    "other bits": (config_with(quantization={"group_size": 64, "bits": 5}), "proj|embed"),
    "other groups": (config_with(quantization={"group_size": 32, "bits": 4}), "proj|embed"),
    "no biases": (arrays_with(**{UP.replace("weight", "biases"): None}), "up_proj.biases"),
    "another mode": (config_with(quantization={"mode": "mxfp4"}), "mxfp4 is stored|scales"),
    "no mode": (config_with(quantization=MODES["4 bits"] | {"mode": ["affine"]}), "mode"),
    "codes as floats": (arrays_with(**{UP: mx.zeros((128, 8))}), "affine is stored"),
    "scales of nothing": (arrays_with(**{UP: None}), "up_proj.scales and no"),
    "gptq": (config_with(quantization={"quant_method": "gptq"}), "quantization"),
}


@pytest.mark.parametrize("name", QUANTIZATION_DAMAGE)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_quantization_says_what_is_wrong(
    tmp_path: Path, name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:
        monkeypatch.setenv(SHARE, "0")
    damage, match = QUANTIZATION_DAMAGE[name]
    model = stock(BASE)
    nn.quantize(model, **MODES["4 bits"])
    path = save(tmp_path / "m", BASE | {"quantization": MODES["4 bits"]}, model)
    damage(path)
    with pytest.raises(CheckpointError, match=match):
        load_model(path)


def test_unknown_families_are_refused(tmp_path: Path, plain: Path) -> None:
    path = shutil.copytree(plain, tmp_path / "m")
    config_with(model_type="mamba7")(path)
    with pytest.raises(UnsupportedArchitectureError, match=r"mamba7.*nearest known one is mamba"):
        load_model(path)


def test_unknown_dtypes_are_refused(tmp_path: Path, plain: Path) -> None:
    source = Tiny().write(tmp_path / "x.gguf")
    for load in (
        lambda: load_model(plain, dtype="int8"),
        lambda: load_model(read_gguf(source), dtype="int8"),
    ):
        with pytest.raises(ParameterError, match="dtype must be one of float32"):
            load()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_weights_that_overflow_half_precision_are_not_silently_infinite(
    tmp_path: Path, kind: str
) -> None:
    big = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    big[3, 5] = 3e5
    model = Tiny(weights={"blk.0.ffn_up.weight": big}, kinds={"blk.0.ffn_up.weight": kind})
    source = model.write(tmp_path / "x.gguf")
    convert(source, tmp_path / "out", policy="exact")
    for load in (
        lambda: load_model(read_gguf(source), dtype="float16", policy="near"),
        lambda: load_model(tmp_path / "out", dtype="float16"),
    ):
        with pytest.raises(MlxrunError, match=r"up_proj.*float16"):
            load()
    loaded = load_model(read_gguf(source), dtype="bfloat16", policy="near").model
    assert mx.isfinite(loaded(TOKENS % 288, loaded.make_cache())).all()


def test_scales_that_vanish_in_half_precision_are_not_silently_zero(tmp_path: Path) -> None:
    blocks = random_blocks("IQ2_XXS", 256, 66, np.random.default_rng(1), 1e-7)
    wide: dict[str, Any] = {"hidden": 256, "ffn": 256, "heads": 4, "kv_heads": 4}
    model = Tiny(**wide, raw={"blk.0.ffn_up.weight": ("IQ2_XXS", blocks)})
    source = model.write(tmp_path / "x.gguf")
    with pytest.raises(MlxrunError, match=r"up_proj.*float16"):
        load_model(read_gguf(source), dtype="float16", policy="near")
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(read_gguf(source), dtype=dtype, policy="near")
        assert loaded.report is not None
        record = next(t for t in loaded.report.tensors if "0.ffn_up" in t.name)
        assert record.rmse is not None
        assert record.rmse <= 0.01


def test_a_bias_that_vanishes_in_half_precision_does_no_harm(tmp_path: Path) -> None:
    tiny = {"blk.0.attn_q.bias": np.full(64, 1e-9, np.float32)}
    source = Tiny(biases=("attn_q",), weights=tiny).write(tmp_path / "x.gguf")
    loaded = load_model(read_gguf(source), dtype="float16", policy="near").model
    assert mx.isfinite(loaded(TOKENS % 288, loaded.make_cache())).all()
