"""Skeletons with a key or a tensor that their model does not know how to honor are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converters.gguf.source import open_gguf
from mlxrun.errors import GGUFError

from .skeleton import Skeleton, read


def refused(skeleton: Skeleton, path: Path, match: str) -> None:
    with pytest.raises(GGUFError, match=match):
        open_gguf(skeleton.write(path / "x.gguf"))


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("baichuan-7b", {"block_count": 3}, "block_count"),
    ("chatglm-glm", {"expert_count": 4}, "no experts"),
    ("deci-super", {"feed_forward_length": [256, 500, 256]}, "steps of 256"),
    ("deci-super", {"attention.head_count": [4, 0, 6]}, "all heads or none"),
    ("deci-super", {"feed_forward_length": [256, 512]}, "one number for each"),
    ("exaone4-64", {"attention.sliding_window": 0}, "a sliding window"),
    ("exaone-small", {"rope.dimension_count": 4}, "the whole head"),
    ("exaone-small", {"rope.scaling.type": "longrope"}, "longrope with its factors"),
    ("bailingmoe", {"expert_used_count": 1}, "at least 2"),
    ("gemma2-caps", {"rope.freq_base_swa": 1e6}, "freq_base_swa"),
    ("gemma3n-e2b", {"altup.active_idx": 1}, "expected 0"),
    ("gemma3n-e2b", {"final_logit_softcapping": 50.0}, "expected 30"),
    ("gpt-oss-small", {"rope.freq_base_swa": 10000.0}, "150000, that of all layers"),
    ("maincoder-norms", {"rope.scaling.factor": 4.0}, "found linear"),
    ("minicpm-longrope", {"rope.scaling.factor": 4.0}, "1 with LongRoPE"),
    ("granite-moe", {"rope.scaling.finetuned": False}, "expected True"),
    ("gemma3n-e2b", {"attention.shared_kv_layers": 3}, "expected 2"),
    ("laguna", {"expert_weights_norm": False}, "expected True"),
    ("llama-mha", {"attention.causal": False}, "expected True"),
    ("mamba-130m", {"attention.causal": False}, "expected True"),
    ("minicpm3-4b", {"attention.layer_norm_rms_epsilon": 1e-6}, "MiniCPM 3"),
    ("mistral3-moe", {"attention.temperature_scale": 0.1}, "temperature_scale"),
    ("mpt-7b", {"attention.max_alibi_bias": 0.0}, "ALiBi or learned"),
    ("mpt-learned", {"attention.max_alibi_bias": 8.0}, "ALiBi or learned"),
    ("muse-glimmer-30b", {"attention.sliding_window": 0}, "sliding windows"),
    ("nemotron_h_moe-30b", {"expert_used_count": 1}, "at least 2"),
    ("openelm-growing", {"rope.scaling.factor": 2.0}, "rope.scaling"),
    ("plamo-13b", {"rope.scaling.factor": 2.0}, "rope.scaling"),
    ("qwen2vl-text", {"rope.dimension_sections": {"i32": [2, 2, 2, 2]}}, "three sections"),
    ("qwen3vl-text", {"rope.dimension_sections": {"i32": [2, 2, 2, 2]}}, "three sections"),
    ("qwen3vlmoe", {"rope.dimension_sections": {"i32": [3, 3, 1, 0]}}, "for the 8 pairs"),
    ("qwen35-9b", {"rope.dimension_sections": {"i32": [8]}, "rope.freq_base": 1e5}, "freq_base"),
    ("qwen35-9b", {"rope.freq_base": 1e5}, "at least 1e\\+06 with sections"),
    ("qwen35-9b", {"rope.dimension_count": 32}, "for the 16 pairs"),
    ("spark2_5-gated", {"rope.scaling.factor": 2.0}, "rope.scaling"),
]


@pytest.mark.parametrize(("name", "keys", "match"), CHANGES)
def test_keys_that_a_model_cannot_honor(
    name: str, keys: dict[str, Any], match: str, tmp_path: Path
) -> None:
    skeleton = read(name)
    refused(replace(skeleton, keys={**skeleton.keys, **keys}), tmp_path, match)


@pytest.mark.parametrize(
    "name",
    [
        "deepseek32", "glm-dsa", "kimi-linear-48b", "ling3-tiny", "llama4-scout", "mamba2-130m",
        "mistral4", "plamo2-1b", "qwen35-9b", "qwen35moe-35b", "qwen3next-80b",
    ],
)  # fmt: skip
def test_an_epsilon_that_only_some_norms_would_have(name: str, tmp_path: Path) -> None:
    skeleton, key = read(name), "attention.layer_norm_rms_epsilon"
    assert key in skeleton.keys
    for usual in (1e-6, 1e-5):
        file = replace(skeleton, keys={**skeleton.keys, key: usual}).write(tmp_path / "x.gguf")
        assert open_gguf(file).config
    large = replace(skeleton, keys={**skeleton.keys, key: 1e-4})
    refused(large, tmp_path, r"layer_norm_rms_epsilon.*at most 2e-05")


@pytest.mark.parametrize("name", ["deepseek2-ocr", "mistral4"])
def test_no_bias_on_the_selection_of_experts(name: str, tmp_path: Path) -> None:
    skeleton = read(name)
    tensors = {**skeleton.tensors, "blk.1.exp_probs_b.bias": [skeleton.keys["expert_count"]]}
    refused(replace(skeleton, tensors=tensors), tmp_path, "no bias on the selection")


@pytest.mark.parametrize("name", ["apertus-8b", "falcon-7b", "gpt2-small", "qwen-fused"])
def test_no_bias_on_the_output(name: str, tmp_path: Path) -> None:
    skeleton = read(name)
    tensors = {**skeleton.tensors, "output.bias": [skeleton.vocabulary]}
    refused(replace(skeleton, tensors=tensors), tmp_path, "no bias on the output")


def test_an_activation_needs_its_numbers(tmp_path: Path) -> None:
    skeleton = read("apertus-8b")
    keys = {key: value for key, value in skeleton.keys.items() if key != "xielu.beta"}
    refused(replace(skeleton, keys=keys), tmp_path, "xielu.beta")


def test_queries_of_one_length_have_one_factor(tmp_path: Path) -> None:
    values = {"*.attn_q_norm.weight": {"normal": [3.87, 0.1]}}
    refused(replace(read("muse-glimmer-30b"), values=values), tmp_path, "one factor")
