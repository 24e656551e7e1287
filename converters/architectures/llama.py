"""Llama, Mistral, and others of their layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from converters.architectures import names
from converters.architectures.base import PERMUTED, Architecture, fixed
from converters.architectures.hyperparameters import Config, Hyperparameters


def _mistral3(hp: Hyperparameters) -> Config:
    """One section for RoPE, as Hugging Face has it for this family."""
    scaling = dict(hp.config.get("rope_scaling") or {"rope_type": "default", "type": "default"})
    # Stock mlx-lm needs both keys, even without scaled queries.
    scaling["llama_4_scaling_beta"] = hp.number("attention.temperature_scale", 0.0)
    context = hp["max_position_embeddings"]
    original = hp.integer("rope.scaling.original_context_length", context)
    scaling.setdefault("original_max_position_embeddings", original or context)
    scaling["rope_theta"] = hp["rope_theta"]
    return {"rope_parameters": scaling}


def _baichuan(hp: Hyperparameters) -> Config:
    """The larger model has ALiBi, and is known by its depth only."""
    if hp["num_hidden_layers"] == 32:
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    hp.refuse_if(
        hp["num_hidden_layers"] != 40,
        "block_count",
        "the 32 layers of the 7B model or the 40 of the 13B one",
        str(hp["num_hidden_layers"]),
    )
    return {"position_embedding_type": "alibi", "max_alibi_bias": 8.0}


def _mixtral(hp: Hyperparameters) -> Config:
    if hp.architecture == "mistral3":
        hp.only("attention.temperature_scale", 0.0)
    return {}


def _llama4(hp: Hyperparameters) -> Config:
    """The text section of a vision-language model."""
    hp.needs_experts()
    hp.only("expert_used_count", 1)
    hp.only("attention.sliding_window_pattern", 4)
    hp.unscaled("linear", "llama3", "yarn")
    hp.refuse_if(
        not hp.key("attention.sliding_window", 8192),
        "attention.sliding_window",
        "chunks in three of four layers",
    )
    text = {
        **hp.config,
        "model_type": "llama4_text",
        "intermediate_size": hp["moe_intermediate_size"],
        "intermediate_size_mlp": hp["intermediate_size"],
        "interleave_moe_layer_step": hp.integer("interleave_moe_layer_step"),
        "use_qk_norm": hp["num_experts"] != 128,  # the larger model is known by this only
        "rope_theta": hp.number("rope.freq_base_swa", hp["rope_theta"]),
        "rope_scaling": hp.config.get("rope_scaling"),
        # Constants of llama.cpp.
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": 4,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }
    return {"text_config": text}


_LLAMA_4 = {
    **names.renamed(names.GATED, "mlp.", "feed_forward."),
    **names.renamed(names.MOE, "mlp.switch_mlp", "feed_forward.experts"),
    **names.renamed(names.SHARED_EXPERTS, "mlp.shared_experts", "feed_forward.shared_expert"),
    "ffn_gate_inp": "feed_forward.router",
}


def _nanbeige(hp: Hyperparameters) -> Config:
    return {
        "num_loops": hp.integer("num_loops", 1),
        "skip_loop_final_norm": bool(hp.key("skip_loop_final_norm", False)),
    }


def _deci(hp: Hyperparameters) -> Config:
    """Llama with layers pruned by architecture search, each by itself."""
    heads, hidden = hp["num_attention_heads"], hp["hidden_size"]
    hp.whole_heads()
    blocks = []
    for i, (q, k, size) in enumerate(zip(*_deci_sizes(hp), strict=True)):
        # llama.cpp skips the attention of a layer without a feed-forward.
        hp.refuse_if(
            q not in (0, heads) or (q and not size) or size % 256,
            "feed_forward_length",
            "all heads or none, none without a feed-forward, and steps of 256",
            f"{q} heads and {size} in layer {i}",
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


def _deci_sizes(hp: Hyperparameters) -> list[list[Any]]:
    """Heads, KV heads and feed-forward widths of each layer."""
    suffixes = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    return [hp.values_per_layer(suffix) for suffix in suffixes]


def _deci_names(hp: Hyperparameters, layer: int) -> dict[str, str]:
    """A layer without KV heads has one matrix for its attention."""
    queries, keys, _ = (sizes[layer] for sizes in _deci_sizes(hp))
    return {"attn_output": "self_attn.linear"} if queries and not keys else {}


_llama = partial(Architecture, "llama", "LlamaForCausalLM")

ROWS: dict[str, Architecture] = {
    "arcee": Architecture(
        "arcee",
        "ArceeForCausalLM",
        {**names.ATTENTION, **names.FFN_NORM, **names.UNGATED},
        keys=fixed(hidden_act="relu2"),
        order=PERMUTED,
        zero_biases=(names.BIASED_ATTENTION,),
    ),
    "baichuan": Architecture("baichuan", "BaichuanForCausalLM", keys=_baichuan, order=PERMUTED),
    "deci": Architecture(
        "nemotron-nas",
        "DeciLMForCausalLM",
        keys=_deci,
        by_layer=_deci_names,
        order=PERMUTED,
        optional=frozenset(names.LLAMA),
        zero_biases=names.LLAMA_BIASES,
        per_layer=True,
    ),
    "ernie4_5": _llama(keys=fixed(rope_traditional=True), zero_biases=names.LLAMA_BIASES),
    "exaone": _llama(zero_biases=names.LLAMA_BIASES),
    "internlm2": _llama(order=PERMUTED, zero_biases=names.LLAMA_BIASES),
    "llama": _llama(order=PERMUTED, zero_biases=names.LLAMA_BIASES),
    "llama4": Architecture(
        "llama4",
        "Llama4ForConditionalGeneration",
        names.ATTENTION | names.FFN_NORM | _LLAMA_4,
        ends=names.LANGUAGE_MODEL,
        prefix=names.LANGUAGE_MODEL_LAYERS,
        keys=_llama4,
        optional=frozenset(_LLAMA_4),
    ),
    "mistral3": Architecture("ministral3", "Ministral3ForCausalLM", keys=_mistral3, order=PERMUTED),
    # GGUF calls it llama, with experts.
    "mixtral": Architecture(
        "mixtral",
        "MixtralForCausalLM",
        names.renamed(names.MOE_LLAMA, "mlp.", "block_sparse_moe."),
        keys=_mixtral,
        order=PERMUTED,
    ),
    "nanbeige": Architecture(
        "nanbeige",
        "NanbeigeForCausalLM",
        keys=_nanbeige,
        order=PERMUTED,
        zero_biases=names.LLAMA_BIASES,
    ),
    "paddleocr": _llama(
        keys=lambda hp: hp.text_rope(interleaved=False), zero_biases=names.LLAMA_BIASES
    ),
    "pangu-embedded": _llama(zero_biases=names.LLAMA_BIASES),
    "refact": Architecture(
        "refact",
        "GPTRefactForCausalLM",
        keys=fixed(position_embedding_type="alibi", max_alibi_bias=8.0),
        zero_biases=names.LLAMA_BIASES,
    ),
    "seed_oss": Architecture(
        "seed_oss",
        "SeedOssForCausalLM",
        {**names.ATTENTION, "post_attention_norm": "post_attention_layernorm", **names.GATED},
        zero_biases=(names.QKV,),
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", order=PERMUTED),
    "xverse": _llama(order=PERMUTED),
}
