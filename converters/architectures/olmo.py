"""OLMo 1 to 3 and OLMoE."""

from __future__ import annotations

from converters.architectures.base import (
    AFTER_NORMS,
    LLAMA,
    MOE_LLAMA,
    PERMUTED,
    QK_NORMS,
    Architecture,
    fixed,
    without,
)
from converters.architectures.hyperparameters import Config, Hyperparameters


def _olmo2(hp: Hyperparameters) -> Config:
    found = hp.windows(4)
    if not found:
        return {}
    return {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], **found}


def _olmo(hp: Hyperparameters) -> Config:
    return {"clip_qkv": hp.number("attention.clamp_kqv", 0.0) or None}


ROWS: dict[str, Architecture] = {
    "olmo": Architecture(
        "olmo",
        "OlmoForCausalLM",
        without(LLAMA, "attn_norm", "ffn_norm"),
        keys=_olmo,
        epsilon="layer_norm_eps",
        order=PERMUTED,
        final_norm=None,
    ),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        without(LLAMA, "attn_norm", "ffn_norm") | QK_NORMS | AFTER_NORMS,
        keys=_olmo2,
    ),
    "olmoe": Architecture(
        "olmoe", "OlmoeForCausalLM", MOE_LLAMA | QK_NORMS, keys=fixed(norm_topk_prob=False)
    ),
}
