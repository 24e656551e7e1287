"""Granite: Llama with multipliers; some have experts, windows, Mamba 2 layers or no positions."""

from __future__ import annotations

from collections.abc import Sequence

from converters.architectures import names
from converters.architectures.base import PERMUTED, Architecture
from converters.architectures.hyperparameters import Config, Hyperparameters
from converters.architectures.ssm import MAMBA2, MAMBA2_RESHAPE, MAMBA_DECAY, mamba_keys


def _multipliers(hp: Hyperparameters) -> Config:
    """Granite's multipliers; zero means none."""
    return {
        "embedding_multiplier": hp.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": hp.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": hp.number("logit_scale", 0.0) or 1.0,
        "attention_multiplier": hp.number("attention.scale", 0.0) or hp["head_dim"] ** -0.5,
    }


def granite_hybrid(hp: Hyperparameters, heads: Sequence[int]) -> Config:
    """Granite in mlx-lm's hybrid class: layers may be Mamba 2 and need no RoPE.

    Args:
        heads: KV heads of each layer; 0 for Mamba 2.
    """
    hp.whole_heads()
    # llama.cpp ignores the key in MoE files without Mamba 2.
    rotary = hp.architecture == "granitemoe" or hp.flag("rope.scaling.finetuned", True)
    if rotary:
        hp.unscaled()
    return {
        **_multipliers(hp),
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "layer_types": ["attention" if count else "mamba" for count in heads],
        "position_embedding_type": "rope" if rotary else "nope",
    }


def _granite(hp: Hyperparameters) -> Config:
    if hp.flag("rope.scaling.finetuned", True):
        return _multipliers(hp)
    # Without positions, which only mlx-lm's hybrid class can be.
    return granite_hybrid(hp, hp.per_layer("attention.head_count_kv", 1))


def _granite_swa(hp: Hyperparameters) -> Config:
    rotary = hp.key("attention.rope_pattern", None)
    return {
        **_multipliers(hp),
        **hp.windows(4),
        "attention_sinks": True,
        **({} if rotary is None else {"no_rope_layers": [int(bool(x)) for x in rotary]}),
    }


def _granitemoe(hp: Hyperparameters) -> Config:
    shared = hp.shared_width
    if not shared:
        if hp.architecture == "granite":
            hp.only("rope.scaling.finetuned", True)
        return _multipliers(hp)
    return {
        **granite_hybrid(hp, hp.per_layer("attention.head_count_kv", 1)),
        "intermediate_size": hp["moe_intermediate_size"],
        "shared_intermediate_size": shared,
    }


def _minicpm(hp: Hyperparameters) -> Config:
    """Granite's multipliers; old files have no keys for them and are of the first models."""
    layers, hidden = hp["num_hidden_layers"], hp["hidden_size"]
    # llama.cpp's default is the inverse of the model's.
    return {
        "embedding_multiplier": hp.number("embedding_scale", 12.0),
        "residual_multiplier": hp.number("residual_scale", 1.4 / layers**0.5),
        "logits_scaling": hp.number("logit_scale", hidden / 256),
        "attention_multiplier": hp["head_dim"] ** -0.5,
    }


def _granitehybrid(hp: Hyperparameters) -> Config:
    return {
        **mamba_keys(hp, groups=False),
        **granite_hybrid(hp, hp.per_layer("attention.head_count_kv")),
        "shared_intermediate_size": hp.integer("expert_shared_feed_forward_length", 0),
        "num_local_experts": hp.config.get("num_experts", 0),
    }


ROWS: dict[str, Architecture] = {
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        keys=_granite,
        order=PERMUTED,
        zero_biases=names.LLAMA_BIASES,
    ),
    "granite_swa": Architecture(
        "granite_swa",
        "GraniteSWAForCausalLM",
        {**names.LLAMA, "attn_sinks.weight": "self_attn.sinks"},
        keys=_granite_swa,
        order=PERMUTED,
        zero_biases=names.LLAMA_BIASES,
    ),
    "granitehybrid": Architecture(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **names.ATTENTION,
            **MAMBA2,
            **names.FFN_NORM,
            **names.GATED,
            **names.renamed(names.MOE, "mlp.", "block_sparse_moe."),
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            "ffn_gate_up_shexp": "shared_mlp.input_linear",
            "ffn_down_shexp": "shared_mlp.output_linear",
        },
        keys=_granitehybrid,
        order=PERMUTED,
        values=MAMBA_DECAY,
        reshape=MAMBA2_RESHAPE,
        joins={"ffn_gate_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp")},
        zero_biases=names.LLAMA_BIASES,
        optional=None,
        own_shapes=True,
        per_layer=True,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {
            **names.renamed(names.MOE_LLAMA, "mlp.", "block_sparse_moe."),
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            "ffn_gate_up_shexp": "shared_mlp.input_linear",
            "ffn_down_shexp": "shared_mlp.output_linear",
        },
        keys=_granitemoe,
        order=PERMUTED,
        joins={"ffn_gate_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp")},
        optional=frozenset({"ffn_gate_up_shexp", "ffn_down_shexp"}),
        zero_biases=(names.BIASED_ATTENTION,),
    ),
    "minicpm": Architecture(
        "granite",
        "GraniteForCausalLM",
        keys=_minicpm,
        order=PERMUTED,
        zero_biases=names.LLAMA_BIASES,
    ),
}
