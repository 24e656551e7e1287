"""Command R."""

from __future__ import annotations

from converters.architectures.base import Architecture
from converters.architectures.hyperparameters import Config, Hyperparameters
from converters.architectures.names import LLAMA, QK_NORMS, without


def _cohere(hp: Hyperparameters) -> Config:
    return {
        "logit_scale": hp.number("logit_scale", 1.0),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in hp,
        "rope_traditional": True,
        **(hp.windows(4) if hp.architecture == "cohere2" else {}),
    }


ROWS: dict[str, Architecture] = {
    "cohere2": Architecture(
        "cohere2",
        "Cohere2ForCausalLM",
        without(LLAMA, "ffn_norm"),
        keys=_cohere,
        epsilon="layer_norm_eps",
    ),
    "command-r": Architecture(
        "cohere",
        "CohereForCausalLM",
        without(LLAMA, "ffn_norm") | QK_NORMS,
        keys=_cohere,
        epsilon="layer_norm_eps",
        optional=frozenset(QK_NORMS),
    ),
}
