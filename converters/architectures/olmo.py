"""OLMo 1 to 3 and OLMoE."""

from __future__ import annotations

from converters.architectures import names
from converters.architectures.base import PERMUTED, Architecture, fixed
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
        names.without(names.LLAMA, "attn_norm", "ffn_norm"),
        keys=_olmo,
        epsilon="layer_norm_eps",
        order=PERMUTED,
        final_norm=None,
    ),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        names.without(names.LLAMA, "attn_norm", "ffn_norm") | names.QK_NORMS | names.AFTER_NORMS,
        keys=_olmo2,
    ),
    "olmoe": Architecture(
        "olmoe",
        "OlmoeForCausalLM",
        names.MOE_LLAMA | names.QK_NORMS,
        keys=fixed(norm_topk_prob=False),
    ),
}
