"""Architectures with mixtures of experts."""

from __future__ import annotations

import math

from converters.gguf.architectures.keys import multipliers, windows
from converters.gguf.architectures.row import (
    ATTENTION,
    BIASED_ATTENTION,
    BIASED_QKV,
    FFN_NORM,
    GATED,
    PERMUTED,
    QK_NORMS,
    SHARED_EXPERTS,
    SPARSE,
    SPARSE_LLAMA,
    Architecture,
    Config,
    as_row,
    renamed,
    without,
)
from converters.gguf.numbers import float_of, scalar
from converters.gguf.reader import GGUFFile


def _qwen2moe(gguf: GGUFFile, config: Config) -> Config:
    shared = gguf.tensor("blk.0.ffn_up_shexp.weight").shape[0]
    return {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _gpt_oss(gguf: GGUFFile, config: Config) -> Config:
    return {**windows(gguf, 2), "intermediate_size": config["moe_intermediate_size"]}


def _granitemoe(gguf: GGUFFile, config: Config) -> Config:
    if "blk.0.ffn_up_shexp.weight" in gguf:
        raise gguf.tensor("blk.0.ffn_up_shexp.weight").error(
            expected="no shared expert in this architecture", found="one"
        )
    return multipliers(gguf, config)


def _deepseek2(gguf: GGUFFile, config: Config) -> Config:
    if gguf.key("attention.temperature_scale", 0.0):
        key = f"{gguf.architecture}.attention.temperature_scale"
        raise gguf.error(key, expected="none in this architecture")
    turning = scalar(gguf, "rope.dimension_count")
    sigmoid = scalar(gguf, "expert_gating_func", 1) == 2
    version = "3" if sigmoid else "2"
    keys: Config = {
        "model_type": f"deepseek_v{version}",
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": gguf.key("attention.q_lora_rank", None),
        "kv_lora_rank": scalar(gguf, "attention.kv_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": config["head_dim"] - turning,
        "v_head_dim": scalar(gguf, "attention.value_length_mla"),
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": scalar(gguf, "expert_shared_count", 0),
        "n_group": scalar(gguf, "expert_group_count", 1),
        "topk_group": scalar(gguf, "expert_group_used_count", 1),
        "first_k_dense_replace": scalar(gguf, "leading_dense_block_count", 0),
        "routed_scaling_factor": float_of(gguf, "expert_weights_scale", 1.0),
        "norm_topk_prob": bool(gguf.key("expert_weights_norm", False)),
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else "greedy",
        "moe_layer_freq": 1,
        "partial_rotary_factor": 1.0,
    }
    scaling = config.get("rope_scaling") or {}
    if "mscale_all_dim" in scaling:
        # llama.cpp's converter stores a tenth of it; both factors are the same in these models.
        scaling["mscale_all_dim"] *= 10
        scaling["mscale"] = scaling["mscale_all_dim"]
    elif scaling.get("type") == "yarn" and scaling["factor"] > 1:
        # Without it llama.cpp applies YaRN's own factor to all of a head and to its rotated part.
        growth = 0.1 * math.log(scaling["factor"])
        scaling |= {"mscale_all_dim": 1.0, "mscale": ((1 + growth) ** 2 - 1) / growth}
    return keys


EXPERTS: dict[str, Architecture] = {
    "deepseek2": Architecture(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_k_b": "self_attn.embed_q",
            "attn_v_b": "self_attn.unembed_out",
            "attn_output": "self_attn.o_proj",
            **FFN_NORM,
            **GATED,
            **SPARSE,
            **SHARED_EXPERTS,
            "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
        },
        keys=_deepseek2,
        optional=frozenset(
            {"attn_q", "attn_q_a", "attn_q_a_norm", "attn_q_b", "exp_probs_b.bias"}
            | {*GATED, *SPARSE, *SHARED_EXPERTS}
        ),
        partial_rotary=True,
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **ATTENTION,
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            **renamed(without(SPARSE, "ffn_gate_inp"), "switch_mlp", "experts"),
        },
        keys=_gpt_oss,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {
            **renamed(SPARSE_LLAMA, "mlp.", "block_sparse_moe."),
            "ffn_gate_inp": "block_sparse_moe.router.layer",
        },
        keys=_granitemoe,
        order=PERMUTED,
        zero_biases=(BIASED_ATTENTION,),
    ),
    # Llama with experts; GGUF has no name of its own for it.
    "mixtral": Architecture(
        "mixtral",
        "MixtralForCausalLM",
        renamed(SPARSE_LLAMA, "mlp.", "block_sparse_moe."),
        order=PERMUTED,
    ),
    "olmoe": Architecture(
        "olmoe",
        "OlmoeForCausalLM",
        SPARSE_LLAMA | QK_NORMS,
        keys=lambda gguf, config: {"norm_topk_prob": False},
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **SPARSE_LLAMA,
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        },
        keys=_qwen2moe,
        reshape={"ffn_gate_inp_shexp": as_row},
        zero_biases=(BIASED_QKV,),
        always_biased=True,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        SPARSE_LLAMA | QK_NORMS,
        keys=lambda gguf, config: {
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}
