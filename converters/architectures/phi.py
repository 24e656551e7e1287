"""Phi 1 to 4."""

from __future__ import annotations

from converters.architectures.base import Architecture, fixed, fused_qkv
from converters.architectures.hyperparameters import Config, Hyperparameters
from converters.architectures.names import ATTENTION, FFN_NORM, FUSED_GATE, QKV


def _phi3(hp: Hyperparameters) -> Config:
    """Hugging Face has the original context outside of ``rope_scaling``."""
    scaling = hp.config.get("rope_scaling") or {}
    key = "original_max_position_embeddings"
    return {key: scaling.get(key, hp["max_position_embeddings"])}


ROWS: dict[str, Architecture] = {
    "phi2": Architecture(
        "phi",
        "PhiForCausalLM",
        {**ATTENTION, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        ends={"output_norm": "model.final_layernorm"},
        keys=fixed(hidden_act="gelu_new"),
        epsilon="layer_norm_eps",
        parts={"attn_qkv": fused_qkv},
        norm_biases=True,
        head_bias=True,
        partial_rotary=True,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            **FFN_NORM,
            **FUSED_GATE,
        },
        keys=_phi3,
        joins={"attn_qkv": QKV},
        partial_rotary=True,
    ),
}
