"""PEFT's adapters: the same numbers as in mlx-lm's format must do the same, as mlx-lm judges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapter_files import write_directory, write_mlx_lm
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model as load_stock
from tiny_models import Tiny, nmse

import mlxrun
from mlxrun import convert
from mlxrun.errors import AdapterError
from mlxrun.loader import load_model
from mlxrun.weights.adapters import AdapterChoice

SAME = 1e-10
RANK, SCALE = 4, 2.5
TOKENS = np.random.default_rng(5).integers(3, 120, 40).tolist()
MODULES = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "model.embed_tokens", "lm_head"]
Tensors = dict[str, mx.array]
Config = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    convert(Tiny().write(folder / "x.gguf"), folder / "model", policy="exact")
    return folder / "model"


def logits(path: Path, adapter: AdapterChoice = ()) -> np.ndarray:
    model = load_model(path, dtype="float32", adapter=adapter).model
    return np.array(model(mx.array([TOKENS]), model.make_cache())[0])


def mlx_lm_logits(path: Path, adapter: Path) -> np.ndarray:
    model, _ = load_stock(path)
    load_adapters(model, str(adapter)).eval()
    return np.array(model(mx.array([TOKENS]))[0])


def translated(adapter: Path) -> tuple[Tensors, Config]:
    """mlx-lm's adapter in PEFT's terms: its ``save_pretrained`` drops the adapter's name."""
    tensors = {}
    for name, array in mx.load(str(adapter / "adapters.safetensors")).items():
        module, _, part = name.rpartition(".")
        embedding = "embedding_" if module.endswith("embed_tokens") else ""
        end = "" if embedding else ".weight"
        own = {
            "lora_a": f"lora_{embedding}A{end}",
            "lora_b": f"lora_{embedding}B{end}",
            "m": "lora_magnitude_vector",
        }[part]
        tensors[f"base_model.model.{module}.{own}"] = array.T if array.ndim == 2 else array
    config: Config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK}
    return tensors, config | {"target_modules": ["q_proj"], "bias": "none"}


def write(path: Path, tensors: Tensors, config: Config) -> Path:
    return write_directory(path, "adapter_model.safetensors", tensors, config)


def identity(tensors: Tensors, config: Config) -> None:
    """As it is."""


def stabilized(tensors: Tensors, config: Config) -> None:
    config |= {"use_rslora": True, "lora_alpha": SCALE * RANK**0.5}


def patterns(tensors: Tensors, config: Config) -> None:
    config |= {"r": 9, "lora_alpha": 5, "alpha_pattern": {".*proj": 10.0, "embed_tokens": 10.0}}
    config["rank_pattern"] = {"[qv]_proj": RANK, "up_proj": RANK, "embed_tokens": RANK}
    config["alpha_pattern"]["lm_head"] = config["rank_pattern"]["lm_head"] = 10
    config["rank_pattern"]["lm_head"] = RANK


def named(tensors: Tensors, config: Config) -> None:
    for key in list(tensors):
        if key.endswith(".weight"):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)


def of_a_larger_model(tensors: Tensors, config: Config) -> None:
    for key in list(tensors):
        if ".model.model." in key:
            tensors[key.replace(".model.model.", ".model.model.language_model.")] = tensors.pop(key)


def dora(tensors: Tensors, config: Config) -> None:
    config["use_dora"] = True


@pytest.mark.parametrize("change", [identity, stabilized, patterns, named, of_a_larger_model, dora])
def test_it_computes_the_same_as_mlx_lms(
    base: Path, tmp_path: Path, change: Callable[[Tensors, Config], None]
) -> None:
    kind = "dora" if change is dora else "lora"
    theirs = write_mlx_lm(base, tmp_path / "a", MODULES, kind=kind, rank=RANK)
    tensors, config = translated(theirs)
    change(tensors, config)
    found = logits(base, write(tmp_path / "b", tensors, config))
    assert nmse(found, mlx_lm_logits(base, theirs)) < SAME
    assert nmse(found, logits(base)) > 1e-3


def test_modules_that_were_saved_whole_replace_the_models(base: Path, tmp_path: Path) -> None:
    tensors, config = translated(write_mlx_lm(base, tmp_path / "a", ["mlp.up_proj"], rank=RANK))
    part = "base_model.model."
    head = mx.array(np.random.default_rng(0).standard_normal((288, 64), dtype=np.float32))
    saved = {"lm_head.weight": head, "model.norm.weight": mx.full((64,), 1.5)}
    whole = write_directory(
        tmp_path / "whole", "adapters.safetensors", saved, {"fine_tune_type": "full"}
    )
    expected = logits(base, [tmp_path / "a", whole])
    plain = {part + name: array for name, array in saved.items()}
    assert nmse(logits(base, write(tmp_path / "b", tensors | plain, config)), expected) < SAME
    inner = {f"{part}lm_head.base_layer.weight": head}
    inner[f"{part}model.norm.modules_to_save.weight"] = saved["model.norm.weight"]
    assert nmse(logits(base, write(tmp_path / "c", tensors | inner, config)), expected) < SAME


def test_adapted_experts_become_a_stack(tmp_path: Path) -> None:
    """Of three experts the second has no adapter; merging by hand says what must come out."""
    hidden, width, count = 64, 48, 3
    rng = np.random.default_rng(0)
    config = {
        "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_local_experts": count,
        "num_experts_per_tok": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    layer = "model.layers.0."
    shapes = {"model.embed_tokens": (128, hidden), "lm_head": (128, hidden)}
    for name, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
        shapes[f"{layer}self_attn.{name}_proj"] = (rows, hidden)
    experts = f"{layer}block_sparse_moe"
    shapes[f"{experts}.gate"] = (count, hidden)
    for i in range(count):
        for name, shape in (("w1", (width, 64)), ("w2", (64, width)), ("w3", (width, 64))):
            shapes[f"{experts}.experts.{i}.{name}"] = shape
    weights = {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    for name in ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm"):
        weights[f"{name}.weight"] = np.ones(hidden, np.float32)

    def write_model(path: Path) -> Path:
        path.mkdir()
        arrays = {name: mx.array(array) for name, array in weights.items()}
        mx.save_safetensors(str(path / "model.safetensors"), arrays)
        (path / "config.json").write_text(json.dumps(config))
        return path

    plain, tensors = write_model(tmp_path / "plain"), {}
    for i in (0, 2):
        for name in ("w1", "w2", "w3"):
            module = f"{experts}.experts.{i}.{name}"
            rows, columns = shapes[module]
            a = rng.standard_normal((RANK, columns)).astype(np.float32)
            b = 0.1 * rng.standard_normal((rows, RANK)).astype(np.float32)
            weights[f"{module}.weight"] += 0.5 * b @ a
            tensors[f"base_model.model.{module}.lora_A.weight"] = mx.array(a)
            tensors[f"base_model.model.{module}.lora_B.weight"] = mx.array(b)
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2}
    adapter = write(tmp_path / "adapter", tensors, said)
    merged = write_model(tmp_path / "merged")
    assert nmse(logits(plain, adapter), logits(merged)) < SAME
    assert nmse(logits(plain), logits(merged)) > 1e-3
    tensors.pop(f"base_model.model.{experts}.experts.2.w1.lora_A.weight")
    with pytest.raises(AdapterError, match="missing"):
        logits(plain, write(tmp_path / "adapter", tensors, said))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: c.update(peft_type="IA3"), "IA3"),
        (lambda t, c: c.update(peft_type=None), "None"),
        (lambda t, c: c.update(fan_in_fan_out=True), "fan_in_fan_out"),
        (lambda t, c: c.update(layer_replication=[[0, 1]]), "layer_replication"),
        (lambda t, c: c.update(init_lora_weights="pissa_niter_4"), "pissa"),
        (lambda t, c: c.update(r=0), "rank"),
        (lambda t, c: c.update(r="four"), "r must be a number"),
        (lambda t, c: c.pop("lora_alpha"), "lora_alpha must be a number"),
        (lambda t, c: c.update(use_dora=True), "magnitudes"),
        (lambda t, c: c.update(alpha_pattern={"(": 1}), "alpha_pattern"),
        (lambda t, c: c.update(rank_pattern=[1]), "rank_pattern"),
        (lambda t, c: c.update(rank_pattern={"(.+)+x": 4}), "matched for ever"),
        (lambda t, c: c.update(alpha_pattern={".*" * 9 + "x": 4}), "matched for ever"),
        (lambda t, c: t.update({f"{Q}.lora_B.bias": mx.ones(64)}), "lora_B.bias is no tensor"),
        (lambda t, c: t.update({f"{Q}.ia3_l": mx.ones(64)}), "ia3_l is no tensor"),
        (lambda t, c: t.update({f"{Q}.bias": mx.ones(64)}), "no .*q_proj.bias to replace"),
        (lambda t, c: t.update({f"{Q}.weight": mx.ones((9, 64))}), r"shape \(9, 64\)"),
        (lambda t, c: t.pop(f"{Q}.lora_B.weight"), "missing"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    base: Path, tmp_path: Path, change: Callable[[Tensors, Config], Any], message: str
) -> None:
    mlx_lms = write_mlx_lm(base, tmp_path / "a", ["self_attn.q_proj"], rank=RANK)
    tensors, config = translated(mlx_lms)
    change(tensors, config)
    with pytest.raises(AdapterError, match=message):
        logits(base, write(tmp_path / "b", tensors, config))


def test_it_can_be_merged(base: Path, tmp_path: Path) -> None:
    tensors, config = translated(write_mlx_lm(base, tmp_path / "a", MODULES, rank=RANK))
    adapter = write(tmp_path / "b", tensors, config)
    gguf = Tiny().write(tmp_path / "x.gguf")
    mlxrun.convert(gguf, tmp_path / "out", policy="exact", adapter=[(adapter, 0.5)])
    assert nmse(logits(tmp_path / "out"), logits(base, [(adapter, 0.5)])) < SAME
