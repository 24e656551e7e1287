"""Hugging Face configs as model configs: defaults, windows, scalings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mlxrun.errors import CheckpointError, UnsupportedArchitectureError
from mlxrun.models.families import FAMILIES, model_config

BASE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip
_GRANITE = {
    "attention_multiplier": 0.1, "residual_multiplier": 0.2, "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
_LATENT = {
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 32,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What a family's config.json must say beyond BASE.
NEEDED: dict[str, dict[str, Any]] = {
    "deepseek": _ROUTED,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": _ROUTED,
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "head_dim": 16},
    "glm4_moe": _ROUTED,
    "gpt": {
        "layer_norm_epsilon": 1e-5,
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "input_layernorm",
        "position_embedding_type": "rope",
    },
    "gpt_oss": _EXPERTS,
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE | _EXPERTS,
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "num_shared_expert": 1},
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": _EXPERTS,
}


def test_norms_without_weights_have_the_epsilon_of_the_config() -> None:
    assert model_config({**BASE, "model_type": "olmo"}).norm.eps == 1e-5
    assert model_config({**BASE, "model_type": "olmo", "layer_norm_eps": 0.5}).norm.eps == 0.5


def test_defaults_of_old_configs() -> None:
    """Llama 1's config.json has neither key heads nor a rotary base nor a head size."""
    config = model_config(BASE)
    attention = config.layers[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 4, 16)
    assert attention.scale == 0.25
    assert attention.rope is not None
    assert attention.rope.base == 10000
    assert config.tied is False
    assert len(config.layers) == 4


def windows(**config: Any) -> list[int | None]:
    return [layer.attention.window for layer in model_config(BASE | config).layers]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, [32] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "qwen2", "sliding_window": 32}, [None] * 4),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, [None] * 4),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 32,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            [None, None, 32, 32],
        ),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
            [8, None, 8, None],
        ),
    ],
)
def test_windows(config: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(**config) == expected


def test_transformers_5_keeps_everything_rotary_in_one_section() -> None:
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}
    assert model_config(BASE | {"rope_parameters": parameters}) == model_config(BASE | old)


def test_configs_are_values() -> None:
    for family in FAMILIES:
        source = BASE | NEEDED.get(family, {}) | {"model_type": family}
        config = model_config(source)
        assert hash(config) == hash(model_config(dict(source)))
        assert config.family == family


@pytest.mark.parametrize(
    ("family", "key"), [(f, key) for f, keys in NEEDED.items() for key in keys]
)
def test_keys_that_a_family_needs_are_named(family: str, key: str) -> None:
    source = BASE | NEEDED[family] | {"model_type": family}
    with pytest.raises(CheckpointError, match=key):
        model_config({k: v for k, v in source.items() if k != key})


@pytest.mark.parametrize("key", sorted(set(BASE) - {"model_type"}))
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        model_config({k: v for k, v in BASE.items() if k != key})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_attention_heads": 0}, "heads|impossible"),
        ({"num_attention_heads": -4}, "heads|impossible"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"hidden_size": "wide"}, "impossible"),
        ({"num_hidden_layers": None}, "impossible"),
        ({"layer_types": ["full_attention"]}, "1 entries for 4 layers"),
        ({"hidden_act": "gelu_fast"}, "gelu_fast"),
        ({"head_dim": 15}, "pairs"),
        ({"partial_rotary_factor": 0.0}, "pairs"),
        ({"partial_rotary_factor": 2.0}, "pairs"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "impossible"),
        ({"rope_scaling": "linear"}, "impossible|rope_scaling"),
        (
            {
                "max_position_embeddings": 64,
                "rope_scaling": {
                    "type": "longrope",
                    "long_factor": [1.0],
                    "original_max_position_embeddings": 64,
                },
            },
            "long_factor needs 8",
        ),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        model_config(BASE | change)


@pytest.mark.parametrize("kind", ["mamba", None, ["llama"], 3])
def test_unknown_families_are_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="not supported"):
        model_config(BASE | {"model_type": kind})
