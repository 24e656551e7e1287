"""Many small experts, some of them for every token, behind a few dense layers.

DeepSeekMoE (arXiv:2401.06066) and the many models that took it over.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from converters.gguf.architectures.fused import gate_and_up
from converters.gguf.architectures.keys import (
    correction,
    fused_qkv,
    gating,
    needs_experts,
    only,
    routed,
    shared_count,
    uncorrected,
    unscaled,
)
from converters.gguf.architectures.row import (
    ATTENTION,
    BIASED_QKV,
    CORRECTION,
    FFN_NORM,
    PERMUTED,
    QK_NORMS,
    SOMETIMES_SPARSE,
    Architecture,
    Config,
    halves,
    renamed,
    without,
)
from converters.gguf.numbers import float_of, scalar, tidy
from converters.gguf.reader import GGUFFile


def _deepseek(gguf: GGUFFile, config: Config) -> Config:
    # llama.cpp neither asks the file nor normalises.
    return {**routed(gguf, config), "norm_topk_prob": False, "scoring_func": "softmax"}


def _deepseek2_ocr(gguf: GGUFFile, config: Config) -> Config:
    """The text model of DeepSeek OCR is a DeepSeek 1 whose heads are stored in halves."""
    only(gguf, "expert_gating_func", 1, 0)
    only(gguf, "expert_weights_norm", False)
    uncorrected(gguf)
    unscaled(gguf, config)
    return _deepseek(gguf, config)


def deepseek2(gguf: GGUFFile, config: Config) -> Config:
    """DeepSeek V2 and V3, which their choice of experts tells apart; Mistral's large models."""
    turning = scalar(gguf, "rope.dimension_count")
    routing = routed(gguf, config) if "num_experts" in config else _without_experts(gguf, config)
    version = "3" if correction(gguf) or routing["scoring_func"] == "sigmoid" else "2"
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
    _sharpen(gguf, config.get("rope_scaling") or {})
    warm = gguf.architecture == "mistral4" or gguf.key("attention.temperature_scale", 0.0)
    return keys | _mistral4(gguf, config, routing) if warm else keys


def _sharpen(gguf: GGUFFile, scaling: Config) -> None:
    """Put what llama.cpp multiplies queries and keys by into a section on scaling.

    It has a factor for all of a head and another for the part that turns, from a key that its
    converter stores a tenth of. In a section, ``mscale_all_dim`` gives the former by YaRN's
    formula, and ``mscale`` the product of both.
    """
    factor = scaling.get("factor", 1.0)
    if factor < 1:
        raise gguf.error(f"{gguf.architecture}.rope.scaling.factor", expected="at least 1")
    if factor == 1:
        return
    growth = 0.1 * math.log(factor)
    stated = 0.0
    if gguf.architecture != "glm-dsa":  # the one that does not ask for it
        stated = 10 * float_of(gguf, "rope.scaling.yarn_log_multiplier", 0.0)
    yarn = scaling["type"] == "yarn"
    # DeepSeek 2 has the same factor twice, which cancels out; without YaRN nothing does.
    both = stated if gguf.architecture == "deepseek2" and stated and yarn else 1.0
    turned = (1 + both * growth) / (1 + stated * growth if yarn else 1)
    turned *= float_of(gguf, "rope.scaling.attn_factor", 1.0)
    whole = turned * (1 + stated * growth)
    scaling["mscale_all_dim"] = tidy((whole - 1) / growth)
    scaling["mscale"] = tidy(((turned if yarn else 1) * whole - 1) / growth)


def _without_experts(gguf: GGUFFile, config: Config) -> Config:
    """Youtu-LLM: latent attention with dense layers alone."""
    layers = config["num_hidden_layers"]
    if scalar(gguf, "leading_dense_block_count", 0) < layers:
        needs_experts(gguf, config)
    return {"n_routed_experts": None, "first_k_dense_replace": layers, "scoring_func": "sigmoid"}


def _mistral4(gguf: GGUFFile, config: Config, routing: Config) -> Config:
    """Mistral Large 3 and Small 4: queries that sharpen with their position."""
    only(gguf, "expert_gating_func", 1, 0)
    uncorrected(gguf)
    scaling = dict(config.get("rope_scaling") or {"rope_type": "default", "type": "default"})
    context = config["max_position_embeddings"]
    length = scalar(gguf, "attention.temperature_length", context) or context
    if scaling.setdefault("original_max_position_embeddings", length) != length:
        raise gguf.error(
            f"{gguf.architecture}.attention.temperature_length",
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


def _hy_v3(gguf: GGUFFile, config: Config) -> Config:
    """GLM 4.5's layers; its files say by their tensors which of them have experts."""
    layers = range(config["num_hidden_layers"])
    sparse = [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" in gguf]
    return {
        **_glm4moe(gguf, config),
        "first_k_dense_replace": min(sparse, default=len(layers)),
        "n_shared_experts": shared_count(gguf, config),
    }


def _glm4moe(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "expert_gating_func", 2, 0)
    return {
        **routed(gguf, config),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_scaling": config.get("rope_scaling"),  # mlx-lm asks for it, be it null
        "use_qk_norm": "blk.0.attn_q_norm.weight" in gguf,
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
    # llama.cpp asks the file for neither.
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


_LAYER = {**ATTENTION, **FFN_NORM, **SOMETIMES_SPARSE}
_OPTIONAL = frozenset(SOMETIMES_SPARSE)
_BAILING = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "attn_q_norm": "attention.query_layernorm",
    "attn_k_norm": "attention.key_layernorm",
    **FFN_NORM,
    **SOMETIMES_SPARSE,
    "ffn_gate_inp": "mlp.gate.gate_proj",
    "exp_probs_b.bias": "mlp.gate.expert_bias",
}
_BAILING_1 = Architecture(
    "bailing_moe",
    "BailingMoeForCausalLM",
    _BAILING,
    ends={"token_embd": "model.word_embeddings"},
    keys=_bailing1,
    joins={"attn_qkv": ("attn_q", "attn_k", "attn_v")},
    order={"attn_qkv": _halves_but_values},
    optional=_OPTIONAL | frozenset(QK_NORMS),
)

DEEPSEEK_2 = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_k_b": "self_attn.embed_q",
        "attn_v_b": "self_attn.unembed_out",
        "attn_output": "self_attn.o_proj",
        **FFN_NORM,
        **SOMETIMES_SPARSE,
    },
    keys=deepseek2,
    parts={"ffn_gate_up_exps": gate_and_up},
    optional=_OPTIONAL | {"attn_q", "attn_q_a", "attn_q_a_norm", "attn_q_b"},
    partial_rotary=True,
)

_DEEPSEEK = Architecture(
    "deepseek",
    "DeepseekForCausalLM",
    without(_LAYER, *CORRECTION),
    keys=_deepseek,
    order=PERMUTED,
    optional=_OPTIONAL,
)

FINE_GRAINED: dict[str, Architecture] = {
    "bailingmoe": _BAILING_1,
    "bailingmoe2": replace(_BAILING_1, keys=_bailing, joins={}, order={}, partial_rotary=True),
    "deepseek": _DEEPSEEK,
    "deepseek2": DEEPSEEK_2,
    "deepseek2-ocr": replace(_DEEPSEEK, keys=_deepseek2_ocr, order={}),
    "dots1": Architecture(
        "dots1",
        "Dots1ForCausalLM",
        renamed(_LAYER | QK_NORMS, "switch_mlp", "experts"),
        keys=_dots1,
        optional=_OPTIONAL,
    ),
    # Ernie's own class in mlx-lm has no place for the correction of the choice; Bailing's has.
    "ernie4_5-moe": replace(_BAILING_1, keys=_ernie),
    "glm4moe": Architecture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **without(_LAYER, "ffn_norm"),
            **QK_NORMS,
            "post_attention_norm": "post_attention_layernorm",
        },
        keys=_glm4moe,
        optional=_OPTIONAL | frozenset(QK_NORMS),
        zero_biases=(BIASED_QKV,),
        partial_rotary=True,
    ),
    "hy_v3": Architecture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **without(_LAYER, *CORRECTION),
            **QK_NORMS,
            "exp_probs_b": "mlp.gate.e_score_correction_bias",
        },
        keys=_hy_v3,
        parts={"ffn_gate_up_exps": gate_and_up},
        optional=_OPTIONAL | {"exp_probs_b"},
        zero_biases=(BIASED_QKV,),
    ),
    "mistral4": DEEPSEEK_2,
}
