"""DeepSeek and its line: fine-grained experts (arXiv:2401.06066), latent attention, indexers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from converters.architectures import names
from converters.architectures.base import PERMUTED, Architecture, fused_qkv, gate_and_up, halves
from converters.architectures.hyperparameters import Config, Hyperparameters, tidy


def _deepseek(hp: Hyperparameters) -> Config:
    # Constants of llama.cpp, whatever the file says.
    return {**hp.routed(), "norm_topk_prob": False, "scoring_func": "softmax"}


def _deepseek2_ocr(hp: Hyperparameters) -> Config:
    """The text model of DeepSeek OCR: a DeepSeek 1 with RoPE on halves."""
    hp.only("expert_gating_func", 1, 0)
    hp.only("expert_weights_norm", False)
    hp.no_router_bias()
    hp.unscaled()
    return _deepseek(hp)


def deepseek2(hp: Hyperparameters) -> Config:
    """DeepSeek V2 and V3, which differ in how they select experts; Mistral's large models."""
    turning = hp.integer("rope.dimension_count")
    routing = hp.routed() if "num_experts" in hp.config else _without_experts(hp)
    version = "3" if hp.router_bias or routing["scoring_func"] == "sigmoid" else "2"
    keys: Config = {
        **routing,
        "model_type": f"deepseek_v{version}",
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "num_key_value_heads": hp["num_attention_heads"],
        "q_lora_rank": hp.key("attention.q_lora_rank", None),
        "kv_lora_rank": hp.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": hp["head_dim"] - turning,
        "v_head_dim": hp.integer("attention.value_length_mla"),
        "partial_rotary_factor": 1.0,
    }
    _write_mscale(hp, hp.config.get("rope_scaling") or {})
    warm = hp.architecture == "mistral4" or hp.key("attention.temperature_scale", 0.0)
    return keys | _mistral4(hp, routing) if warm else keys


def _write_mscale(hp: Hyperparameters, scaling: Config) -> None:
    """Write llama.cpp's factors of queries and keys as ``mscale`` and ``mscale_all_dim``.

    It has a factor on whole heads and another on their rotated part, from a key that its converter
    divides by ten. In ``rope_scaling``, ``mscale_all_dim`` is the former by YaRN's formula and
    ``mscale`` the product of both.
    """
    factor = scaling.get("factor", 1.0)
    hp.refuse_if(factor < 1, "rope.scaling.factor", "at least 1")
    if factor == 1:
        return
    growth = 0.1 * math.log(factor)
    stated = 0.0
    if hp.architecture != "glm-dsa":  # the one that ignores it
        stated = 10 * hp.number("rope.scaling.yarn_log_multiplier", 0.0)
    yarn = scaling["type"] == "yarn"
    # DeepSeek 2 has the same factor twice, which cancels out; without YaRN nothing does.
    both = stated if hp.architecture == "deepseek2" and stated and yarn else 1.0
    rotated = (1 + both * growth) / (1 + stated * growth if yarn else 1)
    rotated *= hp.number("rope.scaling.attn_factor", 1.0)
    whole = rotated * (1 + stated * growth)
    scaling["mscale_all_dim"] = tidy((whole - 1) / growth)
    scaling["mscale"] = tidy(((rotated if yarn else 1) * whole - 1) / growth)


def _without_experts(hp: Hyperparameters) -> Config:
    """Youtu-LLM: latent attention with dense layers alone."""
    layers = hp["num_hidden_layers"]
    if hp.integer("leading_dense_block_count", 0) < layers:
        hp.needs_experts()
    return {"n_routed_experts": None, "first_k_dense_replace": layers, "scoring_func": "sigmoid"}


def _mistral4(hp: Hyperparameters, routing: Config) -> Config:
    """Mistral Large 3 and Small 4: queries scaled by position."""
    hp.only("expert_gating_func", 1, 0)
    hp.no_router_bias()
    scaling = dict(hp.config.get("rope_scaling") or {"rope_type": "default", "type": "default"})
    context = hp["max_position_embeddings"]
    length = hp.integer("attention.temperature_length", context) or context
    hp.refuse_if(
        scaling.setdefault("original_max_position_embeddings", length) != length,
        "attention.temperature_length",
        "the context before scaling, which this model's class has for both",
    )
    scaling["llama_4_scaling_beta"] = hp.number("attention.temperature_scale", 0.0)
    scaling["rope_theta"] = hp["rope_theta"]
    return {
        "model_type": "mistral4",
        "architectures": ["Mistral4ForCausalLM"],
        "rope_parameters": scaling,
        "rope_scaling": None,
    }


def _dots1(hp: Hyperparameters) -> Config:
    hp.only("expert_gating_func", 2)
    return hp.routed()


def _bailing(hp: Hyperparameters) -> Config:
    width = hp["hidden_size"] // hp["num_attention_heads"]
    hp.only("attention.key_length", width)
    return {
        **hp.routed(),
        "score_function": hp.gating(),
        "num_shared_experts": hp.shared_count,
        "moe_router_enable_expert_bias": any("exp_probs_b" in t.name for t in hp.gguf.tensors),
        "use_qkv_bias": hp["attention_bias"] or "blk.0.attn_qkv.bias" in hp,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in hp,
    }


def _bailing1(hp: Hyperparameters) -> Config:
    # Constants of llama.cpp.
    fixed = {"score_function": "softmax", "first_k_dense_replace": 0}
    return {**_bailing(hp), **fixed}


def _ernie(hp: Hyperparameters) -> Config:
    hp.only("interleave_moe_layer_step", 1)
    fixed = {"score_function": "softmax", "norm_topk_prob": True, "routed_scaling_factor": 1.0}
    return {**_bailing(hp), **fixed}


def _halves_but_values(hp: Hyperparameters, rows: int) -> npt.NDArray[np.intp]:
    """The row order :func:`halves` for queries and keys, which come before the values."""
    parts = fused_qkv(hp)
    turned = rows - parts[-1][1]
    return np.concatenate([halves(hp, turned), np.arange(turned, rows)])


_BAILING = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "attn_q_norm": "attention.query_layernorm",
    "attn_k_norm": "attention.key_layernorm",
    **names.FFN_NORM,
    **names.DENSE_OR_MOE,
    "ffn_gate_inp": "mlp.gate.gate_proj",
    "exp_probs_b.bias": "mlp.gate.expert_bias",
}

_BAILING_1 = Architecture(
    "bailing_moe",
    "BailingMoeForCausalLM",
    _BAILING,
    ends={"token_embd": "model.word_embeddings"},
    keys=_bailing1,
    joins={"attn_qkv": names.QKV},
    order={"attn_qkv": _halves_but_values},
    optional=names.MOE_OPTIONAL | frozenset(names.QK_NORMS),
)

DEEPSEEK_2 = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        **names.MLA_Q,
        **names.MLA_KV,
        **names.MLA_ABSORBED,
        "attn_output": "self_attn.o_proj",
        **names.FFN_NORM,
        **names.DENSE_OR_MOE,
    },
    keys=deepseek2,
    parts={"ffn_gate_up_exps": gate_and_up},
    optional=names.MOE_OPTIONAL | {"attn_q", "attn_q_a", "attn_q_a_norm", "attn_q_b"},
    partial_rotary=True,
)

_DEEPSEEK = Architecture(
    "deepseek",
    "DeepseekForCausalLM",
    names.without(names.MOE_LAYER, *names.ROUTER_BIAS),
    keys=_deepseek,
    order=PERMUTED,
    optional=names.MOE_OPTIONAL,
)


def _deepseek32(hp: Hyperparameters) -> Config:
    hp.only("expert_gating_func", 2)
    return {
        **deepseek2(hp),
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "rope_scaling": hp.config.get("rope_scaling"),
        "index_n_heads": hp.integer("attention.indexer.head_count"),
        "index_head_dim": hp.integer("attention.indexer.key_length"),
        "index_topk": hp.integer("attention.indexer.top_k"),
        "indexer_rope_interleave": False,
    }


def _glm_dsa(hp: Hyperparameters) -> Config:
    hp.only("expert_gating_func", 2, 0)
    # Since GLM 5.2, which sees a million tokens, most layers share another layer's index.
    own = hp.key("attention.indexer.types", hp["max_position_embeddings"] < 1 << 20)
    hp.refuse_if(
        not np.all(own),
        "attention.indexer.types",
        "an index of its own in every layer: sharing one is not supported",
    )
    latent = _deepseek32(hp)
    plain = {"rope_type": "default", "type": "default"}
    scaling = {**(latent["rope_scaling"] or plain), "rope_theta": hp["rope_theta"]}
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


_INDEX = {
    "indexer.attn_q_b.weight": "self_attn.indexer.wq_b.weight",
    "indexer.attn_k.weight": "self_attn.indexer.wk.weight",
    "indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "indexer.proj.weight": "self_attn.indexer.weights_proj.weight",
}

ROWS: dict[str, Architecture] = {
    "bailingmoe": _BAILING_1,
    "bailingmoe2": replace(_BAILING_1, keys=_bailing, joins={}, order={}, partial_rotary=True),
    "deepseek": _DEEPSEEK,
    "deepseek2": DEEPSEEK_2,
    "deepseek2-ocr": replace(_DEEPSEEK, keys=_deepseek2_ocr, order={}),
    "deepseek32": replace(DEEPSEEK_2, layer={**DEEPSEEK_2.layer, **_INDEX}, keys=_deepseek32),
    "dots1": Architecture(
        "dots1",
        "Dots1ForCausalLM",
        names.renamed(names.MOE_LAYER | names.QK_NORMS, "switch_mlp", "experts"),
        keys=_dots1,
        optional=names.MOE_OPTIONAL,
    ),
    # Ernie's own class in mlx-lm has no bias on the selection; Bailing's has.
    "ernie4_5-moe": replace(_BAILING_1, keys=_ernie),
    "glm-dsa": replace(DEEPSEEK_2, layer={**DEEPSEEK_2.layer, **_INDEX}, keys=_glm_dsa),
    "mistral4": DEEPSEEK_2,
}
