"""Tensor shapes that contradict the metadata of a dense decoder, found before conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.gguf.reader import GGUFFile

Shape = tuple[int, ...]


def check_shapes(gguf: GGUFFile, config: Mapping[str, Any]) -> None:
    """Compare every known tensor with the hyperparameters of ``config.json``."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    ends = {
        "token_embd": (vocabulary, hidden),
        "output": (vocabulary, hidden),
        "output_norm": (hidden,),
    }
    layer = _layer_shapes(config)
    for tensor in gguf.tensors:
        module, _, kind = tensor.name.rpartition(".")
        shape = ends.get(module) or layer.get(module.split(".", 2)[-1])
        if shape is None or kind not in ("weight", "bias"):
            continue
        wanted = shape if kind == "weight" else shape[: max(1, len(shape) - 1)]
        if tensor.shape != wanted:
            raise tensor.error(expected=f"{_show(wanted)} weights", found=_show(tensor.shape))


def _layer_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, dim, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries = config["num_attention_heads"] * dim
    keys = config["num_key_value_heads"] * dim
    shapes: dict[str, Shape] = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "attn_q_norm": (dim,),
        "attn_k_norm": (dim,),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "post_attention_norm": (hidden,),
        "post_ffw_norm": (hidden,),
    }
    experts = config.get("num_experts", 0)
    if experts:
        width = config["moe_intermediate_size"]
        shapes |= {
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, width, hidden),
            "ffn_up_exps": (experts, width, hidden),
            "ffn_down_exps": (experts, hidden, width),
            "attn_sinks": (config["num_attention_heads"],),
        }
    kind = config["model_type"]
    if "kv_lora_rank" in config:  # the loader checks the tensors of latent attention
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            del shapes[name]
    if kind in ("minimax", "olmo2", "olmo3", "olmoe"):  # queries and keys are normalized as a whole
        shapes |= {"attn_q_norm": (queries,), "attn_k_norm": (keys,)}
    if kind == "cohere":  # heads have weights of their own
        shapes |= {"attn_q_norm": (queries // dim, dim), "attn_k_norm": (keys // dim, dim)}
    if kind in ("glm", "glm4", "phi3"):  # gate and up in one
        shapes["ffn_up"] = (2 * inner, hidden)
    if kind == "phi3":
        shapes["attn_qkv"] = (queries + 2 * keys, hidden)
    return shapes


def _show(shape: Shape) -> str:
    return " x ".join(str(size) for size in shape)
