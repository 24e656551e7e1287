"""Architectures with linear attention: Qwen 3 Next and 3.5, whose layers are gated delta nets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from converters.gguf.architectures.fused import Rows, gate_and_up, shape_of
from converters.gguf.architectures.limits import text_alone
from converters.gguf.architectures.row import (
    ATTENTION,
    GATED,
    QK_NORMS,
    SPARSE,
    Architecture,
    Config,
    as_row,
    depthwise,
    log_of_negative,
)
from converters.gguf.numbers import layer_count, scalar
from converters.gguf.reader import GGUFFile

_MIXED = {
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
_LAYER = {**_MIXED, "post_attention_norm": "post_attention_layernorm"}
_EXPERTS = {
    **SPARSE,
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_ENDS = {
    "token_embd": "language_model.model.embed_tokens",
    "output_norm": "language_model.model.norm",
    "output": "language_model.lm_head",
}
_PREFIX = "language_model.model.layers"
_EVERY = frozenset(_MIXED) - {"attn_norm"}


def _heads(gguf: GGUFFile) -> tuple[int, int, int, int]:
    """Of linear attention: heads of keys, of values, the width of a key and of a value.

    Raises:
        GGUFError: the sizes do not divide.
    """
    keys, values = scalar(gguf, "ssm.group_count"), scalar(gguf, "ssm.time_step_rank")
    inner = scalar(gguf, "ssm.inner_size")
    if keys < 1 or values < 1 or values % keys or inner % values:
        raise gguf.error(
            f"{gguf.architecture}.ssm.time_step_rank",
            expected=f"a multiple of the {keys} heads of keys that divides {inner}",
        )
    return keys, values, scalar(gguf, "ssm.state_size"), inner // values


def _value_heads(gguf: GGUFFile) -> Rows:
    """Heads of values, those that share a key one after the other.

    llama.cpp stores them in turns, one for each key, as its operations repeat keys that way.
    """
    keys, values, _, _ = _heads(gguf)
    return np.arange(values).reshape(-1, keys).T.reshape(-1)


def _grouped(gguf: GGUFFile, rows: int) -> Rows:
    """Rows of values, of whatever number for each head."""
    heads = _value_heads(gguf)
    return np.arange(rows).reshape(len(heads), -1)[heads].reshape(-1)


def _grouped_after_keys(gguf: GGUFFile, rows: int) -> Rows:
    """Rows of queries and keys as they are, then those of values."""
    keys, values, width, value_width = _heads(gguf)
    before = 2 * keys * width
    if rows != before + values * value_width:
        key = f"{gguf.architecture}.ssm.state_size"
        raise gguf.error(key, expected=f"heads that make up {rows} rows")
    return np.concatenate([np.arange(before), before + _grouped(gguf, rows - before)])


def _interleaved(fused: str, *names: str) -> Callable[[GGUFFile], list[tuple[str, Rows]]]:
    """Parts of which each head of keys has its own rows: those of one head, then the next.

    Args:
        fused: the matrix.
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
            key = f"{gguf.architecture}.ssm.state_size"
            raise gguf.error(key, expected=f"heads that make up {rows_there} rows")
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
        text_alone(gguf, config, interleaved=True)
    return {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": width,
        "linear_value_head_dim": value_width,
        "linear_conv_kernel_dim": scalar(gguf, "ssm.conv_kernel"),
        "full_attention_interval": _interval(gguf),
        # Everything rotary in one section, as Hugging Face has it for this family.
        "rope_parameters": {
            "rope_type": "default",
            "type": "default",
            **config.get("rope_scaling", {}),
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": config["partial_rotary_factor"],
        },
    }


def _interval(gguf: GGUFFile) -> int:
    """Each how many layers one has full attention."""
    every = scalar(gguf, "full_attention_interval", 4)
    layers = layer_count(gguf)
    if not 0 < every <= layers:
        key = f"{gguf.architecture}.full_attention_interval"
        raise gguf.error(key, expected=f"between 1 and the {layers} layers")
    recurrent = gguf.key("attention.recurrent_layers", None)
    if recurrent is not None:
        wanted = [(i + 1) % every != 0 for i in range(layers)]
        if [bool(x) for x in np.atleast_1d(recurrent)[:layers]] != wanted:
            raise gguf.error(
                f"{gguf.architecture}.attention.recurrent_layers",
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


_RESHAPED = {"ssm_conv1d": depthwise, "ffn_gate_inp_shexp": as_row}
_TILED = {
    "attn_qkv": _grouped_after_keys,
    "ssm_conv1d": _grouped_after_keys,
    **dict.fromkeys(("attn_gate", "ssm_alpha", "ssm_beta", "ssm_dt.bias", "ssm_a"), _grouped),
}

LINEAR_ATTENTION: dict[str, Architecture] = {
    "qwen35": Architecture(
        "qwen3_5",
        "Qwen3_5ForCausalLM",
        _LAYER | GATED,
        ends=_ENDS,
        prefix=_PREFIX,
        keys=_delta_net,
        order=_TILED,
        columns={"ssm_out": _value_heads},
        values={"ssm_a": log_of_negative},
        reshape=_RESHAPED,
        optional=_EVERY,
        partial_rotary=True,
        own_shapes=True,
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        _LAYER | _EXPERTS,
        ends=_ENDS,
        prefix=_PREFIX,
        keys=_delta_net_experts,
        order=_TILED,
        columns={"ssm_out": _value_heads},
        values={"ssm_a": log_of_negative},
        reshape=_RESHAPED,
        parts={"ffn_gate_up_exps": gate_and_up},
        optional=_EVERY,
        partial_rotary=True,
        own_shapes=True,
    ),
    # The same layers. The class of its own joins matrices that files keep apart, and in different
    # types: together they would have to be plain floats.
    "qwen3next": Architecture(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        _LAYER | _EXPERTS,
        ends=_ENDS,
        prefix=_PREFIX,
        keys=_delta_net_experts,
        values={"ssm_a": log_of_negative},
        reshape=_RESHAPED,
        parts={
            "ffn_gate_up_exps": gate_and_up,
            "ssm_ba": _interleaved("ssm_ba", "ssm_beta", "ssm_alpha"),
            "ssm_in": _interleaved("ssm_in", "attn_qkv", "attn_gate"),
        },
        optional=_EVERY,
        partial_rotary=True,
        own_shapes=True,
    ),
}
