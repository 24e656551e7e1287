"""State space models and hybrids: Mamba, Falcon H1, Jamba, Nemotron H, PLaMo 2; and LFM2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from converters.architectures import names
from converters.architectures.base import (
    PERMUTED,
    Architecture,
    depthwise,
    flat,
    log_of_negative,
    minus,
)
from converters.architectures.hyperparameters import Config, Hyperparameters

MAMBA2_MIXER = {
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_dt.bias": "mixer.dt_bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_norm": "mixer.norm",
    "ssm_out": "mixer.out_proj",
}

MAMBA1_MIXER = {
    **names.without(MAMBA2_MIXER, "ssm_norm"),
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_dt.bias": "mixer.dt_proj.bias",
}

# The same under the name that hybrids give them.
MAMBA2 = names.renamed(MAMBA2_MIXER, "mixer.", "mamba.")

MAMBA1 = names.renamed(MAMBA1_MIXER, "mixer.", "mamba.")

# JSON has no infinity, and no step comes near this one.
_NO_STEP_LIMIT = [0.0, 1e30]

MAMBA1_RESHAPE = {"ssm_conv1d": depthwise}

MAMBA2_RESHAPE = {**MAMBA1_RESHAPE, "ssm_a": flat, "ssm_d": flat, "ssm_norm": flat}

MAMBA_DECAY = {"ssm_a": log_of_negative}


@dataclass(frozen=True)
class _Mamba2Sizes:
    """Sizes of a Mamba 2 mixer; ``width`` is of a head, ``kernel`` of the convolution."""

    inner: int
    heads: int
    width: int
    groups: int
    state: int
    kernel: int


def _mamba2_sizes(hp: Hyperparameters, *, groups: bool = True) -> _Mamba2Sizes:
    """Sizes of the Mamba 2 mixers.

    Args:
        groups: the model's class normalizes each group by itself, as the authors' kernels and
            llama.cpp do; otherwise it can run one group only.
    """
    inner, heads = hp.integer("ssm.inner_size"), hp.integer("ssm.time_step_rank")
    count = hp.integer("ssm.group_count", 1)
    hp.refuse_if(
        heads < 1 or inner < 1 or inner % heads,
        "ssm.time_step_rank",
        f"a number of heads that divides {inner}",
    )
    hp.refuse_if(
        count < 1 or heads % count,
        "ssm.group_count",
        f"a number of groups that divides {heads} heads",
    )
    hp.refuse_if(
        count > 1 and not groups,
        "ssm.group_count",
        "1, as the model class normalizes all groups together",
    )
    state, kernel = hp.integer("ssm.state_size"), hp.integer("ssm.conv_kernel")
    return _Mamba2Sizes(inner, heads, inner // heads, count, state, kernel)


def _in_any_layer(hp: Hyperparameters, tensor: str) -> bool:
    return any(f"blk.{i}.{tensor}" in hp for i in range(hp.layers))


_BACKBONE = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f"}

# The constant of mlx-lm's class, whatever a config says.
_MAMBA_EPSILON = 1e-5


def _mamba(hp: Hyperparameters) -> Config:
    epsilon = hp["rms_norm_eps"]
    hp.refuse_if(
        epsilon != _MAMBA_EPSILON,
        "attention.layer_norm_rms_epsilon",
        f"{_MAMBA_EPSILON}, the only one that the model class has",
    )
    falcon: Config = {}
    if hp.flag("ssm.dt_b_c_rms", False):
        falcon = {"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"]}
        falcon["mixer_rms_eps"] = epsilon
    return {
        "layer_norm_epsilon": epsilon,
        "intermediate_size": hp.integer("ssm.inner_size"),
        "state_size": hp.integer("ssm.state_size"),
        "conv_kernel": hp.integer("ssm.conv_kernel"),
        "time_step_rank": hp.integer("ssm.time_step_rank"),
        "use_bias": _in_any_layer(hp, "ssm_in.bias"),
        "use_conv_bias": True,
        **falcon,
    }


def _mamba2(hp: Hyperparameters) -> Config:
    mixer = _mamba2_sizes(hp, groups=False)
    return {
        "layer_norm_epsilon": hp["rms_norm_eps"],
        "num_heads": mixer.heads,
        "head_dim": mixer.width,
        "intermediate_size": mixer.inner,
        "state_size": mixer.state,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.kernel,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": "auto",
        "time_step_limit": _NO_STEP_LIMIT,
    }


_FEED_FORWARD = names.renamed(names.GATED, "mlp.", "feed_forward.")


def mamba_keys(hp: Hyperparameters, *, groups: bool) -> Config:
    """Sizes of a Mamba 2 mixer under the keys of Falcon H1 and Granite 4 H."""
    mixer = _mamba2_sizes(hp, groups=groups)
    return {
        "mamba_n_heads": mixer.heads,
        "mamba_d_head": mixer.width,
        "mamba_d_state": mixer.state,
        "mamba_d_conv": mixer.kernel,
        "mamba_n_groups": mixer.groups,
        "mamba_conv_bias": _in_any_layer(hp, "ssm_conv1d.bias"),
        "mamba_proj_bias": False,
        "time_step_limit": _NO_STEP_LIMIT,
    }


def _falcon_h1(hp: Hyperparameters) -> Config:
    normed = _in_any_layer(hp, "ssm_norm.weight")
    # llama.cpp's converter has multiplied the weights.
    ones = ("attention_in", "attention_out", "key", "embedding", "lm_head", "ssm_in", "ssm_out")
    return {
        **mamba_keys(hp, groups=not normed),
        "mamba_d_ssm": hp.integer("ssm.inner_size"),
        "mamba_rms_norm": normed,
        "mamba_norm_before_gate": False,
        "projectors_bias": False,
        **{f"{name}_multiplier": 1.0 for name in ones},
        "mlp_multipliers": [1.0] * 2,
        "ssm_multipliers": [1.0] * 5,
    }


def _nemotron_h(hp: Hyperparameters) -> Config:
    hp.tensor("output.weight")
    mixer = _mamba2_sizes(hp)
    heads, inner = (
        hp.per_layer("attention.head_count_kv"),
        hp.per_layer("feed_forward_length"),
    )
    hp.refuse_if(
        len(set(inner) - {0}) > 1, "feed_forward_length", "one size in all layers that have one"
    )
    feed_forward = "E" if "num_experts" in hp.config else "-"
    pattern = [
        feed_forward if size else "*" if count else "M"
        for count, size in zip(heads, inner, strict=True)
    ]
    hp.refuse_if(
        not {"*", "M"} <= set(pattern),
        "attention.head_count_kv",
        "layers with attention and others without",
    )
    # Where a file has both, this one counts.
    epsilon = hp.number("attention.layer_norm_rms_epsilon", hp["layer_norm_epsilon"])
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
        "use_conv_bias": _in_any_layer(hp, "ssm_conv1d.bias"),
        "time_step_limit": _NO_STEP_LIMIT,
    }


def _nemotron_h_moe(hp: Hyperparameters) -> Config:
    hp.needs_experts()
    latent = hp.integer("moe_latent_size", 0)
    return {
        **_nemotron_h(hp),
        "n_routed_experts": hp["num_experts"],
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": hp.shared_width,
        "moe_latent_size": latent or None,
        "n_group": hp.integer("expert_group_count", 0) or 1,
        "topk_group": hp.integer("expert_group_used_count", 0) or 1,
        "norm_topk_prob": hp.flag("expert_weights_norm", False),
        "routed_scaling_factor": hp.number("expert_weights_scale", 0.0) or 1.0,
    }


def _jamba(hp: Hyperparameters) -> Config:
    hp.whole_heads()
    if hp.config.get("num_experts", 0) > 1:
        # mlx-lm's class normalizes the weights of experts; Jamba does not.
        raise hp.error(
            "expert_count", expected="no experts, as the model class weighs them in another way"
        )
    heads = hp.per_layer("attention.head_count_kv")
    expand, rest = divmod(hp.integer("ssm.inner_size"), hp["hidden_size"])
    hp.refuse_if(rest, "ssm.inner_size", f"a multiple of the hidden size, {hp['hidden_size']}")
    return {
        "layers_block_type": ["attention" if count else "mamba" for count in heads],
        # The same as periods; there are no experts.
        "attn_layer_offset": 0,
        "attn_layer_period": hp.layers,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_d_conv": hp.integer("ssm.conv_kernel"),
        "mamba_d_state": hp.integer("ssm.state_size"),
        "mamba_dt_rank": hp.integer("ssm.time_step_rank"),
        "mamba_expand": expand,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    }


_NEMOTRON = {
    "attn_norm": "norm",
    **MAMBA2_MIXER,
    **names.renamed(names.without(names.ATTENTION, "attn_norm"), "self_attn.", "mixer."),
}

_NEMOTRON_BIASES = (names.BIASED_ATTENTION, ("ffn_up", "ffn_down"))

_LFM2_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
}

_LFM2_CONV = {
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}

_LFM2 = {"attn_norm": "operator_norm", "ffn_norm": "ffn_norm", **_LFM2_ATTENTION, **_LFM2_CONV}


def _lfm2(hp: Hyperparameters) -> Config:
    hp.unscaled()
    hp.refuse_if(
        hp.integer("attention.sliding_window", 0),
        "attention.sliding_window",
        "no sliding window in this architecture",
    )
    hp.tied()
    hp.whole_heads()
    kv_heads = hp.per_layer("attention.head_count_kv")
    return {
        "norm_eps": hp["rms_norm_eps"],
        "layer_types": ["full_attention" if heads else "conv" for heads in kv_heads],
        "conv_L_cache": hp.integer("shortconv.l_cache"),
        "conv_bias": False,
        "block_dim": hp["hidden_size"],
        "block_ff_dim": hp["intermediate_size"],
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
    }


def _lfm2moe(hp: Hyperparameters) -> Config:
    hp.needs_experts()
    hp.refuse_if(
        hp.integer("expert_gating_func") != 2,
        "expert_gating_func",
        "2, the sigmoid, in this architecture",
    )
    return {
        **_lfm2(hp),
        "num_dense_layers": hp.integer("leading_dense_block_count", 0),
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": hp.number("expert_weights_scale", 0.0) or 1.0,
    }


_PLAMO2_MIXER = {
    "attn_qkv": "mixer.qkv_proj",
    "attn_output": "mixer.o_proj",
    "attn_q_norm.weight": "mixer.q_weight",
    "attn_k_norm.weight": "mixer.k_weight",
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_x": "mixer.bcdt_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_dt.bias": "mixer.dt_bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_dt_norm": "mixer.dt_norm_weight",
    "ssm_b_norm": "mixer.B_norm_weight",
    "ssm_c_norm": "mixer.C_norm_weight",
    "ssm_out": "mixer.out_proj",
}


def _plamo2(hp: Hyperparameters) -> Config:
    # Constants of mlx-lm's class.
    hp.only("rope.freq_base", 10000.0)
    hp.unscaled()
    heads, width = hp.integer("ssm.time_step_rank"), hp["head_dim"]
    hp.refuse_if(
        heads * width != hp.integer("ssm.inner_size"),
        "ssm.inner_size",
        f"{heads} heads of {width}, as wide as those of attention",
    )
    return {
        "mamba_step": _plamo2_step(hp),
        "mamba_enabled": True,
        "mamba_num_heads": heads,
        "mamba_d_state": hp.integer("ssm.state_size"),
        "mamba_d_conv": hp.integer("ssm.conv_kernel"),
        "hidden_size_per_head": width,
    }


def _plamo2_step(hp: Hyperparameters) -> int:
    """One of so many layers, the middle one, has attention."""
    found = [count > 0 for count in hp.per_layer("attention.head_count_kv")]
    for step in range(2, len(found) + 1):
        if found == [i % step == step // 2 for i in range(len(found))]:
            return step
    raise hp.error(
        "attention.head_count_kv", expected="attention in the middle of equal runs of layers"
    )


PLAMO2 = Architecture(
    "plamo2",
    "Plamo2ForCausalLM",
    {
        "attn_norm": "pre_mixer_norm",
        "post_attention_norm": "post_mixer_norm.weight",
        **_PLAMO2_MIXER,
        "ffn_norm": "pre_mlp_norm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
        "post_ffw_norm": "post_mlp_norm.weight",
    },
    prefix="model.layers.layers",
    keys=_plamo2,
    values={
        **MAMBA_DECAY,
        # GGUF has added the constants that the model adds to the weights of its norms.
        **dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), minus(1)),
        "post_attention_norm": minus(1 / 5),
        "post_ffw_norm": minus(1 / 5**1.5),
    },
    reshape=MAMBA1_RESHAPE,
    optional=frozenset(_PLAMO2_MIXER),
    own_shapes=True,
    per_layer=True,
)

_lfm2_row = partial(
    Architecture,
    ends={"token_embd_norm": "model.embedding_norm"},
    final_norm="token_embd_norm",
    reshape={"shortconv.conv": depthwise},
    own_shapes=True,
    per_layer=True,
)
_nemotron_row = partial(
    Architecture,
    "nemotron_h",
    "NemotronHForCausalLM",
    ends=_BACKBONE,
    prefix="backbone.layers",
    epsilon="layer_norm_epsilon",
    order=PERMUTED,
    values=MAMBA_DECAY,
    reshape=MAMBA2_RESHAPE,
    partial_rotary=True,  # there is no RoPE, whatever a file says
    own_shapes=True,
    per_layer=True,
)

ROWS: dict[str, Architecture] = {
    "falcon-h1": Architecture(
        "falcon_h1",
        "FalconH1ForCausalLM",
        {**names.ATTENTION, **MAMBA2, "ffn_norm": "pre_ff_layernorm.weight", **_FEED_FORWARD},
        ends={"output_norm": "model.final_layernorm"},
        keys=_falcon_h1,
        values=MAMBA_DECAY,
        reshape=MAMBA2_RESHAPE,
        zero_biases=names.LLAMA_BIASES,
        optional=frozenset({"ssm_norm"}),
        own_shapes=True,
    ),
    "jamba": Architecture(
        "jamba",
        "JambaForCausalLM",
        {
            **names.ATTENTION,
            **MAMBA1,
            "ssm_dt_norm": "mamba.dt_layernorm",
            "ssm_b_norm": "mamba.b_layernorm",
            "ssm_c_norm": "mamba.c_layernorm",
            "ffn_norm": "pre_ff_layernorm",
            **_FEED_FORWARD,
            "ffn_gate_inp": "feed_forward.router",
            **names.renamed(names.without(names.MOE, "ffn_gate_inp"), "mlp.", "feed_forward."),
        },
        ends={"output_norm": "model.final_layernorm"},
        keys=_jamba,
        values=MAMBA_DECAY,
        reshape=MAMBA1_RESHAPE,
        optional=None,
        own_shapes=True,
        per_layer=True,
    ),
    "lfm2": _lfm2_row(
        "lfm2",
        "Lfm2ForCausalLM",
        {
            **_LFM2,
            "ffn_gate": "feed_forward.w1",
            "ffn_down": "feed_forward.w2",
            "ffn_up": "feed_forward.w3",
        },
        keys=_lfm2,
        optional=frozenset({*_LFM2_ATTENTION, *_LFM2_CONV}),
    ),
    "lfm2moe": _lfm2_row(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {
            **_LFM2,
            **names.renamed(names.GATED, "mlp.", "feed_forward."),
            **names.renamed(names.MOE, "mlp.", "feed_forward."),
            "exp_probs_b.bias": "feed_forward.expert_bias",
        },
        keys=_lfm2moe,
        optional=None,
    ),
    "mamba": Architecture(
        "mamba",
        "MambaForCausalLM",
        {"attn_norm": "norm", **MAMBA1_MIXER},
        ends=_BACKBONE,
        prefix="backbone.layers",
        keys=_mamba,
        values=MAMBA_DECAY,
        reshape=MAMBA1_RESHAPE,
        own_shapes=True,
    ),
    "mamba2": Architecture(
        "mamba2",
        "Mamba2ForCausalLM",
        {"attn_norm": "norm", **MAMBA2_MIXER},
        ends=_BACKBONE,
        prefix="backbone.layers",
        keys=_mamba2,
        values=MAMBA_DECAY,
        reshape=MAMBA2_RESHAPE,
        own_shapes=True,
    ),
    "nemotron_h": _nemotron_row(
        {**_NEMOTRON, "ffn_up": "mixer.up_proj", "ffn_down": "mixer.down_proj"},
        keys=_nemotron_h,
        zero_biases=_NEMOTRON_BIASES,
        optional=frozenset(_NEMOTRON) - {"attn_norm"} | {"ffn_up", "ffn_down"},
    ),
    "nemotron_h_moe": _nemotron_row(
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
        keys=_nemotron_h_moe,
        zero_biases=_NEMOTRON_BIASES[:1],
        optional=None,
    ),
    "plamo2": PLAMO2,
}
