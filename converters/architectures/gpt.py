"""GPT-2 and its line: fused QKV, layer norms, biases, a plain GELU.

They differ in positions and norms. Models with ALiBi (Press et al., 2022, arXiv:2108.12409) do not
run in stock mlx-lm.
"""

from __future__ import annotations

from functools import partial

from converters.architectures import names
from converters.architectures.base import Architecture, fixed, fused_qkv
from converters.architectures.hyperparameters import Config, Hyperparameters

_ALIBI = 8.0  # the steepest ALiBi slope, where files have none


def _gpt(hp: Hyperparameters, positions: str, parallel: bool = False) -> Config:
    return {
        "hidden_act": "gelu_new",
        "position_embedding_type": positions,
        "use_parallel_residual": parallel,
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
    }


def _gptneox(hp: Hyperparameters) -> Config:
    return _gpt(hp, "rope", bool(hp.key("use_parallel_residual")))


def _falcon(hp: Hyperparameters) -> Config:
    """The larger models have a second norm, for attention; the other is the feed-forward's."""
    two = "blk.0.attn_norm_2.weight" in hp
    return {
        **_gpt(hp, "rope", parallel=True),
        "attention_norm": "ln_attn" if two else "input_layernorm",
        "feed_forward_norm": "input_layernorm",
    }


def _bloom(hp: Hyperparameters) -> Config:
    keys = _gpt(hp, "alibi")
    return {**keys, "max_alibi_bias": _ALIBI, "embedding_norm": True}


def _dbrx(hp: Hyperparameters) -> Config:
    clip = hp.number("attention.clamp_kqv", 0.0)
    return {**_gpt(hp, "rope"), "hidden_act": "silu", "clip_qkv": clip}


def _mpt(hp: Hyperparameters) -> Config:
    slope = hp.number("attention.max_alibi_bias", 0.0)
    learned = "position_embd.weight" in hp
    hp.refuse_if(
        learned == bool(slope),
        "attention.max_alibi_bias",
        "either ALiBi or learned positions",
        str(slope),
    )
    return {
        **_gpt(hp, "learned" if learned else "alibi"),
        "max_alibi_bias": slope,
        "clip_qkv": hp.number("attention.clamp_kqv", 0.0),
    }


def _jais(hp: Hyperparameters) -> Config:
    slope = hp.number("attention.max_alibi_bias", 0.0)
    return {
        **_gpt(hp, "alibi" if slope else "none"),
        "hidden_act": "silu",
        "gated": True,
        "attention_multiplier": 1 / hp["head_dim"],
        "max_alibi_bias": slope,
    }


_LAYER = {**names.ATTENTION, **names.FFN_NORM, **names.UNGATED}

_row = partial(
    Architecture,
    "gpt",
    "GPTForCausalLM",
    epsilon="layer_norm_epsilon",
    parts={"attn_qkv": fused_qkv},
    norm_biases=True,
)

ROWS: dict[str, Architecture] = {
    "bloom": _row(layer=_LAYER, ends={"token_embd_norm": "model.embed_norm"}, keys=_bloom),
    "codeshell": Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {**names.ATTENTION, **names.FFN_NORM, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        keys=fixed(hidden_act="gelu_pytorch_tanh", use_bias=True),
        epsilon="norm_epsilon",
        norm_biases=True,
    ),
    "dbrx": _row(
        layer={**names.ATTENTION, "attn_output_norm": "post_attention_layernorm", **names.MOE},
        keys=_dbrx,
    ),
    "falcon": _row(
        layer={**names.ATTENTION, "attn_norm_2": "ln_attn", **names.UNGATED},
        keys=_falcon,
        optional=frozenset({"attn_norm_2"}),
    ),
    "gpt2": _row(
        layer=_LAYER,
        ends={"position_embd": "model.embed_positions"},
        keys=partial(_gpt, positions="learned"),
    ),
    "gptneox": _row(layer=_LAYER, keys=_gptneox, partial_rotary=True),
    "jais": _row(layer={**names.ATTENTION, **names.FFN_NORM, **names.GATED}, keys=_jais),
    "mpt": _row(layer=_LAYER, ends={"position_embd": "model.embed_positions"}, keys=_mpt),
    "starcoder": _row(
        layer=_LAYER,
        ends={"position_embd": "model.embed_positions"},
        keys=partial(_gpt, positions="learned"),
    ),
    "starcoder2": Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {**names.ATTENTION, **names.FFN_NORM, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        keys=fixed(hidden_act="gelu_pytorch_tanh", use_bias=True),
        epsilon="norm_epsilon",
        norm_biases=True,
    ),
}
