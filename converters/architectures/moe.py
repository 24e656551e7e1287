"""Other mixtures of experts: gpt-oss, Hunyuan, MiniMax, and those with sliding windows."""

from __future__ import annotations

from functools import partial
from typing import Any

from converters.architectures import names
from converters.architectures.base import Architecture
from converters.architectures.hyperparameters import Config, Hyperparameters


def _gpt_oss(hp: Hyperparameters) -> Config:
    hp.one_base()
    return {**hp.windows(2), "intermediate_size": hp["moe_intermediate_size"]}


def _minimax_m2(hp: Hyperparameters) -> Config:
    hp.only("expert_gating_func", 2)
    hp.unscaled()
    return {
        "intermediate_size": hp["moe_intermediate_size"],
        "shared_intermediate_size": 0,
        "rotary_dim": hp.integer("rope.dimension_count", hp["head_dim"]),
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
    }


def _hunyuan_moe(hp: Hyperparameters) -> Config:
    hp.unscaled()
    return {
        "moe_topk": hp["num_experts_per_tok"],
        "num_shared_expert": 1,
        "intermediate_size": hp.shared_width,
        "use_qk_norm": True,
    }


def _minimax_m3(hp: Hyperparameters) -> Config:
    """The text section of a vision-language model."""
    hp.only("expert_gating_func", 2)
    hp.only("expert_weights_norm", True, absent=False)
    hp.unscaled()
    routing = hp.routed()
    dense = routing["first_k_dense_replace"]
    layers = range(hp["num_hidden_layers"])
    text = {
        **hp.config,
        "model_type": "minimax_m3",
        "routed_scaling_factor": routing["routed_scaling_factor"],
        "intermediate_size": hp["moe_intermediate_size"],
        "dense_intermediate_size": hp["intermediate_size"],
        "shared_intermediate_size": hp.shared_width,
        "rotary_dim": hp.integer("rope.dimension_count", hp["head_dim"]),
        "use_qk_norm": True,
        "use_gemma_norm": False,  # files have added the one already
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in layers],
        "sparse_attention_freq": [int(i >= dense) for i in layers],
        "index_n_heads": hp.integer("attention.indexer.head_count"),
        "index_head_dim": hp.integer("attention.indexer.key_length"),
        "index_block_size": hp.integer("attention.indexer.block_size"),
        "index_topk_blocks": hp.integer("attention.indexer.top_k"),
        "index_local_blocks": hp.integer("attention.indexer.local_blocks"),
    }
    return {"text_config": text}


_BLOCK_INDEX = {
    f"indexer.{side}_{kind}.weight": f"self_attn.index_{side}_{kind}.weight"
    for side in "qk"
    for kind in ("proj", "norm")
}

_MINIMAX_EXPERTS = {
    **names.renamed(names.MOE | names.SHARED_EXPERTS, "mlp.", "block_sparse_moe."),
    "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
}


def _afmoe(hp: Hyperparameters) -> Config:
    found = _mixed_windows(hp, 4)
    # llama.cpp rotates all but every fourth layer, mlx-lm those with a window.
    hp.refuse_if(
        any((i % 4 != 3) != (k != "full_attention") for i, k in enumerate(found["layer_types"])),
        "attention.sliding_window_pattern",
        "every fourth layer without a window",
    )
    routing = hp.routed()
    return {
        **found,
        # Full attention has no positions, so its base does not matter.
        "rope_theta": hp.number("rope.freq_base_swa", hp["rope_theta"]),
        "n_group": routing["n_group"],
        "topk_group": routing["topk_group"],
        "num_dense_layers": routing["first_k_dense_replace"],
        "num_shared_experts": hp.shared_count,
        "route_norm": routing["norm_topk_prob"],
        "route_scale": routing["routed_scaling_factor"],
        "score_func": hp.gating(2),
        "mup_enabled": True,
    }


def _exaone_moe(hp: Hyperparameters) -> Config:
    hp.only("expert_gating_func", 2)
    routing = hp.routed()
    dense = routing["first_k_dense_replace"]
    return {
        **routing,
        **_mixed_windows(hp, 4),
        "num_shared_experts": hp.shared_count,
        "is_moe_layer": [i >= dense for i in range(hp["num_hidden_layers"])],
    }


def _mellum(hp: Hyperparameters) -> Config:
    hp.unscaled("yarn", "llama3", "longrope")
    plain = {"rope_type": "default", "rope_theta": hp["rope_theta"]}
    full = {**plain, **(hp.config.get("rope_scaling") or {})}
    return {
        **_mixed_windows(hp, 4),
        "norm_topk_prob": True,
        "rope_parameters": {"full_attention": full, "sliding_attention": plain},
    }


def _laguna(hp: Hyperparameters) -> Config:
    hp.only("expert_weights_norm", True, absent=False)
    hp.only("expert_gating_func", 2, 0)
    hp.unscaled("yarn")
    layers, head_dim = hp["num_hidden_layers"], hp["head_dim"]
    found = hp.windows(4, full_first=True)
    full = {
        "rope_type": "default",
        "rope_theta": hp["rope_theta"],
        "partial_rotary_factor": hp["partial_rotary_factor"],
        **(hp.config.get("rope_scaling") or {}),
    }
    rope_dim = hp.integer("rope.dimension_count", head_dim)
    sliding = {
        "rope_type": "default",
        "rope_theta": hp.number("rope.freq_base_swa", hp["rope_theta"]),
        "partial_rotary_factor": hp.integer("rope.dimension_count_swa", rope_dim) / head_dim,
    }
    routing = hp.routed()
    dense = routing["first_k_dense_replace"]
    return {
        "layer_types": ["full_attention"] * layers,
        "sliding_window": None,
        **found,
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "num_attention_heads_per_layer": hp.values_per_layer("attention.head_count"),
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(layers)],
        "shared_expert_intermediate_size": hp.shared_width,
        "moe_routed_scaling_factor": routing["routed_scaling_factor"],
    }


def _mimo2(hp: Hyperparameters) -> Config:
    hp.unscaled()
    layers = range(hp["num_hidden_layers"])
    kinds = _mixed_windows(hp, 1)["layer_types"]
    sliding = [kind == "sliding_attention" for kind in kinds]
    sinks = [f"blk.{i}.attn_sinks.weight" in hp for i in layers]
    heads, kv_heads = (hp.values_per_layer(f"attention.head_count{x}") for x in ("", "_kv"))
    common = partial(_common, hp, sliding)
    width, values = hp["head_dim"], hp.integer("attention.value_length", hp["head_dim"])

    return {
        **hp.routed(),
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.0,
        "n_shared_experts": None,
        "hybrid_layer_pattern": [int(x) for x in sliding],
        "moe_layer_freq": [int(f"blk.{i}.ffn_gate_inp.weight" in hp) for i in layers],
        "add_swa_attention_sink_bias": common("attn_sinks", sinks, True),
        "add_full_attention_sink_bias": common("attn_sinks", sinks, False),
        "sliding_window_size": hp.integer("attention.sliding_window"),
        "layernorm_epsilon": hp["rms_norm_eps"],
        "swa_rope_theta": hp.number("rope.freq_base_swa", 10000.0),
        "num_attention_heads": common("attention.head_count", heads, False),
        "num_key_value_heads": common("attention.head_count_kv", kv_heads, False),
        "swa_num_attention_heads": common("attention.head_count", heads, True),
        "swa_num_key_value_heads": common("attention.head_count_kv", kv_heads, True),
        "v_head_dim": values,
        "swa_head_dim": width,
        "swa_v_head_dim": values,
        "attention_value_scale": hp.number("attention.value_scale", 1.0),
    }


def _step35(hp: Hyperparameters) -> Config:
    hp.unscaled("longrope")
    hp.only("expert_gating_func", 2, 0)
    routing, found = hp.routed(), _mixed_windows(hp, 1)
    sliding = [kind == "sliding_attention" for kind in found["layer_types"]]
    head_dim = hp["head_dim"]
    rope_dim = hp.integer("rope.dimension_count", head_dim)
    factors = hp.config.get("rope_scaling")
    if factors:  # one per pair of a head; full attention rotates half of them
        half = factors["long_factor"][: rope_dim // 4]
        factors |= {"long_factor": half, "short_factor": half}
    common = partial(_common, hp, sliding)
    heads, kv_heads = (hp.values_per_layer(f"attention.head_count{x}") for x in ("", "_kv"))
    local = hp.number("rope.freq_base_swa", 10000.0)
    part = hp.integer("rope.dimension_count_swa", rope_dim) / head_dim
    layers = range(hp["num_hidden_layers"])
    sparse = [str(i) for i in layers if f"blk.{i}.ffn_gate_inp.weight" in hp]
    return {
        **found,
        "num_attention_heads": common("attention.head_count", heads, False),
        "num_attention_groups": common("attention.head_count_kv", kv_heads, False),
        "attention_other_setting": {
            "num_attention_heads": common("attention.head_count", heads, True),
            "num_attention_groups": common("attention.head_count_kv", kv_heads, True),
        },
        "rope_theta": [local if x else hp["rope_theta"] for x in sliding],
        "partial_rotary_factors": [part if x else rope_dim / 2 / head_dim for x in sliding],
        "yarn_only_types": ["full_attention"],
        "use_head_wise_attn_gate": "blk.0.attn_gate.weight" in hp,
        "moe_num_experts": hp["num_experts"],
        "moe_top_k": hp["num_experts_per_tok"],
        "share_expert_dim": hp.shared_width,
        "moe_layers_enum": ",".join(sparse),
        "moe_router_scaling_factor": routing["routed_scaling_factor"],
        "norm_expert_weight": routing["norm_topk_prob"],
        "swiglu_limits": hp.values_per_layer("swiglu_clamp_exp", 0.0),
        "swiglu_limits_shared": hp.values_per_layer("swiglu_clamp_shexp", 0.0),
    }


def _common(
    hp: Hyperparameters, sliding: list[bool], name: str, numbers: list[Any], where: bool
) -> Any:
    """The value of all windowed layers (``where``), or of all others."""
    found = {number for number, there in zip(numbers, sliding, strict=True) if there == where}
    hp.refuse_if(
        len(found) != 1,
        f"{name}",
        "the same for all layers with a window, and for all without",
        str(sorted(found)),
    )
    return found.pop()


def _mixed_windows(hp: Hyperparameters, every: int) -> Config:
    """Windows, of a class that needs layers with and without."""
    found = hp.windows(every)
    kinds = set(found.get("layer_types", ()))
    hp.refuse_if(
        "sliding_attention" not in kinds or "full_attention" not in kinds,
        "attention.sliding_window",
        "a window in some layers and none in others",
    )
    return found


_LAYER = {**names.ATTENTION, **names.FFN_NORM, **names.QK_NORMS, **names.DENSE_OR_MOE}

_AFTER_BOTH = {"ffn_norm": "pre_mlp_layernorm", "post_ffw_norm": "post_mlp_layernorm"}

ROWS: dict[str, Architecture] = {
    "afmoe": Architecture(
        "afmoe",
        "AfmoeForCausalLM",
        {
            **names.renamed(_LAYER, "switch_mlp", "experts"),
            **names.AFTER_NORMS,
            **_AFTER_BOTH,
            "attn_gate": "self_attn.gate_proj",
            "ffn_gate_inp": "mlp.router.gate",
            "exp_probs_b.bias": "mlp.expert_bias",
        },
        keys=_afmoe,
        optional=names.MOE_OPTIONAL,
    ),
    "exaone-moe": Architecture(
        "exaone_moe", "ExaoneMoEForCausalLM", _LAYER, keys=_exaone_moe, optional=names.MOE_OPTIONAL
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **names.ATTENTION,
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            **names.renamed(names.without(names.MOE, "ffn_gate_inp"), "switch_mlp", "experts"),
        },
        keys=_gpt_oss,
    ),
    "hunyuan-moe": Architecture(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        {
            **names.MOE_LLAMA,
            **names.HUNYUAN_NORMS,
            **names.renamed(names.SHARED_EXPERTS, "shared_experts", "shared_mlp"),
            "ffn_gate_inp": "mlp.gate.wg",
        },
        keys=_hunyuan_moe,
    ),
    "laguna": Architecture(
        "laguna",
        "LagunaForCausalLM",
        {
            **names.renamed(_LAYER, "shared_experts", "shared_expert"),
            "attn_gate": "self_attn.g_proj",
            "ffn_gate_inp": "mlp.gate.proj",
        },
        keys=_laguna,
        optional=names.MOE_OPTIONAL,
        partial_rotary=True,
        per_layer=True,
    ),
    "mellum": Architecture(
        "mellum", "MellumForCausalLM", {**names.MOE_LLAMA, **names.QK_NORMS}, keys=_mellum
    ),
    "mimo2": Architecture(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {
            **names.ATTENTION,
            **names.FFN_NORM,
            **names.DENSE_OR_MOE,
            "attn_sinks.weight": "self_attn.attention_sink_bias",
        },
        keys=_mimo2,
        optional=names.MOE_OPTIONAL | {"attn_sinks.weight"},
        partial_rotary=True,
        value_width=True,
        per_layer=True,
    ),
    "minimax-m2": Architecture(
        "minimax",
        "MiniMaxM2ForCausalLM",
        {
            **names.renamed(names.MOE_LLAMA | names.QK_NORMS, "mlp.", "block_sparse_moe."),
            "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
        },
        keys=_minimax_m2,
        partial_rotary=True,
    ),
    "minimax-m3": Architecture(
        "minimax_m3_vl",
        "MiniMaxM3VLForConditionalGeneration",
        {
            **names.ATTENTION,
            **names.FFN_NORM,
            **names.QK_NORMS,
            **names.GATED,
            **_MINIMAX_EXPERTS,
            **_BLOCK_INDEX,
        },
        ends=names.LANGUAGE_MODEL,
        prefix=names.LANGUAGE_MODEL_LAYERS,
        keys=_minimax_m3,
        optional=frozenset(names.GATED | _MINIMAX_EXPERTS | _BLOCK_INDEX),
        partial_rotary=True,
    ),
    "step35": Architecture(
        "step3p5",
        "Step3p5ForCausalLM",
        {
            **names.renamed(_LAYER, "shared_experts", "share_expert"),
            "attn_gate": "self_attn.g_proj",
            "ffn_gate_inp": "mlp.gate.gate",
            "exp_probs_b.bias": "mlp.gate.router_bias",
        },
        keys=_step35,
        optional=names.MOE_OPTIONAL | {"attn_gate"},
        partial_rotary=True,
        per_layer=True,
    ),
}
