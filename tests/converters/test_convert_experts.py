"""Mixtures of experts: what stock mlx-lm makes of their conversions, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conformance import skeleton as skeletons
from mlx.utils import tree_map
from tiny_models import nmse

from converters.errors import GGUFError
from converters.gguf.source import open_gguf
from mlxrun import convert

#: Skeletons whose ``model_type`` mlx-lm has a class for, and how near it comes: some of its classes
#: have an epsilon of their own in a norm.
STOCK: dict[str, float] = {
    "afmoe": 1e-11, "bailingmoe": 1e-11, "bailingmoe2": 1e-11, "deepseek": 1e-11,
    "deepseek2-flash": 1e-9, "deepseek2-ocr": 1e-11, "deepseek2-warm": 1e-11, "deepseek32": 1e-11,
    "dots1": 1e-11, "ernie4_5-moe": 1e-11, "exaone-moe": 1e-11, "glm-dsa": 1e-9, "glm4moe": 1e-11,
    "granitemoe-shared": 1e-11, "hy_v3": 1e-11, "laguna": 1e-11, "llama4-maverick": 1e-11,
    "llama4-scout": 1e-9, "mellum": 1e-11, "mimo2": 1e-11, "minimax-m2": 1e-11,
    "minimax-m3": 1e-11, "mistral4": 1e-11, "qwen3vlmoe": 1e-11, "step35": 1e-11,
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_stock_mlx_lm_computes_llama_cpps_logits(tmp_path: Path, name: str) -> None:
    from mlx_lm.utils import load_model

    skeleton = skeletons.read(name)
    convert(skeleton.write(tmp_path / "x.gguf"), tmp_path / "out", policy="exact")
    model, _ = load_model(tmp_path / "out", lazy=False, strict=True)
    model.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
            model.parameters(),
        )
    )
    tokens = mx.array([skeleton.token_ids()])
    assert nmse(np.array(model(tokens)[0]), skeletons.expected(skeleton)) < STOCK[name]


def config_of(
    tmp_path: Path, name: str, keys: Mapping[str, Any], tensors: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config of a skeleton with other keys and tensors; None takes one away."""
    skeleton = skeletons.read(name)
    changed = {
        part: {k: v for k, v in {**before, **after}.items() if v is not None}
        for part, before, after in (
            ("keys", skeleton.keys, keys),
            ("tensors", skeleton.tensors, tensors or {}),
        )
    }
    file = replace(skeleton, **changed).write(tmp_path / "x.gguf")
    return open_gguf(file).config


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
#: What a class would ignore: the skeleton, what its file says, and what the error names.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gating that is not known": ("deepseek2-lite", {"expert_gating_func": 4}, "gating_func.*1.*2"),
    "softmax for a sigmoid": ("dots1", {"expert_gating_func": 1}, "expert_gating_func.*2.*1"),
    "sigmoid for a softmax": ("mistral4", {"expert_gating_func": 2}, "expert_gating_func"),
    "groups of a class without": (
        "qwen3moe-all",
        {"expert_group_count": 2, "expert_group_used_count": 1},
        "expert_group_count.*no groups",
    ),
    "weights that do not sum to one": ("laguna", {"expert_weights_norm": False}, "weights_norm"),
    "two experts for a token": ("llama4-scout", {"expert_used_count": 2}, "expert_used_count"),
    "no chunks": ("llama4-scout", {"attention.sliding_window": 0}, "sliding_window"),
    "experts in some layers": ("ernie4_5-moe", {"interleave_moe_layer_step": 2}, "interleave"),
    "a width of head": ("bailingmoe", {"attention.key_length": 32}, "key_length|value_length"),
    "scaled positions": ("minimax-m2", YARN, "rope.scaling.type.*none.*yarn"),
    "positions scaled otherwise": ("laguna", LINEAR, "rope.scaling.type.*yarn.*linear"),
    "another context for temperature": (
        "mistral4",
        {"attention.temperature_length": 64},
        "temperature_length",
    ),
    "an index for several layers": (
        "glm-dsa",
        {"attention.indexer.types": [True, False, True]},
        "indexer.types",
    ),
    "a pattern of its own": (
        "afmoe",
        {"attention.sliding_window_pattern": [True, False, True, True, False]},
        "sliding_window_pattern",
    ),
    "no window": ("mellum", {"attention.sliding_window": 0}, "sliding_window"),
    "heads that differ": ("mimo2", {"attention.head_count_kv": [2, 3, 3, 3, 3]}, "head_count_kv"),
    "no experts": ("exaone-moe", {"expert_count": None, "expert_used_count": None}, "expert_count"),
    "no experts beside dense layers": (
        "llama4-maverick",
        {"expert_count": None, "expert_used_count": None},
        "expert_count",
    ),
    "no experts in some layers": (
        "deepseek2-dense",
        {"leading_dense_block_count": 2},
        "expert_count",
    ),
    "no experts in any": ("mellum", {"expert_count": None, "expert_used_count": None}, "expert"),
    "too many layers ahead": ("glm4moe", {"nextn_predict_layers": 4}, "nextn_predict_layers"),
    "a word for a number": ("glm4moe", {"expert_shared_count": "one"}, "expert_shared_count"),
    "a word for a factor": ("glm4moe", {"expert_weights_scale": "one"}, "expert_weights_scale"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_class_would_ignore_is_refused(tmp_path: Path, what: str) -> None:
    name, keys, match = REFUSED[what]
    with pytest.raises(GGUFError, match=match):
        config_of(tmp_path, name, keys)


def test_shared_experts_of_another_width_are_refused(tmp_path: Path) -> None:
    width = {
        "blk.1-4.ffn_gate_shexp.weight": [21, 48],
        "blk.1-4.ffn_up_shexp.weight": [21, 48],
        "blk.1-4.ffn_down_shexp.weight": [48, 21],
    }
    with pytest.raises(GGUFError, match=r"expert_shared_feed_forward_length.*multiple of 20.*21"):
        config_of(tmp_path, "exaone-moe", {}, width)


@pytest.mark.parametrize(
    "pattern",
    ["ffn_gate_inp", "ffn_up_exps", "ffn_down_shexp", "attn_v"],
)
def test_a_layer_without_one_of_its_matrices_is_refused(tmp_path: Path, pattern: str) -> None:
    skeleton = skeletons.read("glm4moe")
    whole = skeleton.shapes()
    tensors = {name: list(shape) for name, (_, shape) in whole.items()}
    del tensors[f"blk.2.{pattern}.weight"]
    file = replace(skeleton, tensors=tensors).write(tmp_path / "x.gguf")
    with pytest.raises(GGUFError, match=rf"blk\.2\.{pattern}\.weight"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_only_predict_further_ahead_are_left_out(tmp_path: Path) -> None:
    skeleton = skeletons.read("glm4moe")
    report = convert(skeleton.write(tmp_path / "x.gguf"), tmp_path / "out")
    assert open_gguf(tmp_path / "x.gguf").config["num_hidden_layers"] == 3
    assert report.skipped
    assert all(entry["name"].startswith("blk.3.") for entry in report.skipped)
    assert {entry["reason"] for entry in report.skipped} == {"beyond the 3 layers that generate"}
