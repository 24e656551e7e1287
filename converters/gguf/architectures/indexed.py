"""Mixtures of experts whose attention first picks, by a small index, the keys that it reads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from converters.gguf.architectures.fine_grained import DEEPSEEK_2, deepseek2
from converters.gguf.architectures.keys import only, routed, shared_width, unscaled
from converters.gguf.architectures.row import (
    ATTENTION,
    FFN_NORM,
    GATED,
    QK_NORMS,
    SHARED_EXPERTS,
    SPARSE,
    Architecture,
    Config,
    renamed,
)
from converters.gguf.numbers import scalar
from converters.gguf.reader import GGUFFile


def _deepseek32(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "expert_gating_func", 2)
    return {
        **deepseek2(gguf, config),
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "rope_scaling": config.get("rope_scaling"),
        "index_n_heads": scalar(gguf, "attention.indexer.head_count"),
        "index_head_dim": scalar(gguf, "attention.indexer.key_length"),
        "index_topk": scalar(gguf, "attention.indexer.top_k"),
        "indexer_rope_interleave": False,
    }


def _glm_dsa(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "expert_gating_func", 2, 0)
    # Since GLM 5.2, which sees a million tokens, most layers share another layer's index.
    own = gguf.key("attention.indexer.types", config["max_position_embeddings"] < 1 << 20)
    if not np.all(own):
        raise gguf.error(
            f"{gguf.architecture}.attention.indexer.types",
            expected="an index of its own in every layer: sharing one is not supported",
        )
    latent = _deepseek32(gguf, config)
    plain = {"rope_type": "default", "type": "default"}
    scaling = {**(latent["rope_scaling"] or plain), "rope_theta": config["rope_theta"]}
    return {
        **latent,
        "model_type": "glm_moe_dsa",
        "architectures": ["GlmMoeDsaForCausalLM"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_parameters": scaling,
        "rope_scaling": None,
        "indexer_rope_interleave": True,
    }


def _minimax_m3(gguf: GGUFFile, config: Config) -> Config:
    """Everything in the section on text, as the model also sees."""
    only(gguf, "expert_gating_func", 2)
    only(gguf, "expert_weights_norm", True, absent=False)
    unscaled(gguf, config)
    routing = routed(gguf, config)
    dense = routing["first_k_dense_replace"]
    layers = range(config["num_hidden_layers"])
    text = {
        **config,
        "model_type": "minimax_m3",
        "routed_scaling_factor": routing["routed_scaling_factor"],
        "intermediate_size": config["moe_intermediate_size"],
        "dense_intermediate_size": config["intermediate_size"],
        "shared_intermediate_size": shared_width(gguf),
        "rotary_dim": scalar(gguf, "rope.dimension_count", config["head_dim"]),
        "use_qk_norm": True,
        "use_gemma_norm": False,  # files have the one that it adds
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in layers],
        "sparse_attention_freq": [int(i >= dense) for i in layers],
        "index_n_heads": scalar(gguf, "attention.indexer.head_count"),
        "index_head_dim": scalar(gguf, "attention.indexer.key_length"),
        "index_block_size": scalar(gguf, "attention.indexer.block_size"),
        "index_topk_blocks": scalar(gguf, "attention.indexer.top_k"),
        "index_local_blocks": scalar(gguf, "attention.indexer.local_blocks"),
    }
    return {"text_config": text}


_INDEX = {
    "indexer.attn_q_b.weight": "self_attn.indexer.wq_b.weight",
    "indexer.attn_k.weight": "self_attn.indexer.wk.weight",
    "indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "indexer.proj.weight": "self_attn.indexer.weights_proj.weight",
}
_BLOCK_INDEX = {
    f"indexer.{side}_{kind}.weight": f"self_attn.index_{side}_{kind}.weight"
    for side in "qk"
    for kind in ("proj", "norm")
}
_MINIMAX_EXPERTS = {
    **renamed(SPARSE | SHARED_EXPERTS, "mlp.", "block_sparse_moe."),
    "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
}

INDEXED: dict[str, Architecture] = {
    "deepseek32": replace(DEEPSEEK_2, layer={**DEEPSEEK_2.layer, **_INDEX}, keys=_deepseek32),
    "glm-dsa": replace(DEEPSEEK_2, layer={**DEEPSEEK_2.layer, **_INDEX}, keys=_glm_dsa),
    "minimax-m3": Architecture(
        "minimax_m3_vl",
        "MiniMaxM3VLForConditionalGeneration",
        {**ATTENTION, **FFN_NORM, **QK_NORMS, **GATED, **_MINIMAX_EXPERTS, **_BLOCK_INDEX},
        ends={
            "token_embd": "language_model.model.embed_tokens",
            "output_norm": "language_model.model.norm",
            "output": "language_model.lm_head",
        },
        prefix="language_model.model.layers",
        keys=_minimax_m3,
        optional=frozenset(GATED | _MINIMAX_EXPERTS | _BLOCK_INDEX),
        partial_rotary=True,
    ),
}
