"""PLaMo 2: state-space layers and attention in turns, with norms around both."""

from __future__ import annotations

from functools import partial

import numpy as np

from converters.gguf.architectures.keys import only, unscaled
from converters.gguf.architectures.mixers import DECAY, FIRST_SHAPES
from converters.gguf.architectures.row import Architecture, Config, Floats
from converters.gguf.numbers import per_layer, scalar
from converters.gguf.reader import GGUFFile

_MIXERS = {
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


def _less(offset: float, x: Floats) -> Floats:
    return x - np.float32(offset)


def _plamo2(gguf: GGUFFile, config: Config) -> Config:
    # What mlx-lm's class has built in.
    only(gguf, "rope.freq_base", 10000.0)
    unscaled(gguf, config)
    heads, width = scalar(gguf, "ssm.time_step_rank"), config["head_dim"]
    if heads * width != scalar(gguf, "ssm.inner_size"):
        key = f"{gguf.architecture}.ssm.inner_size"
        raise gguf.error(key, expected=f"{heads} heads of {width}, as wide as those of attention")
    return {
        "mamba_step": _step(gguf),
        "mamba_enabled": True,
        "mamba_num_heads": heads,
        "mamba_d_state": scalar(gguf, "ssm.state_size"),
        "mamba_d_conv": scalar(gguf, "ssm.conv_kernel"),
        "hidden_size_per_head": width,
    }


def _step(gguf: GGUFFile) -> int:
    """Each how many layers one has attention: that in the middle."""
    found = [count > 0 for count in per_layer(gguf, "attention.head_count_kv")]
    for step in range(2, len(found) + 1):
        if found == [i % step == step // 2 for i in range(len(found))]:
            return step
    key = f"{gguf.architecture}.attention.head_count_kv"
    raise gguf.error(key, expected="attention in the middle of equal runs of layers")


PLAMO2 = Architecture(
    "plamo2",
    "Plamo2ForCausalLM",
    {
        "attn_norm": "pre_mixer_norm",
        "post_attention_norm": "post_mixer_norm.weight",
        **_MIXERS,
        "ffn_norm": "pre_mlp_norm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
        "post_ffw_norm": "post_mlp_norm.weight",
    },
    prefix="model.layers.layers",
    keys=_plamo2,
    values={
        **DECAY,
        # What the model adds to the weights of its norms, GGUF has added already.
        **dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), partial(_less, 1.0)),
        "post_attention_norm": partial(_less, 1 / 5),
        "post_ffw_norm": partial(_less, 1 / 5**1.5),
    },
    reshape=FIRST_SHAPES,
    optional=frozenset(_MIXERS),
    own_shapes=True,
    per_layer=True,
)
