"""Dense architectures whose layers differ in size; they run on mlx-lm's classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.gguf.architectures.limits import tied, whole_heads
from converters.gguf.architectures.row import (
    LLAMA,
    LLAMA_BIASES,
    PERMUTED,
    Architecture,
    Config,
)
from converters.gguf.numbers import layer_count
from converters.gguf.reader import GGUFFile


def per_layer(gguf: GGUFFile, key: str) -> list[Any]:
    """A value for each layer, which a file may give once for all.

    Raises:
        GGUFError: there is none, or one for each of another number of layers.
    """
    layers, value = layer_count(gguf), gguf.get(key)
    values = list(value) if isinstance(value, np.ndarray | list) else [value] * layers
    if None in values or len(values) < layers:
        raise gguf.error(key, expected=f"{layers} values", found=str(value))
    return values[:layers]


def _openelm(gguf: GGUFFile, config: Config) -> Config:
    tied(gguf)
    if config.get("rope_scaling"):
        key = f"{gguf.architecture}.rope.scaling.type"
        raise gguf.error(key, expected="none in this architecture")
    hidden = config["hidden_size"]
    return {
        "num_transformer_layers": config["num_hidden_layers"],
        "model_dim": hidden,
        "num_query_heads": [
            int(x) for x in per_layer(gguf, f"{gguf.architecture}.attention.head_count")
        ],
        "num_kv_heads": [
            int(x) for x in per_layer(gguf, f"{gguf.architecture}.attention.head_count_kv")
        ],
        "ffn_multipliers": [
            int(x) / hidden for x in per_layer(gguf, f"{gguf.architecture}.feed_forward_length")
        ],
        "ffn_dim_divisor": 1,
        "rope_freq_constant": config["rope_theta"],
    }


def _deci(gguf: GGUFFile, config: Config) -> Config:
    """Each layer of Llama that a search has made cheaper, or left out."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    whole_heads(gguf, config)
    key = f"{gguf.architecture}.feed_forward_length"
    blocks = []
    for i, (q, k, size) in enumerate(zip(*_deci_sizes(gguf), strict=True)):
        # llama.cpp leaves out the attention of a layer without a feed-forward.
        if q not in (0, heads) or (q and not size) or size % 256:
            raise gguf.error(
                key,
                expected="all heads or none, none without a feed-forward, and steps of 256",
                found=f"{q} heads and {size} in layer {i}",
            )
        attention: Config = {"no_op": True} if not q else {"replace_with_linear": True}
        # The class rounds up to the next 256 what it makes of the factor.
        factor = (int(size) - 0.5) * 3 / (2 * hidden)
        blocks.append(
            {
                "attention": {"n_heads_in_group": int(q // k)} if k else attention,
                "ffn": {"ffn_mult": factor} if size else {"no_op": True},
            }
        )
    return {"block_configs": blocks}


def _deci_sizes(gguf: GGUFFile) -> list[list[Any]]:
    """Heads, those of keys, and widths of feed-forwards, of each layer."""
    suffixes = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    return [per_layer(gguf, f"{gguf.architecture}.{suffix}") for suffix in suffixes]


def _deci_names(gguf: GGUFFile, layer: int) -> dict[str, str]:
    """A layer with query heads alone has one matrix for all of its attention."""
    queries, keys, _ = (sizes[layer] for sizes in _deci_sizes(gguf))
    return {"attn_output": "self_attn.linear"} if queries and not keys else {}


UNEVEN: dict[str, Architecture] = {
    "deci": Architecture(
        "nemotron-nas",
        "DeciLMForCausalLM",
        keys=_deci,
        by_layer=_deci_names,
        order=PERMUTED,
        optional=frozenset(LLAMA),
        zero_biases=LLAMA_BIASES,
        per_layer=True,
    ),
    "openelm": Architecture(
        "openelm",
        "OpenELMForCausalLM",
        {
            "attn_norm": "attn_norm",
            "attn_qkv": "attn.qkv_proj",
            "attn_q_norm": "attn.q_norm",
            "attn_k_norm": "attn.k_norm",
            "attn_output": "attn.out_proj",
            "ffn_norm": "ffn_norm",
            "ffn_gate_up": "ffn.proj_1",
            "ffn_down": "ffn.proj_2",
        },
        ends={
            "token_embd": "transformer.token_embeddings",
            "output_norm": "transformer.norm",
        },
        prefix="transformer.layers",
        keys=_openelm,
        joins={"ffn_gate_up": ("ffn_gate", "ffn_up")},
        per_layer=True,
    ),
}
