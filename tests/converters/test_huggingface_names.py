"""What families may hold in which form, and configurations of models of text and images."""

from __future__ import annotations

import pytest

from converters.huggingface.names import form_of, stays, text_config
from converters.quantize.layout import affine, fixed
from converters.quantize.recipe import EIGHT_BITS

FOUR, TINY = affine(4, 64), fixed("nvfp4")
ROUTERS = {
    "mixtral": "block_sparse_moe.gate",
    "qwen2_moe": "mlp.shared_expert_gate",
    "qwen3_moe": "mlp.gate",
    "olmoe": "mlp.gate",
    "gpt_oss": "mlp.router",
    "granitemoe": "block_sparse_moe.router.layer",
}


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_get_eight_bits_and_never_fewer(family: str) -> None:
    form, router = form_of({"model_type": family}), f"model.layers.3.{ROUTERS[family]}"
    assert form(router, FOUR) == form(router, TINY) == EIGHT_BITS
    assert form(router, affine(8, 32)) == affine(8, 32)
    assert form("model.layers.3.mlp.switch_mlp.gate_proj", FOUR) == FOUR


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_deepseeks_routers_are_floats_and_their_biases_keep_their_type(family: str) -> None:
    assert form_of({"model_type": family})("model.layers.3.mlp.gate", FOUR) is None
    bias = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert stays({"model_type": family}, bias) == (family == "deepseek_v3")


def test_granites_small_weights_keep_eight_bits_in_microscaling_modes() -> None:
    form = form_of({"model_type": "granite"})
    for module in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        assert form(module, TINY) == EIGHT_BITS
        assert form(module, FOUR) == FOUR
    assert form("model.layers.0.mlp.up_proj", TINY) == TINY


def test_what_a_text_config_leaves_out_is_transformers_default() -> None:
    text = text_config(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "head_dim": 128},
            "vision_config": {"hidden_size": 1152},
        }
    )
    assert text["model_type"] == "gemma3_text"
    assert (text["num_attention_heads"], text["num_key_value_heads"]) == (8, 4)
    assert (text["hidden_size"], text["head_dim"], text["vocab_size"]) == (2560, 128, 262208)
    assert text["eos_token_id"] == [1, 106]
    assert "vision_config" not in text
    assert text_config(text) == text


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "gemma3"},
        {"model_type": "gemma3", "text_config": 3},
        {"model_type": "mistral3", "text_config": {"model_type": "qwen9"}},
        {"model_type": ["gemma3"], "text_config": {}},
        {"model_type": "llava", "text_config": {"model_type": "llama"}},
    ],
)
def test_other_configurations_stay_as_they_are(config: dict[str, object]) -> None:
    assert text_config(config) == config
