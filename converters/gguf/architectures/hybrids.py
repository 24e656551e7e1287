"""Hybrids of state-space layers and attention: Falcon H1, Granite 4 H, Jamba, Nemotron H."""

from __future__ import annotations

from converters.gguf.architectures.granite import granite_hybrid
from converters.gguf.architectures.keys import shared_width
from converters.gguf.architectures.limits import needs_experts, whole_heads
from converters.gguf.architectures.mixers import (
    DECAY,
    FIRST_MAMBA,
    FIRST_SHAPES,
    MAMBA,
    MIXER,
    SHAPES,
    UNLIMITED,
    in_any_layer,
    sizes,
)
from converters.gguf.architectures.row import (
    ATTENTION,
    BIASED_ATTENTION,
    FFN_NORM,
    GATED,
    LLAMA_BIASES,
    PERMUTED,
    SPARSE,
    Architecture,
    Config,
    renamed,
    without,
)
from converters.gguf.architectures.state_space import BACKBONE
from converters.gguf.numbers import flag, float_of, layer_count, per_layer, scalar
from converters.gguf.reader import GGUFFile

_FEED_FORWARD = renamed(GATED, "mlp.", "feed_forward.")


def _mamba_keys(gguf: GGUFFile, *, groups: bool) -> Config:
    """A Mamba 2 mixer as Falcon H1 and Granite 4 H call its sizes."""
    mixer = sizes(gguf, groups=groups)
    return {
        "mamba_n_heads": mixer.heads,
        "mamba_d_head": mixer.width,
        "mamba_d_state": mixer.state,
        "mamba_d_conv": mixer.kernel,
        "mamba_n_groups": mixer.groups,
        "mamba_conv_bias": in_any_layer(gguf, "ssm_conv1d.bias"),
        "mamba_proj_bias": False,
        "time_step_limit": UNLIMITED,
    }


def _falcon_h1(gguf: GGUFFile, config: Config) -> Config:
    normed = in_any_layer(gguf, "ssm_norm.weight")
    # llama.cpp's converter multiplies the weights.
    ones = ("attention_in", "attention_out", "key", "embedding", "lm_head", "ssm_in", "ssm_out")
    return {
        **_mamba_keys(gguf, groups=not normed),
        "mamba_d_ssm": scalar(gguf, "ssm.inner_size"),
        "mamba_rms_norm": normed,
        "mamba_norm_before_gate": False,
        "projectors_bias": False,
        **{f"{name}_multiplier": 1.0 for name in ones},
        "mlp_multipliers": [1.0] * 2,
        "ssm_multipliers": [1.0] * 5,
    }


def _granite_hybrid(gguf: GGUFFile, config: Config) -> Config:
    return {
        **_mamba_keys(gguf, groups=False),
        **granite_hybrid(gguf, config, per_layer(gguf, "attention.head_count_kv")),
        "shared_intermediate_size": scalar(gguf, "expert_shared_feed_forward_length", 0),
        "num_local_experts": config.get("num_experts", 0),
    }


def _nemotron_h(gguf: GGUFFile, config: Config) -> Config:
    gguf.tensor("output.weight")
    mixer = sizes(gguf)
    heads, inner = (
        per_layer(gguf, "attention.head_count_kv"),
        per_layer(gguf, "feed_forward_length"),
    )
    if len(set(inner) - {0}) > 1:
        key = f"{gguf.architecture}.feed_forward_length"
        raise gguf.error(key, expected="one size in all layers that have one")
    feed_forward = "E" if "num_experts" in config else "-"
    pattern = [
        feed_forward if size else "*" if count else "M"
        for count, size in zip(heads, inner, strict=True)
    ]
    if not {"*", "M"} <= set(pattern):
        key = f"{gguf.architecture}.attention.head_count_kv"
        raise gguf.error(key, expected="layers with attention and others without")
    # Where a file has both, it is this one that counts.
    epsilon = float_of(gguf, "attention.layer_norm_rms_epsilon", config["layer_norm_epsilon"])
    return {
        "layer_norm_epsilon": epsilon,
        "hybrid_override_pattern": "".join(pattern),
        "mamba_num_heads": mixer.heads,
        "mamba_head_dim": mixer.width,
        "mamba_proj_bias": False,
        "ssm_state_size": mixer.state,
        "conv_kernel": mixer.kernel,
        "n_groups": mixer.groups,
        "use_bias": False,
        "use_conv_bias": in_any_layer(gguf, "ssm_conv1d.bias"),
        "time_step_limit": UNLIMITED,
    }


def _nemotron_h_moe(gguf: GGUFFile, config: Config) -> Config:
    needs_experts(gguf, config)
    latent = scalar(gguf, "moe_latent_size", 0)
    return {
        **_nemotron_h(gguf, config),
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": shared_width(gguf),
        "moe_latent_size": latent or None,
        "n_group": scalar(gguf, "expert_group_count", 0) or 1,
        "topk_group": scalar(gguf, "expert_group_used_count", 0) or 1,
        "norm_topk_prob": flag(gguf, "expert_weights_norm", False),
        "routed_scaling_factor": float_of(gguf, "expert_weights_scale", 0.0) or 1.0,
    }


def _jamba(gguf: GGUFFile, config: Config) -> Config:
    whole_heads(gguf, config)
    if config.get("num_experts", 0) > 1:
        # mlx-lm's class makes the weights of the chosen ones sum to one; those of Jamba do not.
        key = f"{gguf.architecture}.expert_count"
        raise gguf.error(key, expected="no experts, as the model class weighs them in another way")
    heads = per_layer(gguf, "attention.head_count_kv")
    expand, rest = divmod(scalar(gguf, "ssm.inner_size"), config["hidden_size"])
    if rest:
        key = f"{gguf.architecture}.ssm.inner_size"
        raise gguf.error(key, expected=f"a multiple of the hidden size, {config['hidden_size']}")
    return {
        "layers_block_type": ["attention" if count else "mamba" for count in heads],
        # Periods are another way to say the same, and of experts there are none.
        "attn_layer_offset": 0,
        "attn_layer_period": layer_count(gguf),
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_d_conv": scalar(gguf, "ssm.conv_kernel"),
        "mamba_d_state": scalar(gguf, "ssm.state_size"),
        "mamba_dt_rank": scalar(gguf, "ssm.time_step_rank"),
        "mamba_expand": expand,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    }


_NEMOTRON = {
    "attn_norm": "norm",
    **MIXER,
    **renamed(without(ATTENTION, "attn_norm"), "self_attn.", "mixer."),
}
_NEMOTRON_BIASES = (BIASED_ATTENTION, ("ffn_up", "ffn_down"))

HYBRIDS: dict[str, Architecture] = {
    "falcon-h1": Architecture(
        "falcon_h1",
        "FalconH1ForCausalLM",
        {**ATTENTION, **MAMBA, "ffn_norm": "pre_ff_layernorm.weight", **_FEED_FORWARD},
        ends={"output_norm": "model.final_layernorm"},
        keys=_falcon_h1,
        values=DECAY,
        reshape=SHAPES,
        zero_biases=LLAMA_BIASES,
        optional=frozenset({"ssm_norm"}),
        own_shapes=True,
    ),
    "granitehybrid": Architecture(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **ATTENTION,
            **MAMBA,
            **FFN_NORM,
            **GATED,
            **renamed(SPARSE, "mlp.", "block_sparse_moe."),
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            "ffn_gate_up_shexp": "shared_mlp.input_linear",
            "ffn_down_shexp": "shared_mlp.output_linear",
        },
        keys=_granite_hybrid,
        order=PERMUTED,
        values=DECAY,
        reshape=SHAPES,
        joins={"ffn_gate_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp")},
        zero_biases=LLAMA_BIASES,
        optional=None,
        own_shapes=True,
        per_layer=True,
    ),
    "jamba": Architecture(
        "jamba",
        "JambaForCausalLM",
        {
            **ATTENTION,
            **FIRST_MAMBA,
            "ssm_dt_norm": "mamba.dt_layernorm",
            "ssm_b_norm": "mamba.b_layernorm",
            "ssm_c_norm": "mamba.c_layernorm",
            "ffn_norm": "pre_ff_layernorm",
            **_FEED_FORWARD,
            "ffn_gate_inp": "feed_forward.router",
            **renamed(without(SPARSE, "ffn_gate_inp"), "mlp.", "feed_forward."),
        },
        ends={"output_norm": "model.final_layernorm"},
        keys=_jamba,
        values=DECAY,
        reshape=FIRST_SHAPES,
        optional=None,
        own_shapes=True,
        per_layer=True,
    ),
    "nemotron_h": Architecture(
        "nemotron_h",
        "NemotronHForCausalLM",
        {**_NEMOTRON, "ffn_up": "mixer.up_proj", "ffn_down": "mixer.down_proj"},
        ends=BACKBONE,
        prefix="backbone.layers",
        keys=_nemotron_h,
        epsilon="layer_norm_epsilon",
        order=PERMUTED,
        values=DECAY,
        reshape=SHAPES,
        zero_biases=_NEMOTRON_BIASES,
        partial_rotary=True,  # nothing turns, whatever a file says
        optional=frozenset(_NEMOTRON) - {"attn_norm"} | {"ffn_up", "ffn_down"},
        own_shapes=True,
        per_layer=True,
    ),
    "nemotron_h_moe": Architecture(
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            **_NEMOTRON,
            "ffn_gate_inp": "mixer.gate",
            "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
            "ffn_latent_down": "mixer.fc1_latent_proj",
            "ffn_latent_up": "mixer.fc2_latent_proj",
            "ffn_up_exps": "mixer.switch_mlp.fc1",
            "ffn_down_exps": "mixer.switch_mlp.fc2",
            "ffn_up_shexp": "mixer.shared_experts.up_proj",
            "ffn_down_shexp": "mixer.shared_experts.down_proj",
        },
        ends=BACKBONE,
        prefix="backbone.layers",
        keys=_nemotron_h_moe,
        epsilon="layer_norm_epsilon",
        order=PERMUTED,
        values=DECAY,
        reshape=SHAPES,
        zero_biases=_NEMOTRON_BIASES[:1],
        partial_rotary=True,  # nothing turns, whatever a file says
        optional=None,
        own_shapes=True,
        per_layer=True,
    ),
}
