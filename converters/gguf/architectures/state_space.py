"""Architectures with state-space layers: Mamba, and its hybrids with attention."""

from __future__ import annotations

from math import prod
from typing import Any

from converters.gguf.architectures.row import (
    Architecture,
    Config,
    Shape,
    depthwise,
    log_of_negative,
)
from converters.gguf.numbers import layer_count, scalar
from converters.gguf.reader import GGUFFile

#: A Mamba 2 mixer; ``renamed`` gives it the name that a family has for it.
MIXER = {
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_dt.bias": "mixer.dt_bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_norm": "mixer.norm",
    "ssm_out": "mixer.out_proj",
}
BACKBONE = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f"}
# mlx-lm's Mamba leaves its norms at this, whatever a config says.
_MAMBA_EPSILON = 1e-5


def flat(shape: Shape) -> Shape:
    """Everything in one axis: GGUF gives rates a second one, and norms one for groups."""
    return (prod(shape),)


#: What GGUF does to the tensors of a Mamba 2 mixer.
MIXER_SHAPES = {"ssm_conv1d": depthwise, "ssm_a": flat, "ssm_d": flat, "ssm_norm": flat}
DECAY = {"ssm_a": log_of_negative}


def mixer_sizes(gguf: GGUFFile) -> dict[str, int]:
    """Sizes of a Mamba 2 mixer: ``inner``, ``heads``, ``width`` of a head, ``groups``, ``state``
    and ``kernel``.

    Raises:
        GGUFError: heads do not share the inner size, or groups the heads, equally.
    """
    inner, heads = scalar(gguf, "ssm.inner_size"), scalar(gguf, "ssm.time_step_rank")
    groups = scalar(gguf, "ssm.group_count", 1)
    if heads < 1 or inner < 1 or inner % heads:
        key = f"{gguf.architecture}.ssm.time_step_rank"
        raise gguf.error(key, expected=f"a number of heads that divides {inner}")
    if groups < 1 or heads % groups:
        key = f"{gguf.architecture}.ssm.group_count"
        raise gguf.error(key, expected=f"a number of groups that divides {heads} heads")
    return {
        "inner": inner,
        "heads": heads,
        "width": inner // heads,
        "groups": groups,
        "state": scalar(gguf, "ssm.state_size"),
        "kernel": scalar(gguf, "ssm.conv_kernel"),
    }


def has(gguf: GGUFFile, tensor: str) -> bool:
    """Whether any layer has a tensor."""
    return any(f"blk.{i}.{tensor}" in gguf for i in range(layer_count(gguf)))


def _mamba(gguf: GGUFFile, config: Config) -> Config:
    epsilon = config["rms_norm_eps"]
    if epsilon != _MAMBA_EPSILON:
        key = f"{gguf.architecture}.attention.layer_norm_rms_epsilon"
        raise gguf.error(key, expected=f"{_MAMBA_EPSILON}, the only one that the model class has")
    falcon: dict[str, Any] = {}
    if gguf.key("ssm.dt_b_c_rms", False):
        falcon = {"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"]}
        falcon["mixer_rms_eps"] = epsilon
    return {
        "layer_norm_epsilon": epsilon,
        "intermediate_size": scalar(gguf, "ssm.inner_size"),
        "state_size": scalar(gguf, "ssm.state_size"),
        "conv_kernel": scalar(gguf, "ssm.conv_kernel"),
        "time_step_rank": scalar(gguf, "ssm.time_step_rank"),
        "use_bias": has(gguf, "ssm_in.bias"),
        "use_conv_bias": True,
        **falcon,
    }


def _mamba2(gguf: GGUFFile, config: Config) -> Config:
    sizes = mixer_sizes(gguf)
    if sizes["groups"] > 1:
        # The authors' kernels and llama.cpp normalise each group by itself.
        key = f"{gguf.architecture}.ssm.group_count"
        raise gguf.error(key, expected="1, as the model class normalises all groups together")
    return {
        "layer_norm_epsilon": config["rms_norm_eps"],
        "num_heads": sizes["heads"],
        "head_dim": sizes["width"],
        "intermediate_size": sizes["inner"],
        "state_size": sizes["state"],
        "n_groups": sizes["groups"],
        "conv_kernel": sizes["kernel"],
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": "auto",
        "time_step_limit": [0.0, _UNLIMITED],
    }


# No limit: JSON has no infinity, and no step comes near this one.
_UNLIMITED = 1e30


STATE_SPACE: dict[str, Architecture] = {
    "mamba": Architecture(
        "mamba",
        "MambaForCausalLM",
        {
            "attn_norm": "norm",
            **{name: target for name, target in MIXER.items() if name != "ssm_norm"},
            "ssm_x": "mixer.x_proj",
            "ssm_dt": "mixer.dt_proj",
            "ssm_dt.bias": "mixer.dt_proj.bias",
        },
        ends=BACKBONE,
        prefix="backbone.layers",
        keys=_mamba,
        values=DECAY,
        reshape={"ssm_conv1d": depthwise},
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
        reshape=MIXER_SHAPES,
        own_shapes=True,
    ),
}
