"""Linear attention: gated delta nets (Qwen 3 Next, 3.5), Kimi delta attention, RWKV 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import numpy as np

from converters.architectures import names
from converters.architectures.base import (
    Architecture,
    Rows,
    Shape,
    as_row,
    depthwise,
    flat,
    gate_and_up,
    log_of_negative,
    shape_of,
)
from converters.architectures.hyperparameters import Config, Hyperparameters

_DELTA_NET = {
    **names.ATTENTION,
    **names.QK_NORMS,
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

_QWEN_EXPERTS = {**names.MOE, **names.GATED_SHARED_EXPERT}

_QWEN_OPTIONAL = frozenset(_DELTA_NET) - {"attn_norm"}


def _heads(hp: Hyperparameters) -> tuple[int, int, int, int]:
    """Of linear attention: key heads, value heads, width of a key, width of a value."""
    keys, values = hp.integer("ssm.group_count"), hp.integer("ssm.time_step_rank")
    inner = hp.integer("ssm.inner_size")
    hp.refuse_if(
        keys < 1 or values < 1 or values % keys or inner % values,
        "ssm.time_step_rank",
        f"a multiple of the {keys} heads of keys that divides {inner}",
    )
    return keys, values, hp.integer("ssm.state_size"), inner // values


def _value_heads(hp: Hyperparameters) -> Rows:
    """Order of value heads, those that share a key in a row.

    GGUF interleaves them over the keys, as llama.cpp's operations repeat keys that way.
    """
    keys, values, _, _ = _heads(hp)
    return np.arange(values).reshape(-1, keys).T.reshape(-1)


def _grouped(hp: Hyperparameters, rows: int) -> Rows:
    """Row order of values, of any number per head."""
    heads = _value_heads(hp)
    return np.arange(rows).reshape(len(heads), -1)[heads].reshape(-1)


def _grouped_after_keys(hp: Hyperparameters, rows: int) -> Rows:
    """Row order of queries and keys (as they are) and values."""
    keys, values, width, value_width = _heads(hp)
    before = 2 * keys * width
    hp.refuse_if(
        rows != before + values * value_width, "ssm.state_size", f"heads that make up {rows} rows"
    )
    return np.concatenate([np.arange(before), before + _grouped(hp, rows - before)])


def _interleaved(fused: str, *names: str) -> Callable[[Hyperparameters], list[tuple[str, Rows]]]:
    """The parts of a matrix whose rows are grouped by key head.

    Args:
        names: ``ssm_beta`` and ``ssm_alpha``, or ``attn_qkv`` and ``attn_gate``.
    """

    def parts(hp: Hyperparameters) -> list[tuple[str, Rows]]:
        keys, values, width, value_width = _heads(hp)
        shared = values // keys
        if names == ("ssm_beta", "ssm_alpha"):
            sizes = [[shared], [shared]]
        else:
            sizes = [[width, width, shared * value_width], [shared * value_width]]
        whole = sum(map(sum, sizes))
        rows_there = shape_of(hp, fused)[0]
        hp.refuse_if(
            keys * whole != rows_there, "ssm.state_size", f"heads that make up {rows_there} rows"
        )
        found, first = [], 0
        for name, inner in zip(names, sizes, strict=True):
            rows = []
            for size in inner:
                rows.append((np.arange(keys)[:, None] * whole + first + np.arange(size)).ravel())
                first += size
            found.append((name, np.concatenate(rows)))
        return found

    return parts


def _delta_net(hp: Hyperparameters) -> Config:
    keys, values, width, value_width = _heads(hp)
    if hp.architecture != "qwen3next":
        hp.text_rope(interleaved=True)
    return {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": width,
        "linear_value_head_dim": value_width,
        "linear_conv_kernel_dim": hp.integer("ssm.conv_kernel"),
        "full_attention_interval": _interval(hp),
        # One section for RoPE, as Hugging Face has it for this family.
        "rope_parameters": {
            "rope_type": "default",
            "type": "default",
            **hp.config.get("rope_scaling", {}),
            "rope_theta": hp["rope_theta"],
            "partial_rotary_factor": hp["partial_rotary_factor"],
        },
    }


def _interval(hp: Hyperparameters) -> int:
    """One of so many layers has full attention."""
    every = hp.integer("full_attention_interval", 4)
    layers = hp.layers
    hp.refuse_if(
        not 0 < every <= layers, "full_attention_interval", f"between 1 and the {layers} layers"
    )
    recurrent = hp.key("attention.recurrent_layers", None)
    if recurrent is not None:
        wanted = [(i + 1) % every != 0 for i in range(layers)]
        hp.refuse_if(
            [bool(x) for x in np.atleast_1d(recurrent)[:layers]] != wanted,
            "attention.recurrent_layers",
            f"full attention in each {every}th layer and nowhere else",
        )
    return every


def _delta_net_experts(hp: Hyperparameters) -> Config:
    shared = hp.tensor("blk.0.ffn_up_shexp.weight").shape[0]
    return {
        **_delta_net(hp),
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

_MLA = {**names.MLA_KV, **names.MLA_ABSORBED}

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


def _mla_sizes(hp: Hyperparameters) -> Config:
    rope_dim, width = hp.integer("rope.dimension_count"), hp.integer("attention.key_length_mla")
    hp.refuse_if(
        not 0 <= rope_dim < width,
        "attention.key_length_mla",
        f"more than {rope_dim}, the rotated part",
    )
    return {
        "kv_lora_rank": hp.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": width - rope_dim,
        "v_head_dim": hp.integer("attention.value_length_mla"),
    }


def _kimi_linear(hp: Hyperparameters) -> Config:
    hp.needs_experts()
    hp.refuse_if(
        hp.integer("attention.q_lora_rank", 0),
        "attention.q_lora_rank",
        "whole queries in this architecture",
    )
    heads = hp.per_layer("attention.head_count_kv")
    linear = [i + 1 for i, count in enumerate(heads) if not count]
    full = [i + 1 for i, count in enumerate(heads) if count]
    hp.refuse_if(
        not linear or not full,
        "attention.head_count_kv",
        "layers with attention and others without",
    )
    return {
        **_mla_sizes(hp),
        "linear_attn_config": {
            "kda_layers": linear,
            "full_attn_layers": full,
            "num_heads": hp["num_attention_heads"],
            "head_dim": hp.integer("kda.head_dim"),
            "short_conv_kernel_size": hp.integer("ssm.conv_kernel"),
        },
        "num_key_value_heads": hp["num_attention_heads"],
        "mla_use_nope": True,
        "model_max_length": hp["max_position_embeddings"],
        "num_experts_per_token": hp["num_experts_per_tok"],
        "num_shared_experts": hp.shared_count,
        "moe_router_activation_func": hp.gating(2),
        "moe_renormalize": True,
        "moe_layer_freq": 1,
        "first_k_dense_replace": hp.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": hp.number("expert_weights_scale", 0.0) or 1.0,
        "num_expert_group": 1,
        "topk_group": 1,
    }


def _ling3(hp: Hyperparameters) -> Config:
    hp.needs_experts()
    # Constants of mlx-lm's class.
    hp.unscaled()
    hp.only("expert_weights_norm", True, absent=False)
    hp.only("expert_gating_func", 2)
    hp.only("kda.safe_gate", True)
    for kind in ("exp", "shexp"):
        hp.refuse_if(
            np.any(hp.key(f"swiglu_clamp_{kind}", 0.0)),
            f"swiglu_clamp_{kind}",
            "no limits of activations in this architecture",
        )
    queries = hp.integer("attention.q_lora_rank", 0)
    return {
        **_mla_sizes(hp),
        "head_dim": hp.integer("kda.head_dim"),
        "num_key_value_heads": hp["num_attention_heads"],
        "q_lora_rank": queries or None,
        "layer_group_size": _ling3_group(hp),
        "short_conv_kernel_size": hp.integer("ssm.conv_kernel"),
        "kda_safe_gate": True,
        "kda_lower_bound": hp.number("kda.gate_lower_bound"),
        "no_kda_lora": True,
        "rope_interleave": True,
        "moe_shared_expert_intermediate_size": hp.shared_width,
        "num_shared_experts": 1,
        "first_k_dense_replace": hp.integer("leading_dense_block_count"),
        "n_group": hp.integer("expert_group_count", 0) or 1,
        "topk_group": hp.integer("expert_group_used_count", 0) or 1,
        "routed_scaling_factor": hp.number("expert_weights_scale", 0.0) or 1.0,
    }


def _ling3_group(hp: Hyperparameters) -> int:
    """One of so many layers has latent attention, and all after the last whole group."""
    found = [count > 0 for count in hp.per_layer("attention.head_count_kv")]
    layers = len(found)
    for size in range(1, layers + 1):
        whole = layers // size * size
        if found == [(i + 1) % size == 0 or i >= whole for i in range(layers)]:
            return size
    raise hp.error(
        "attention.head_count_kv", expected="attention at the end of equal groups of layers"
    )


def _ling3_output(hp: Hyperparameters, layer: int) -> names.Names:
    latent = hp.per_layer("attention.head_count_kv")[layer] > 0
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


def _rwkv_lerp(hp: Hyperparameters) -> Sequence[tuple[str, int]]:
    """Token shift of each input, which GGUF stacks."""
    return [(f"time_mix_lerp_{x}", 1) for x in _RWKV_INPUTS]


def _rwkv_placeholders(hp: Hyperparameters, layer: int) -> names.Names:
    """The first layer has no value residual; GGUF has unused tensors for it."""
    if layer:
        return {}
    return {"time_mix_v0.weight": "", "time_mix_v1": "", "time_mix_v2": ""}


def _rwkv7(hp: Hyperparameters) -> Config:
    hp.only("wkv.head_size", _RWKV_HEAD)
    hp.refuse_if(
        hp["hidden_size"] % _RWKV_HEAD,
        "embedding_length",
        f"a multiple of {_RWKV_HEAD}, the width of a head",
    )
    ranks = {"decay": "decay", "a": "iclr", "v": "value_residual_mix", "gate": "gate"}
    return {
        "head_dim": _RWKV_HEAD,
        "num_heads": hp["hidden_size"] // _RWKV_HEAD,
        "norm_bias": True,
        **{
            f"{name}_low_rank_dim": hp.integer(f"attention.{rank}_lora_rank")
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
    ends=names.LANGUAGE_MODEL,
    prefix=names.LANGUAGE_MODEL_LAYERS,
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
            **names.renamed(
                names.ATTENTION | names.MLA_Q | _MLA | _KDA, "self_attn.", "attention."
            ),
            **{f"ssm_conv1d_{x}": f"attention.{x}_conv1d" for x in "qkv"},
            "ssm_f_a": "attention.f_proj",
            "ssm_g_a": "attention.g_proj",
            "attn_gate": "attention.g_proj",
            **names.FFN_NORM,
            **names.DENSE_OR_MOE,
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
            **names.ATTENTION,
            **_MLA,
            **_KDA,
            **names.FFN_NORM,
            **names.DENSE_OR_MOE,
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
    "qwen35": _qwen35("qwen3_5", "Qwen3_5ForCausalLM", _QWEN_LAYER | names.GATED, keys=_delta_net),
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
