"""ChatGLM and GLM 4, dense and MoE."""

from __future__ import annotations

from converters.architectures import names
from converters.architectures.base import Architecture, fixed, fused_qkv, gate_and_up
from converters.architectures.hyperparameters import Config, Hyperparameters


def _hy_v3(hp: Hyperparameters) -> Config:
    """GLM 4.5's layers; those with experts are known by their tensors only."""
    layers = range(hp["num_hidden_layers"])
    sparse = [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" in hp]
    return {
        **_glm4moe(hp),
        "first_k_dense_replace": min(sparse, default=len(layers)),
        "n_shared_experts": hp.shared_count,
    }


def _glm4moe(hp: Hyperparameters) -> Config:
    hp.only("expert_gating_func", 2, 0)
    return {
        **hp.routed(),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_scaling": hp.config.get("rope_scaling"),  # mlx-lm needs it, be it null
        "use_qk_norm": "blk.0.attn_q_norm.weight" in hp,
    }


ROWS: dict[str, Architecture] = {
    "chatglm": Architecture(
        "glm",
        "GlmForCausalLM",
        {**names.ATTENTION, **names.FFN_NORM, **names.FUSED_GATE},
        keys=fixed(rope_traditional=True),
        parts={"attn_qkv": fused_qkv},
        zero_biases=(names.QKV,),
        partial_rotary=True,
    ),
    "glm4": Architecture(
        "glm4",
        "Glm4ForCausalLM",
        {
            **names.ATTENTION,
            "post_attention_norm": "post_self_attn_layernorm",
            **names.FFN_NORM,
            "post_ffw_norm": "post_mlp_layernorm",
            **names.FUSED_GATE,
        },
        keys=fixed(rope_traditional=True),
        zero_biases=(names.QKV,),
        partial_rotary=True,
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **names.without(names.MOE_LAYER, "ffn_norm"),
            **names.QK_NORMS,
            "post_attention_norm": "post_attention_layernorm",
        },
        keys=_glm4moe,
        optional=names.MOE_OPTIONAL | frozenset(names.QK_NORMS),
        zero_biases=(names.QKV,),
        partial_rotary=True,
    ),
    "hy_v3": Architecture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **names.without(names.MOE_LAYER, *names.ROUTER_BIAS),
            **names.QK_NORMS,
            "exp_probs_b": "mlp.gate.e_score_correction_bias",
        },
        keys=_hy_v3,
        parts={"ffn_gate_up_exps": gate_and_up},
        optional=names.MOE_OPTIONAL | {"exp_probs_b"},
        zero_biases=(names.QKV,),
    ),
}
