"""Granite: Llama with multipliers; some have experts, some windows, some no positions at all."""

from __future__ import annotations

from collections.abc import Sequence

from converters.gguf.architectures.keys import only, shared_width, unscaled, windows
from converters.gguf.architectures.limits import whole_heads
from converters.gguf.architectures.row import (
    BIASED_ATTENTION,
    LLAMA,
    LLAMA_BIASES,
    PERMUTED,
    SPARSE_LLAMA,
    Architecture,
    Config,
    renamed,
)
from converters.gguf.numbers import flag, float_of, per_layer
from converters.gguf.reader import GGUFFile


def _multipliers(gguf: GGUFFile, config: Config) -> Config:
    """Granite's multipliers; a zero stands for none."""
    return {
        "embedding_multiplier": float_of(gguf, "embedding_scale", 0.0) or 1.0,
        "residual_multiplier": float_of(gguf, "residual_scale", 0.0) or 1.0,
        "logits_scaling": float_of(gguf, "logit_scale", 0.0) or 1.0,
        "attention_multiplier": float_of(gguf, "attention.scale", 0.0)
        or config["head_dim"] ** -0.5,
    }


def granite_hybrid(gguf: GGUFFile, config: Config, heads: Sequence[int]) -> Config:
    """Granite in mlx-lm's class whose layers may hold a state, and need not turn.

    Args:
        heads: of keys, in each layer; those without hold a state.
    """
    whole_heads(gguf, config)
    # llama.cpp does not ask the files of mixtures whose every layer has attention.
    turning = gguf.architecture == "granitemoe" or flag(gguf, "rope.scaling.finetuned", True)
    if turning:
        unscaled(gguf, config)
    return {
        **_multipliers(gguf, config),
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "layer_types": ["attention" if count else "mamba" for count in heads],
        "position_embedding_type": "rope" if turning else "nope",
    }


def _granite(gguf: GGUFFile, config: Config) -> Config:
    if flag(gguf, "rope.scaling.finetuned", True):
        return _multipliers(gguf, config)
    # Without positions; none of mlx-lm's other classes for Granite can do without.
    return granite_hybrid(gguf, config, per_layer(gguf, "attention.head_count_kv", 1))


def _granite_swa(gguf: GGUFFile, config: Config) -> Config:
    turning = gguf.key("attention.rope_pattern", None)
    return {
        **_multipliers(gguf, config),
        **windows(gguf, 4),
        "attention_sinks": True,
        **({} if turning is None else {"no_rope_layers": [int(bool(x)) for x in turning]}),
    }


def _granitemoe(gguf: GGUFFile, config: Config) -> Config:
    shared = shared_width(gguf)
    if not shared:
        if gguf.architecture == "granite":
            only(gguf, "rope.scaling.finetuned", True)
        return _multipliers(gguf, config)
    return {
        **granite_hybrid(gguf, config, per_layer(gguf, "attention.head_count_kv", 1)),
        "intermediate_size": config["moe_intermediate_size"],
        "shared_intermediate_size": shared,
    }


GRANITE: dict[str, Architecture] = {
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        keys=_granite,
        order=PERMUTED,
        zero_biases=LLAMA_BIASES,
    ),
    "granite_swa": Architecture(
        "granite_swa",
        "GraniteSWAForCausalLM",
        {**LLAMA, "attn_sinks.weight": "self_attn.sinks"},
        keys=_granite_swa,
        order=PERMUTED,
        zero_biases=LLAMA_BIASES,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {
            **renamed(SPARSE_LLAMA, "mlp.", "block_sparse_moe."),
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            "ffn_gate_up_shexp": "shared_mlp.input_linear",
            "ffn_down_shexp": "shared_mlp.output_linear",
        },
        keys=_granitemoe,
        order=PERMUTED,
        joins={"ffn_gate_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp")},
        optional=frozenset({"ffn_gate_up_shexp", "ffn_down_shexp"}),
        zero_biases=(BIASED_ATTENTION,),
    ),
}
