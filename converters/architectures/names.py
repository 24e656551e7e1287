"""Tensor names that families share: modules of GGUF to those of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping

Names = Mapping[str, str]

# Modules outside the layers.
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LANGUAGE_MODEL = {
    "token_embd": "language_model.model.embed_tokens",
    "output_norm": "language_model.model.norm",
    "output": "language_model.lm_head",
}
LANGUAGE_MODEL_LAYERS = "language_model.model.layers"

# Modules of a layer, below ``blk.N.`` and ``model.layers.N.``.
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
HUNYUAN_NORMS = {
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}
# Multi-head latent attention.
MLA_Q = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
}
MLA_KV = {
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
}
MLA_ABSORBED = {"attn_k_b": "self_attn.embed_q", "attn_v_b": "self_attn.unembed_out"}

FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
AFTER_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
UNGATED = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
FUSED_GATE = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
LLAMA = {**ATTENTION, **FFN_NORM, **GATED}
SANDWICH = {**LLAMA, **AFTER_NORMS, "ffn_norm": "pre_feedforward_layernorm"}

MOE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
MOE_LLAMA = {**ATTENTION, **FFN_NORM, **MOE}
SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
GATED_SHARED_EXPERT = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
ROUTER_BIAS = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
# Layers with and without experts; the loader reports missing tensors of a layer.
DENSE_OR_MOE = {**GATED, **MOE, **SHARED_EXPERTS, **ROUTER_BIAS}
MOE_LAYER = {**ATTENTION, **FFN_NORM, **DENSE_OR_MOE}
MOE_OPTIONAL = frozenset(DENSE_OR_MOE)

QKV = ("attn_q", "attn_k", "attn_v")
BIASED_ATTENTION = (*QKV, "attn_output")
LLAMA_BIASES = (BIASED_ATTENTION, ("ffn_gate", "ffn_up", "ffn_down"))


def without(names: Names, *excluded: str) -> dict[str, str]:
    return {name: target for name, target in names.items() if name not in excluded}


def renamed(names: Names, old: str, new: str) -> dict[str, str]:
    """The names with the first ``old`` of each target replaced."""
    return {name: target.replace(old, new, 1) for name, target in names.items()}
