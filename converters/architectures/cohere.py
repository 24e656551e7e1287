"""Command R."""

from __future__ import annotations

from converters.architectures.base import LLAMA, QK_NORMS, Architecture, Config, windows, without
from converters.gguf.reader import GGUFFile
from converters.gguf.validate import float_of


def _cohere(gguf: GGUFFile, config: Config) -> Config:
    return {
        "logit_scale": float_of(gguf, "logit_scale", 1.0),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in gguf,
        "rope_traditional": True,
        **(windows(gguf, 4) if gguf.architecture == "cohere2" else {}),
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
