"""Linear attention: gated delta nets (Qwen 3 Next, 3.5), Kimi delta attention, RWKV 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import numpy as np

from converters.architectures.base import (
    ATTENTION,
    DENSE_OR_MOE,
    FFN_NORM,
    GATED,
    GATED_SHARED_EXPERT,
    LANGUAGE_MODEL,
    LANGUAGE_MODEL_LAYERS,
    MLA_ABSORBED,
    MLA_KV,
    MLA_Q,
    MOE,
    QK_NORMS,
    Architecture,
    Config,
    Names,
    Rows,
    Shape,
    as_row,
    depthwise,
    flat,
    gate_and_up,
    gating,
    log_of_negative,
    needs_experts,
    only,
    renamed,
    shape_of,
    shared_count,
    shared_width,
    text_rope,
    unscaled,
)
from converters.gguf.reader import GGUFFile
from converters.gguf.validate import float_of, layer_count, per_layer, scalar

_DELTA_NET = {
    **ATTENTION,
    **QK_NORMS,
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}

_QWEN_LAYER = {**_DELTA_NET, "post_attention_norm": "post_attention_layernorm"}

_QWEN_EXPERTS = {**MOE, **GATED_SHARED_EXPERT}

_QWEN_OPTIONAL = frozenset(_DELTA_NET) - {"attn_norm"}


def _heads(gguf: GGUFFile) -> tuple[int, int, int, int]:
    """Of linear attention: key heads, value heads, width of a key, width of a value."""
    keys, values = scalar(gguf, "ssm.group_count"), scalar(gguf, "ssm.time_step_rank")
    inner = scalar(gguf, "ssm.inner_size")
    if keys < 1 or values < 1 or values % keys or inner % values:
        raise gguf.key_error(
            "ssm.time_step_rank",
            expected=f"a multiple of the {keys} heads of keys that divides {inner}",
        )
    return keys, values, scalar(gguf, "ssm.state_size"), inner // values


def _value_heads(gguf: GGUFFile) -> Rows:
    """Order of value heads, those that share a key in a row.

    GGUF interleaves them over the keys, as llama.cpp's operations repeat keys that way.
    """
    keys, values, _, _ = _heads(gguf)
    return np.arange(values).reshape(-1, keys).T.reshape(-1)


def _grouped(gguf: GGUFFile, rows: int) -> Rows:
    """Row order of values, of any number per head."""
    heads = _value_heads(gguf)
    return np.arange(rows).reshape(len(heads), -1)[heads].reshape(-1)


def _grouped_after_keys(gguf: GGUFFile, rows: int) -> Rows:
    """Row order of queries and keys (as they are) and values."""
    keys, values, width, value_width = _heads(gguf)
    before = 2 * keys * width
    if rows != before + values * value_width:
        raise gguf.key_error("ssm.state_size", expected=f"heads that make up {rows} rows")
    return np.concatenate([np.arange(before), before + _grouped(gguf, rows - before)])


def _interleaved(fused: str, *names: str) -> Callable[[GGUFFile], list[tuple[str, Rows]]]:
    """The parts of a matrix whose rows are grouped by key head.

    Args:
        names: ``ssm_beta`` and ``ssm_alpha``, or ``attn_qkv`` and ``attn_gate``.
    """

    def parts(gguf: GGUFFile) -> list[tuple[str, Rows]]:
        keys, values, width, value_width = _heads(gguf)
        shared = values // keys
        if names == ("ssm_beta", "ssm_alpha"):
            sizes = [[shared], [shared]]
        else:
            sizes = [[width, width, shared * value_width], [shared * value_width]]
        whole = sum(map(sum, sizes))
        rows_there = shape_of(gguf, fused)[0]
        if keys * whole != rows_there:
            raise gguf.key_error("ssm.state_size", expected=f"heads that make up {rows_there} rows")
        found, first = [], 0
        for name, inner in zip(names, sizes, strict=True):
            rows = []
            for size in inner:
                rows.append((np.arange(keys)[:, None] * whole + first + np.arange(size)).ravel())
                first += size
            found.append((name, np.concatenate(rows)))
        return found

    return parts


def _delta_net(gguf: GGUFFile, config: Config) -> Config:
    keys, values, width, value_width = _heads(gguf)
    if gguf.architecture != "qwen3next":
        text_rope(gguf, config, interleaved=True)
    return {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": width,
        "linear_value_head_dim": value_width,
        "linear_conv_kernel_dim": scalar(gguf, "ssm.conv_kernel"),
        "full_attention_interval": _interval(gguf),
        # One section for RoPE, as Hugging Face has it for this family.
        "rope_parameters": {
            "rope_type": "default",
            "type": "default",
            **config.get("rope_scaling", {}),
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": config["partial_rotary_factor"],
        },
    }


def _interval(gguf: GGUFFile) -> int:
    """One of so many layers has full attention."""
    every = scalar(gguf, "full_attention_interval", 4)
    layers = layer_count(gguf)
    if not 0 < every <= layers:
        raise gguf.key_error(
            "full_attention_interval", expected=f"between 1 and the {layers} layers"
        )
    recurrent = gguf.key("attention.recurrent_layers", None)
    if recurrent is not None:
        wanted = [(i + 1) % every != 0 for i in range(layers)]
        if [bool(x) for x in np.atleast_1d(recurrent)[:layers]] != wanted:
            raise gguf.key_error(
                "attention.recurrent_layers",
                expected=f"full attention in each {every}th layer and nowhere else",
            )
    return every


def _delta_net_experts(gguf: GGUFFile, config: Config) -> Config:
    shared = gguf.tensor("blk.0.ffn_up_shexp.weight").shape[0]
    return {
        **_delta_net(gguf, config),
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }


_QWEN_RESHAPE = {"ssm_conv1d": depthwise, "ffn_gate_inp_shexp": as_row}

_QWEN_ORDER = {
    "attn_qkv": _grouped_after_keys,
    "ssm_conv1d": _grouped_after_keys,
    **dict.fromkeys(("attn_gate", "ssm_alpha", "ssm_beta", "ssm_dt.bias", "ssm_a"), _grouped),
}

_MLA = {**MLA_KV, **MLA_ABSORBED}

_KDA_CONVS = {f"ssm_conv1d_{x}": f"self_attn.{x}_conv.conv" for x in "qkv"}

_KDA = {
    **_KDA_CONVS,
    "ssm_f_a": "self_attn.f_a_proj",
    "ssm_f_b": "self_attn.f_b_proj",
    "ssm_g_a": "self_attn.g_a_proj",
    "ssm_g_b": "self_attn.g_b_proj",
    "ssm_beta": "self_attn.b_proj",
    "ssm_dt.bias": "self_attn.dt_bias",
    "ssm_a": "self_attn.A_log",
    "ssm_norm": "self_attn.o_norm",
}


def _kda_kernel(shape: Shape) -> Shape:
    """(channels, width, 1), from a shape with axes of one."""
    return (prod(shape[:-1]), shape[-1], 1)


def _kda_decay(shape: Shape) -> Shape:
    return (1, 1, prod(shape), 1)


def _mla_sizes(gguf: GGUFFile) -> Config:
    rope_dim, width = scalar(gguf, "rope.dimension_count"), scalar(gguf, "attention.key_length_mla")
    if not 0 <= rope_dim < width:
        raise gguf.key_error(
            "attention.key_length_mla", expected=f"more than {rope_dim}, the rotated part"
        )
    return {
        "kv_lora_rank": scalar(gguf, "attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": width - rope_dim,
        "v_head_dim": scalar(gguf, "attention.value_length_mla"),
    }


def _kimi_linear(gguf: GGUFFile, config: Config) -> Config:
    needs_experts(gguf, config)
    if scalar(gguf, "attention.q_lora_rank", 0):
        raise gguf.key_error("attention.q_lora_rank", expected="whole queries in this architecture")
    heads = per_layer(gguf, "attention.head_count_kv")
    linear = [i + 1 for i, count in enumerate(heads) if not count]
    full = [i + 1 for i, count in enumerate(heads) if count]
    if not linear or not full:
        raise gguf.key_error(
            "attention.head_count_kv", expected="layers with attention and others without"
        )
    return {
        **_mla_sizes(gguf),
        "linear_attn_config": {
            "kda_layers": linear,
            "full_attn_layers": full,
            "num_heads": config["num_attention_heads"],
            "head_dim": scalar(gguf, "kda.head_dim"),
            "short_conv_kernel_size": scalar(gguf, "ssm.conv_kernel"),
        },
        "num_key_value_heads": config["num_attention_heads"],
        "mla_use_nope": True,
        "model_max_length": config["max_position_embeddings"],
        "num_experts_per_token": config["num_experts_per_tok"],
        "num_shared_experts": shared_count(gguf, config),
        "moe_router_activation_func": gating(gguf, 2),
        "moe_renormalize": True,
        "moe_layer_freq": 1,
        "first_k_dense_replace": scalar(gguf, "leading_dense_block_count", 0),
        "routed_scaling_factor": float_of(gguf, "expert_weights_scale", 0.0) or 1.0,
        "num_expert_group": 1,
        "topk_group": 1,
    }


def _ling3(gguf: GGUFFile, config: Config) -> Config:
    needs_experts(gguf, config)
    # Constants of mlx-lm's class.
    unscaled(gguf, config)
    only(gguf, "expert_weights_norm", True, absent=False)
    only(gguf, "expert_gating_func", 2)
    only(gguf, "kda.safe_gate", True)
    for kind in ("exp", "shexp"):
        if np.any(gguf.key(f"swiglu_clamp_{kind}", 0.0)):
            raise gguf.key_error(
                f"swiglu_clamp_{kind}", expected="no limits of activations in this architecture"
            )
    queries = scalar(gguf, "attention.q_lora_rank", 0)
    return {
        **_mla_sizes(gguf),
        "head_dim": scalar(gguf, "kda.head_dim"),
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": queries or None,
        "layer_group_size": _ling3_group(gguf),
        "short_conv_kernel_size": scalar(gguf, "ssm.conv_kernel"),
        "kda_safe_gate": True,
        "kda_lower_bound": float_of(gguf, "kda.gate_lower_bound"),
        "no_kda_lora": True,
        "rope_interleave": True,
        "moe_shared_expert_intermediate_size": shared_width(gguf),
        "num_shared_experts": 1,
        "first_k_dense_replace": scalar(gguf, "leading_dense_block_count"),
        "n_group": scalar(gguf, "expert_group_count", 0) or 1,
        "topk_group": scalar(gguf, "expert_group_used_count", 0) or 1,
        "routed_scaling_factor": float_of(gguf, "expert_weights_scale", 0.0) or 1.0,
    }


def _ling3_group(gguf: GGUFFile) -> int:
    """One of so many layers has latent attention, and all after the last whole group."""
    found = [count > 0 for count in per_layer(gguf, "attention.head_count_kv")]
    layers = len(found)
    for size in range(1, layers + 1):
        whole = layers // size * size
        if found == [(i + 1) % size == 0 or i >= whole for i in range(layers)]:
            return size
    raise gguf.key_error(
        "attention.head_count_kv", expected="attention at the end of equal groups of layers"
    )


def _ling3_output(gguf: GGUFFile, layer: int) -> Names:
    latent = per_layer(gguf, "attention.head_count_kv")[layer] > 0
    return {"attn_output": "attention.dense" if latent else "attention.o_proj"}


# The width of a head in every RWKV 7 model.
_RWKV_HEAD = 64

_RWKV_INPUTS = "rwkvag"

_RWKV_LORA = {
    f"time_mix_{x}{part}": f"attn.{x}_lora.lora.{target}"
    for x in "wavg"
    for part, target in (("1", "0"), ("2", "2"))
}

_RWKV_BIASES = {f"time_mix_{x}0.weight": f"attn.{x}_lora.lora.2.bias" for x in "wav"}


def _rwkv_heads(shape: Shape) -> Shape:
    return (shape[0] // _RWKV_HEAD, _RWKV_HEAD)


def _rwkv_lerp(gguf: GGUFFile) -> Sequence[tuple[str, int]]:
    """Token shift of each input, which GGUF stacks."""
    return [(f"time_mix_lerp_{x}", 1) for x in _RWKV_INPUTS]


def _rwkv_placeholders(gguf: GGUFFile, layer: int) -> Names:
    """The first layer has no value residual; GGUF has unused tensors for it."""
    if layer:
        return {}
    return {"time_mix_v0.weight": "", "time_mix_v1": "", "time_mix_v2": ""}


def _rwkv7(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "wkv.head_size", _RWKV_HEAD)
    if config["hidden_size"] % _RWKV_HEAD:
        raise gguf.key_error(
            "embedding_length", expected=f"a multiple of {_RWKV_HEAD}, the width of a head"
        )
    ranks = {"decay": "decay", "a": "iclr", "v": "value_residual_mix", "gate": "gate"}
    return {
        "head_dim": _RWKV_HEAD,
        "num_heads": config["hidden_size"] // _RWKV_HEAD,
        "norm_bias": True,
        **{
            f"{name}_low_rank_dim": scalar(gguf, f"attention.{rank}_lora_rank")
            for name, rank in ranks.items()
        },
    }


RWKV7 = Architecture(
    "rwkv7",
    "RWKV7ForCausalLM",
    {
        "attn_norm": "attn_norm",
        "attn_norm_2": "ffn_norm",
        **_RWKV_LORA,
        **_RWKV_BIASES,
        **{f"time_mix_lerp_{x}.weight": f"attn.x_{x}" for x in _RWKV_INPUTS},
        "time_mix_k_k.weight": "attn.k_k",
        "time_mix_k_a.weight": "attn.k_a",
        "time_mix_r_k.weight": "attn.r_k",
        "time_mix_receptance": "attn.r_proj",
        "time_mix_key": "attn.k_proj",
        "time_mix_value": "attn.v_proj",
        "time_mix_output": "attn.o_proj",
        "time_mix_ln": "attn.g_norm",
        "channel_mix_lerp_k.weight": "ffn.x_k",
        "channel_mix_key": "ffn.key",
        "channel_mix_value": "ffn.value",
    },
    by_layer=_rwkv_placeholders,
    ends={"token_embd": "model.embeddings", "token_embd_norm": "model.layers.0.pre_norm"},
    keys=_rwkv7,
    epsilon="norm_eps",
    reshape={
        **{f"time_mix_lerp_{x}.weight": lambda shape: (1, 1, shape[-1]) for x in _RWKV_INPUTS},
        **{f"time_mix_{x}.weight": _rwkv_heads for x in ("k_k", "k_a", "r_k")},
        "time_mix_ln": _rwkv_heads,
        "time_mix_ln.bias": _rwkv_heads,
        "channel_mix_lerp_k.weight": lambda shape: shape[-1:],
    },
    parts={"time_mix_lerp_fused": _rwkv_lerp},
    norm_biases=True,
    own_shapes=True,
)

_qwen35 = partial(
    Architecture,
    ends=LANGUAGE_MODEL,
    prefix=LANGUAGE_MODEL_LAYERS,
    order=_QWEN_ORDER,
    columns={"ssm_out": _value_heads},
    values={"ssm_a": log_of_negative},
    reshape=_QWEN_RESHAPE,
    optional=_QWEN_OPTIONAL,
    partial_rotary=True,
    own_shapes=True,
)

ROWS: dict[str, Architecture] = {
    "bailingmoe3": Architecture(
        "bailing_hybrid",
        "BailingMoeV3ForCausalLM",
        {
            **renamed(ATTENTION | MLA_Q | _MLA | _KDA, "self_attn.", "attention."),
            **{f"ssm_conv1d_{x}": f"attention.{x}_conv1d" for x in "qkv"},
            "ssm_f_a": "attention.f_proj",
            "ssm_g_a": "attention.g_proj",
            "attn_gate": "attention.g_proj",
            **FFN_NORM,
            **DENSE_OR_MOE,
            "exp_probs_b.bias": "mlp.gate.expert_bias",
        },
        by_layer=_ling3_output,
        ends={"token_embd": "model.word_embeddings"},
        keys=_ling3,
        values={"ssm_a": np.log},
        reshape={**dict.fromkeys(_KDA_CONVS, _kda_kernel), "ssm_a": flat},
        optional=None,
        partial_rotary=True,
        own_shapes=True,
        per_layer=True,
    ),
    "kimi-linear": Architecture(
        "kimi_linear",
        "KimiLinearForCausalLM",
        {
            **ATTENTION,
            **_MLA,
            **_KDA,
            **FFN_NORM,
            **DENSE_OR_MOE,
            "exp_probs_b.bias": "mlp.e_score_correction_bias",
        },
        keys=_kimi_linear,
        values={"ssm_a": log_of_negative},
        reshape={**dict.fromkeys(_KDA_CONVS, _kda_kernel), "ssm_a": _kda_decay},
        optional=None,
        partial_rotary=True,
        own_shapes=True,
        per_layer=True,
    ),
    "qwen35": _qwen35("qwen3_5", "Qwen3_5ForCausalLM", _QWEN_LAYER | GATED, keys=_delta_net),
    "qwen35moe": _qwen35(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        _QWEN_LAYER | _QWEN_EXPERTS,
        keys=_delta_net_experts,
        parts={"ffn_gate_up_exps": gate_and_up},
    ),
    # Its own class in mlx-lm fuses matrices that files have in different types: only plain floats
    # could hold them.
    "qwen3next": _qwen35(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        _QWEN_LAYER | _QWEN_EXPERTS,
        keys=_delta_net_experts,
        order={},
        columns={},
        parts={
            "ffn_gate_up_exps": gate_and_up,
            "ssm_ba": _interleaved("ssm_ba", "ssm_beta", "ssm_alpha"),
            "ssm_in": _interleaved("ssm_in", "attn_qkv", "attn_gate"),
        },
    ),
    "rwkv7": RWKV7,
}
