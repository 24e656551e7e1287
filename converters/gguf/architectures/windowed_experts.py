"""Mixtures of experts of which most layers see a window only."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from converters.gguf.architectures.keys import (
    gating,
    only,
    routed,
    shared_count,
    shared_width,
    unscaled,
    windows,
)
from converters.gguf.architectures.row import (
    AFTER_NORMS,
    ATTENTION,
    FFN_NORM,
    QK_NORMS,
    SOMETIMES_SPARSE,
    SPARSE_LLAMA,
    Architecture,
    Config,
    renamed,
)
from converters.gguf.numbers import float_of, layer_count, scalar
from converters.gguf.reader import GGUFFile


def _afmoe(gguf: GGUFFile, config: Config) -> Config:
    found = _needed_windows(gguf, 4)
    # llama.cpp turns all but every fourth layer, mlx-lm those with a window.
    if any((i % 4 != 3) != (k != "full_attention") for i, k in enumerate(found["layer_types"])):
        raise gguf.error(
            f"{gguf.architecture}.attention.sliding_window_pattern",
            expected="every fourth layer without a window",
        )
    routing = routed(gguf, config)
    return {
        **found,
        # Layers without a window have no positions, so their base does not matter.
        "rope_theta": float_of(gguf, "rope.freq_base_swa", config["rope_theta"]),
        "n_group": routing["n_group"],
        "topk_group": routing["topk_group"],
        "num_dense_layers": routing["first_k_dense_replace"],
        "num_shared_experts": shared_count(gguf, config),
        "route_norm": routing["norm_topk_prob"],
        "route_scale": routing["routed_scaling_factor"],
        "score_func": gating(gguf, 2),
        "mup_enabled": True,
    }


def _exaone_moe(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "expert_gating_func", 2)
    routing = routed(gguf, config)
    dense = routing["first_k_dense_replace"]
    return {
        **routing,
        **_needed_windows(gguf, 4),
        "num_shared_experts": shared_count(gguf, config),
        "is_moe_layer": [i >= dense for i in range(config["num_hidden_layers"])],
    }


def _mellum(gguf: GGUFFile, config: Config) -> Config:
    unscaled(gguf, config, "yarn", "llama3", "longrope")
    plain = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    full = {**plain, **(config.get("rope_scaling") or {})}
    return {
        **_needed_windows(gguf, 4),
        "norm_topk_prob": True,
        "rope_parameters": {"full_attention": full, "sliding_attention": plain},
    }


def _laguna(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "expert_weights_norm", True, absent=False)
    only(gguf, "expert_gating_func", 2, 0)
    unscaled(gguf, config, "yarn")
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    found = windows(gguf, 4, full_first=True)
    full = {
        "rope_type": "default",
        "rope_theta": config["rope_theta"],
        "partial_rotary_factor": config["partial_rotary_factor"],
        **(config.get("rope_scaling") or {}),
    }
    turning = scalar(gguf, "rope.dimension_count", head_dim)
    sliding = {
        "rope_type": "default",
        "rope_theta": float_of(gguf, "rope.freq_base_swa", config["rope_theta"]),
        "partial_rotary_factor": scalar(gguf, "rope.dimension_count_swa", turning) / head_dim,
    }
    routing = routed(gguf, config)
    dense = routing["first_k_dense_replace"]
    return {
        "layer_types": ["full_attention"] * layers,
        "sliding_window": None,
        **found,
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "num_attention_heads_per_layer": per_layer(gguf, "attention.head_count"),
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(layers)],
        "shared_expert_intermediate_size": shared_width(gguf),
        "moe_routed_scaling_factor": routing["routed_scaling_factor"],
    }


def _mimo2(gguf: GGUFFile, config: Config) -> Config:
    unscaled(gguf, config)
    layers = range(config["num_hidden_layers"])
    kinds = _needed_windows(gguf, 1)["layer_types"]
    sliding = [kind == "sliding_attention" for kind in kinds]
    sinks = [f"blk.{i}.attn_sinks.weight" in gguf for i in layers]
    heads, kv_heads = (per_layer(gguf, f"attention.head_count{x}") for x in ("", "_kv"))
    alike = partial(_alike, gguf, sliding)
    width, values = config["head_dim"], scalar(gguf, "attention.value_length", config["head_dim"])

    return {
        **routed(gguf, config),
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.0,
        "n_shared_experts": None,
        "hybrid_layer_pattern": [int(x) for x in sliding],
        "moe_layer_freq": [int(f"blk.{i}.ffn_gate_inp.weight" in gguf) for i in layers],
        "add_swa_attention_sink_bias": alike("attn_sinks", sinks, True),
        "add_full_attention_sink_bias": alike("attn_sinks", sinks, False),
        "sliding_window_size": scalar(gguf, "attention.sliding_window"),
        "layernorm_epsilon": config["rms_norm_eps"],
        "swa_rope_theta": float_of(gguf, "rope.freq_base_swa", 10000.0),
        "num_attention_heads": alike("attention.head_count", heads, False),
        "num_key_value_heads": alike("attention.head_count_kv", kv_heads, False),
        "swa_num_attention_heads": alike("attention.head_count", heads, True),
        "swa_num_key_value_heads": alike("attention.head_count_kv", kv_heads, True),
        "v_head_dim": values,
        "swa_head_dim": width,
        "swa_v_head_dim": values,
        "attention_value_scale": float_of(gguf, "attention.value_scale", 1.0),
    }


def _step35(gguf: GGUFFile, config: Config) -> Config:
    unscaled(gguf, config, "longrope")
    only(gguf, "expert_gating_func", 2, 0)
    routing, found = routed(gguf, config), _needed_windows(gguf, 1)
    sliding = [kind == "sliding_attention" for kind in found["layer_types"]]
    head_dim = config["head_dim"]
    turning = scalar(gguf, "rope.dimension_count", head_dim)
    factors = config.get("rope_scaling")
    if factors:  # one for each pair of a head; layers that see everything turn half of them
        half = factors["long_factor"][: turning // 4]
        factors |= {"long_factor": half, "short_factor": half}
    alike = partial(_alike, gguf, sliding)
    heads, kv_heads = (per_layer(gguf, f"attention.head_count{x}") for x in ("", "_kv"))
    local = float_of(gguf, "rope.freq_base_swa", 10000.0)
    part = scalar(gguf, "rope.dimension_count_swa", turning) / head_dim
    layers = range(config["num_hidden_layers"])
    sparse = [str(i) for i in layers if f"blk.{i}.ffn_gate_inp.weight" in gguf]
    return {
        **found,
        "num_attention_heads": alike("attention.head_count", heads, False),
        "num_attention_groups": alike("attention.head_count_kv", kv_heads, False),
        "attention_other_setting": {
            "num_attention_heads": alike("attention.head_count", heads, True),
            "num_attention_groups": alike("attention.head_count_kv", kv_heads, True),
        },
        "rope_theta": [local if x else config["rope_theta"] for x in sliding],
        "partial_rotary_factors": [part if x else turning / 2 / head_dim for x in sliding],
        "yarn_only_types": ["full_attention"],
        "use_head_wise_attn_gate": "blk.0.attn_gate.weight" in gguf,
        "moe_num_experts": config["num_experts"],
        "moe_top_k": config["num_experts_per_tok"],
        "share_expert_dim": shared_width(gguf),
        "moe_layers_enum": ",".join(sparse),
        "moe_router_scaling_factor": routing["routed_scaling_factor"],
        "norm_expert_weight": routing["norm_topk_prob"],
        "swiglu_limits": per_layer(gguf, "swiglu_clamp_exp", 0.0),
        "swiglu_limits_shared": per_layer(gguf, "swiglu_clamp_shexp", 0.0),
    }


def _alike(gguf: GGUFFile, sliding: list[bool], name: str, numbers: list[Any], where: bool) -> Any:
    """What all layers of a kind have: those that slide, or the others."""
    found = {number for number, there in zip(numbers, sliding, strict=True) if there == where}
    if len(found) != 1:
        raise gguf.error(
            f"{gguf.architecture}.{name}",
            expected="the same for all layers with a window, and for all without",
            found=str(sorted(found)),
        )
    return found.pop()


def per_layer(gguf: GGUFFile, suffix: str, default: float | None = None) -> list[Any]:
    """A number for each layer that generates."""
    value = gguf.key(suffix) if default is None else gguf.key(suffix, default)
    if isinstance(value, np.ndarray | list):
        return list(np.asarray(value).tolist())[: layer_count(gguf)]
    return [value] * layer_count(gguf)


def _needed_windows(gguf: GGUFFile, every: int) -> Config:
    """Windows of a class that does not do without."""
    found = windows(gguf, every)
    kinds = set(found.get("layer_types", ()))
    if "sliding_attention" not in kinds or "full_attention" not in kinds:
        raise gguf.error(
            f"{gguf.architecture}.attention.sliding_window",
            expected="a window in some layers and none in others",
        )
    return found


_LAYER = {**ATTENTION, **FFN_NORM, **QK_NORMS, **SOMETIMES_SPARSE}
_OPTIONAL = frozenset(SOMETIMES_SPARSE)
_AFTER_BOTH = {"ffn_norm": "pre_mlp_layernorm", "post_ffw_norm": "post_mlp_layernorm"}

WINDOWED_EXPERTS: dict[str, Architecture] = {
    "afmoe": Architecture(
        "afmoe",
        "AfmoeForCausalLM",
        {
            **renamed(_LAYER, "switch_mlp", "experts"),
            **AFTER_NORMS,
            **_AFTER_BOTH,
            "attn_gate": "self_attn.gate_proj",
            "ffn_gate_inp": "mlp.router.gate",
            "exp_probs_b.bias": "mlp.expert_bias",
        },
        keys=_afmoe,
        optional=_OPTIONAL,
    ),
    "exaone-moe": Architecture(
        "exaone_moe",
        "ExaoneMoEForCausalLM",
        _LAYER,
        keys=_exaone_moe,
        optional=_OPTIONAL,
    ),
    "laguna": Architecture(
        "laguna",
        "LagunaForCausalLM",
        {
            **renamed(_LAYER, "shared_experts", "shared_expert"),
            "attn_gate": "self_attn.g_proj",
            "ffn_gate_inp": "mlp.gate.proj",
        },
        keys=_laguna,
        optional=_OPTIONAL,
        partial_rotary=True,
        per_layer=True,
    ),
    "mellum": Architecture(
        "mellum", "MellumForCausalLM", {**SPARSE_LLAMA, **QK_NORMS}, keys=_mellum
    ),
    "step35": Architecture(
        "step3p5",
        "Step3p5ForCausalLM",
        {
            **renamed(_LAYER, "shared_experts", "share_expert"),
            "attn_gate": "self_attn.g_proj",
            "ffn_gate_inp": "mlp.gate.gate",
            "exp_probs_b.bias": "mlp.gate.router_bias",
        },
        keys=_step35,
        optional=_OPTIONAL | {"attn_gate"},
        partial_rotary=True,
        per_layer=True,
    ),
    "mimo2": Architecture(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {
            **ATTENTION,
            **FFN_NORM,
            **SOMETIMES_SPARSE,
            "attn_sinks.weight": "self_attn.attention_sink_bias",
        },
        keys=_mimo2,
        optional=_OPTIONAL | {"attn_sinks.weight"},
        partial_rotary=True,
        value_width=True,
        per_layer=True,
    ),
}
