"""Llama, Mistral, and others of their layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from converters.architectures.base import (
    ATTENTION,
    BIASED_ATTENTION,
    FFN_NORM,
    GATED,
    LANGUAGE_MODEL,
    LANGUAGE_MODEL_LAYERS,
    LLAMA,
    LLAMA_BIASES,
    MOE,
    MOE_LLAMA,
    PERMUTED,
    QKV,
    SHARED_EXPERTS,
    UNGATED,
    Architecture,
    Config,
    fixed,
    needs_experts,
    only,
    renamed,
    text_of_vl,
    unscaled,
    whole_heads,
)
from converters.gguf.reader import GGUFFile
from converters.gguf.validate import float_of, scalar, values_per_layer


def _mistral3(gguf: GGUFFile, config: Config) -> Config:
    """One section for RoPE, as Hugging Face has it for this family."""
    scaling = dict(config.get("rope_scaling") or {"rope_type": "default", "type": "default"})
    # Stock mlx-lm needs both keys, even without scaled queries.
    scaling["llama_4_scaling_beta"] = float_of(gguf, "attention.temperature_scale", 0.0)
    context = config["max_position_embeddings"]
    original = scalar(gguf, "rope.scaling.original_context_length", context)
    scaling.setdefault("original_max_position_embeddings", original or context)
    scaling["rope_theta"] = config["rope_theta"]
    return {"rope_parameters": scaling}


def _baichuan(gguf: GGUFFile, config: Config) -> Config:
    """The larger model has ALiBi, and is known by its depth only."""
    if config["num_hidden_layers"] == 32:
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if config["num_hidden_layers"] != 40:
        raise gguf.key_error(
            "block_count",
            expected="the 32 layers of the 7B model or the 40 of the 13B one",
            found=str(config["num_hidden_layers"]),
        )
    return {"position_embedding_type": "alibi", "max_alibi_bias": 8.0}


def _mixtral(gguf: GGUFFile, config: Config) -> Config:
    if gguf.architecture == "mistral3":
        only(gguf, "attention.temperature_scale", 0.0)
    return {}


def _llama4(gguf: GGUFFile, config: Config) -> Config:
    """The text section of a vision-language model."""
    needs_experts(gguf, config)
    only(gguf, "expert_used_count", 1)
    only(gguf, "attention.sliding_window_pattern", 4)
    unscaled(gguf, config, "linear", "llama3", "yarn")
    if not gguf.key("attention.sliding_window", 8192):
        raise gguf.key_error("attention.sliding_window", expected="chunks in three of four layers")
    text = {
        **config,
        "model_type": "llama4_text",
        "intermediate_size": config["moe_intermediate_size"],
        "intermediate_size_mlp": config["intermediate_size"],
        "interleave_moe_layer_step": scalar(gguf, "interleave_moe_layer_step"),
        "use_qk_norm": config["num_experts"] != 128,  # the larger model is known by this only
        "rope_theta": float_of(gguf, "rope.freq_base_swa", config["rope_theta"]),
        "rope_scaling": config.get("rope_scaling"),
        # Constants of llama.cpp.
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": 4,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }
    return {"text_config": text}


_LLAMA_4 = {
    **renamed(GATED, "mlp.", "feed_forward."),
    **renamed(MOE, "mlp.switch_mlp", "feed_forward.experts"),
    **renamed(SHARED_EXPERTS, "mlp.shared_experts", "feed_forward.shared_expert"),
    "ffn_gate_inp": "feed_forward.router",
}


def _nanbeige(gguf: GGUFFile, config: Config) -> Config:
    return {
        "num_loops": scalar(gguf, "num_loops", 1),
        "skip_loop_final_norm": bool(gguf.key("skip_loop_final_norm", False)),
    }


def _deci(gguf: GGUFFile, config: Config) -> Config:
    """Llama with layers pruned by architecture search, each by itself."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    whole_heads(gguf, config)
    blocks = []
    for i, (q, k, size) in enumerate(zip(*_deci_sizes(gguf), strict=True)):
        # llama.cpp skips the attention of a layer without a feed-forward.
        if q not in (0, heads) or (q and not size) or size % 256:
            raise gguf.key_error(
                "feed_forward_length",
                expected="all heads or none, none without a feed-forward, and steps of 256",
                found=f"{q} heads and {size} in layer {i}",
            )
        attention: Config = {"no_op": True} if not q else {"replace_with_linear": True}
        # The class rounds the width up to a multiple of 256.
        factor = (int(size) - 0.5) * 3 / (2 * hidden)
        blocks.append(
            {
                "attention": {"n_heads_in_group": int(q // k)} if k else attention,
                "ffn": {"ffn_mult": factor} if size else {"no_op": True},
            }
        )
    return {"block_configs": blocks}


def _deci_sizes(gguf: GGUFFile) -> list[list[Any]]:
    """Heads, KV heads and feed-forward widths of each layer."""
    suffixes = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    return [values_per_layer(gguf, suffix) for suffix in suffixes]


def _deci_names(gguf: GGUFFile, layer: int) -> dict[str, str]:
    """A layer without KV heads has one matrix for its attention."""
    queries, keys, _ = (sizes[layer] for sizes in _deci_sizes(gguf))
    return {"attn_output": "self_attn.linear"} if queries and not keys else {}


_llama = partial(Architecture, "llama", "LlamaForCausalLM")

ROWS: dict[str, Architecture] = {
    "arcee": Architecture(
        "arcee",
        "ArceeForCausalLM",
        {**ATTENTION, **FFN_NORM, **UNGATED},
        keys=fixed(hidden_act="relu2"),
        order=PERMUTED,
        zero_biases=(BIASED_ATTENTION,),
    ),
    "baichuan": Architecture("baichuan", "BaichuanForCausalLM", keys=_baichuan, order=PERMUTED),
    "deci": Architecture(
        "nemotron-nas",
        "DeciLMForCausalLM",
        keys=_deci,
        by_layer=_deci_names,
        order=PERMUTED,
        optional=frozenset(LLAMA),
        zero_biases=LLAMA_BIASES,
        per_layer=True,
    ),
    "ernie4_5": _llama(keys=fixed(rope_traditional=True), zero_biases=LLAMA_BIASES),
    "exaone": _llama(zero_biases=LLAMA_BIASES),
    "internlm2": _llama(order=PERMUTED, zero_biases=LLAMA_BIASES),
    "llama": _llama(order=PERMUTED, zero_biases=LLAMA_BIASES),
    "llama4": Architecture(
        "llama4",
        "Llama4ForConditionalGeneration",
        ATTENTION | FFN_NORM | _LLAMA_4,
        ends=LANGUAGE_MODEL,
        prefix=LANGUAGE_MODEL_LAYERS,
        keys=_llama4,
        optional=frozenset(_LLAMA_4),
    ),
    "mistral3": Architecture("ministral3", "Ministral3ForCausalLM", keys=_mistral3, order=PERMUTED),
    # GGUF calls it llama, with experts.
    "mixtral": Architecture(
        "mixtral",
        "MixtralForCausalLM",
        renamed(MOE_LLAMA, "mlp.", "block_sparse_moe."),
        keys=_mixtral,
        order=PERMUTED,
    ),
    "nanbeige": Architecture(
        "nanbeige", "NanbeigeForCausalLM", keys=_nanbeige, order=PERMUTED, zero_biases=LLAMA_BIASES
    ),
    "paddleocr": _llama(keys=text_of_vl, zero_biases=LLAMA_BIASES),
    "pangu-embedded": _llama(zero_biases=LLAMA_BIASES),
    "refact": Architecture(
        "refact",
        "GPTRefactForCausalLM",
        keys=fixed(position_embedding_type="alibi", max_alibi_bias=8.0),
        zero_biases=LLAMA_BIASES,
    ),
    "seed_oss": Architecture(
        "seed_oss",
        "SeedOssForCausalLM",
        {**ATTENTION, "post_attention_norm": "post_attention_layernorm", **GATED},
        zero_biases=(QKV,),
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", order=PERMUTED),
    "xverse": _llama(order=PERMUTED),
}
