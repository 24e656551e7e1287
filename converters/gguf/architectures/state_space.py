"""Architectures of state-space layers alone: Mamba and Mamba 2."""

from __future__ import annotations

from converters.gguf.architectures.mixers import (
    DECAY,
    FIRST_MIXER,
    FIRST_SHAPES,
    MIXER,
    SHAPES,
    UNLIMITED,
    in_any_layer,
    sizes,
)
from converters.gguf.architectures.row import Architecture, Config
from converters.gguf.numbers import flag, scalar
from converters.gguf.reader import GGUFFile

BACKBONE = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f"}
# mlx-lm's class of Mamba leaves its norms at this, whatever a config says.
_EPSILON = 1e-5


def _mamba(gguf: GGUFFile, config: Config) -> Config:
    epsilon = config["rms_norm_eps"]
    if epsilon != _EPSILON:
        key = f"{gguf.architecture}.attention.layer_norm_rms_epsilon"
        raise gguf.error(key, expected=f"{_EPSILON}, the only one that the model class has")
    falcon: Config = {}
    if flag(gguf, "ssm.dt_b_c_rms", False):
        falcon = {"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"]}
        falcon["mixer_rms_eps"] = epsilon
    return {
        "layer_norm_epsilon": epsilon,
        "intermediate_size": scalar(gguf, "ssm.inner_size"),
        "state_size": scalar(gguf, "ssm.state_size"),
        "conv_kernel": scalar(gguf, "ssm.conv_kernel"),
        "time_step_rank": scalar(gguf, "ssm.time_step_rank"),
        "use_bias": in_any_layer(gguf, "ssm_in.bias"),
        "use_conv_bias": True,
        **falcon,
    }


def _mamba2(gguf: GGUFFile, config: Config) -> Config:
    mixer = sizes(gguf, groups=False)
    return {
        "layer_norm_epsilon": config["rms_norm_eps"],
        "num_heads": mixer.heads,
        "head_dim": mixer.width,
        "intermediate_size": mixer.inner,
        "state_size": mixer.state,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.kernel,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": "auto",
        "time_step_limit": UNLIMITED,
    }


STATE_SPACE: dict[str, Architecture] = {
    "mamba": Architecture(
        "mamba",
        "MambaForCausalLM",
        {"attn_norm": "norm", **FIRST_MIXER},
        ends=BACKBONE,
        prefix="backbone.layers",
        keys=_mamba,
        values=DECAY,
        reshape=FIRST_SHAPES,
        own_shapes=True,
    ),
    "mamba2": Architecture(
        "mamba2",
        "Mamba2ForCausalLM",
        {"attn_norm": "norm", **MIXER},
        ends=BACKBONE,
        prefix="backbone.layers",
        keys=_mamba2,
        values=DECAY,
        reshape=SHAPES,
        own_shapes=True,
    ),
}
