"""DeepSeek and its line: fine-grained experts (arXiv:2401.06066), latent attention, indexers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from converters.architectures.base import (
    DENSE_OR_MOE,
    FFN_NORM,
    MLA_ABSORBED,
    MLA_KV,
    MLA_Q,
    MOE_LAYER,
    MOE_OPTIONAL,
    PERMUTED,
    QK_NORMS,
    QKV,
    ROUTER_BIAS,
    Architecture,
    Config,
    fused_qkv,
    gate_and_up,
    gating,
    halves,
    needs_experts,
    no_router_bias,
    only,
    renamed,
    routed,
    router_bias,
    shared_count,
    unscaled,
    without,
)
from converters.gguf.reader import GGUFFile
from converters.gguf.validate import float_of, scalar, tidy


def _deepseek(gguf: GGUFFile, config: Config) -> Config:
    # Constants of llama.cpp, whatever the file says.
    return {**routed(gguf, config), "norm_topk_prob": False, "scoring_func": "softmax"}


def _deepseek2_ocr(gguf: GGUFFile, config: Config) -> Config:
    """The text model of DeepSeek OCR: a DeepSeek 1 with RoPE on halves."""
    only(gguf, "expert_gating_func", 1, 0)
    only(gguf, "expert_weights_norm", False)
    no_router_bias(gguf)
    unscaled(gguf, config)
    return _deepseek(gguf, config)


def deepseek2(gguf: GGUFFile, config: Config) -> Config:
    """DeepSeek V2 and V3, which differ in how they select experts; Mistral's large models."""
    turning = scalar(gguf, "rope.dimension_count")
    routing = routed(gguf, config) if "num_experts" in config else _without_experts(gguf, config)
    version = "3" if router_bias(gguf) or routing["scoring_func"] == "sigmoid" else "2"
    keys: Config = {
        **routing,
        "model_type": f"deepseek_v{version}",
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": gguf.key("attention.q_lora_rank", None),
        "kv_lora_rank": scalar(gguf, "attention.kv_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": config["head_dim"] - turning,
        "v_head_dim": scalar(gguf, "attention.value_length_mla"),
        "partial_rotary_factor": 1.0,
    }
    _write_mscale(gguf, config.get("rope_scaling") or {})
    warm = gguf.architecture == "mistral4" or gguf.key("attention.temperature_scale", 0.0)
    return keys | _mistral4(gguf, config, routing) if warm else keys


def _write_mscale(gguf: GGUFFile, scaling: Config) -> None:
    """Write llama.cpp's factors of queries and keys as ``mscale`` and ``mscale_all_dim``.

    It has a factor on whole heads and another on their rotated part, from a key that its converter
    divides by ten. In ``rope_scaling``, ``mscale_all_dim`` is the former by YaRN's formula and
    ``mscale`` the product of both.
    """
    factor = scaling.get("factor", 1.0)
    if factor < 1:
        raise gguf.key_error("rope.scaling.factor", expected="at least 1")
    if factor == 1:
        return
    growth = 0.1 * math.log(factor)
    stated = 0.0
    if gguf.architecture != "glm-dsa":  # the one that ignores it
        stated = 10 * float_of(gguf, "rope.scaling.yarn_log_multiplier", 0.0)
    yarn = scaling["type"] == "yarn"
    # DeepSeek 2 has the same factor twice, which cancels out; without YaRN nothing does.
    both = stated if gguf.architecture == "deepseek2" and stated and yarn else 1.0
    rotated = (1 + both * growth) / (1 + stated * growth if yarn else 1)
    rotated *= float_of(gguf, "rope.scaling.attn_factor", 1.0)
    whole = rotated * (1 + stated * growth)
    scaling["mscale_all_dim"] = tidy((whole - 1) / growth)
    scaling["mscale"] = tidy(((rotated if yarn else 1) * whole - 1) / growth)


def _without_experts(gguf: GGUFFile, config: Config) -> Config:
    """Youtu-LLM: latent attention with dense layers alone."""
    layers = config["num_hidden_layers"]
    if scalar(gguf, "leading_dense_block_count", 0) < layers:
        needs_experts(gguf, config)
    return {"n_routed_experts": None, "first_k_dense_replace": layers, "scoring_func": "sigmoid"}


def _mistral4(gguf: GGUFFile, config: Config, routing: Config) -> Config:
    """Mistral Large 3 and Small 4: queries scaled by position."""
    only(gguf, "expert_gating_func", 1, 0)
    no_router_bias(gguf)
    scaling = dict(config.get("rope_scaling") or {"rope_type": "default", "type": "default"})
    context = config["max_position_embeddings"]
    length = scalar(gguf, "attention.temperature_length", context) or context
    if scaling.setdefault("original_max_position_embeddings", length) != length:
        raise gguf.key_error(
            "attention.temperature_length",
            expected="the context before scaling, which this model's class has for both",
        )
    scaling["llama_4_scaling_beta"] = float_of(gguf, "attention.temperature_scale", 0.0)
    scaling["rope_theta"] = config["rope_theta"]
    return {
        "model_type": "mistral4",
        "architectures": ["Mistral4ForCausalLM"],
        "rope_parameters": scaling,
        "rope_scaling": None,
    }


def _dots1(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "expert_gating_func", 2)
    return routed(gguf, config)


def _bailing(gguf: GGUFFile, config: Config) -> Config:
    width = config["hidden_size"] // config["num_attention_heads"]
    only(gguf, "attention.key_length", width)
    return {
        **routed(gguf, config),
        "score_function": gating(gguf),
        "num_shared_experts": shared_count(gguf, config),
        "moe_router_enable_expert_bias": any("exp_probs_b" in t.name for t in gguf.tensors),
        "use_qkv_bias": config["attention_bias"] or "blk.0.attn_qkv.bias" in gguf,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in gguf,
    }


def _bailing1(gguf: GGUFFile, config: Config) -> Config:
    # Constants of llama.cpp.
    fixed = {"score_function": "softmax", "first_k_dense_replace": 0}
    return {**_bailing(gguf, config), **fixed}


def _ernie(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "interleave_moe_layer_step", 1)
    fixed = {"score_function": "softmax", "norm_topk_prob": True, "routed_scaling_factor": 1.0}
    return {**_bailing(gguf, config), **fixed}


def _halves_but_values(gguf: GGUFFile, rows: int) -> npt.NDArray[np.intp]:
    """The row order :func:`halves` for queries and keys, which come before the values."""
    parts = fused_qkv(gguf)
    turned = rows - parts[-1][1]
    return np.concatenate([halves(gguf, turned), np.arange(turned, rows)])


_BAILING = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "attn_q_norm": "attention.query_layernorm",
    "attn_k_norm": "attention.key_layernorm",
    **FFN_NORM,
    **DENSE_OR_MOE,
    "ffn_gate_inp": "mlp.gate.gate_proj",
    "exp_probs_b.bias": "mlp.gate.expert_bias",
}

_BAILING_1 = Architecture(
    "bailing_moe",
    "BailingMoeForCausalLM",
    _BAILING,
    ends={"token_embd": "model.word_embeddings"},
    keys=_bailing1,
    joins={"attn_qkv": QKV},
    order={"attn_qkv": _halves_but_values},
    optional=MOE_OPTIONAL | frozenset(QK_NORMS),
)

DEEPSEEK_2 = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        **MLA_Q,
        **MLA_KV,
        **MLA_ABSORBED,
        "attn_output": "self_attn.o_proj",
        **FFN_NORM,
        **DENSE_OR_MOE,
    },
    keys=deepseek2,
    parts={"ffn_gate_up_exps": gate_and_up},
    optional=MOE_OPTIONAL | {"attn_q", "attn_q_a", "attn_q_a_norm", "attn_q_b"},
    partial_rotary=True,
)

_DEEPSEEK = Architecture(
    "deepseek",
    "DeepseekForCausalLM",
    without(MOE_LAYER, *ROUTER_BIAS),
    keys=_deepseek,
    order=PERMUTED,
    optional=MOE_OPTIONAL,
)


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
        raise gguf.key_error(
            "attention.indexer.types",
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
        renamed(MOE_LAYER | QK_NORMS, "switch_mlp", "experts"),
        keys=_dots1,
        optional=MOE_OPTIONAL,
    ),
    # Ernie's own class in mlx-lm has no bias on the selection; Bailing's has.
    "ernie4_5-moe": replace(_BAILING_1, keys=_ernie),
    "glm-dsa": replace(DEEPSEEK_2, layer={**DEEPSEEK_2.layer, **_INDEX}, keys=_glm_dsa),
    "mistral4": DEEPSEEK_2,
}
