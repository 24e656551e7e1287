"""Hyperparameters that several families share, from GGUF's keys to those of ``config.json``."""

from __future__ import annotations

import numpy as np

from converters.gguf.architectures.row import Config
from converters.gguf.numbers import float_of, layer_count, scalar
from converters.gguf.reader import GGUFFile
from converters.gguf.tensor import GGUFTensor


def windows(gguf: GGUFFile, every: int, *, full_first: bool = False) -> Config:
    """Sliding windows: in all layers but each of a number, unless the file has its own pattern.

    Args:
        every: of so many layers one sees everything.
        full_first: it is the first of them, not the last.
    """
    window = gguf.key("attention.sliding_window", None)
    if not np.any(window):
        return {}
    layers = layer_count(gguf)
    pattern = gguf.key("attention.sliding_window_pattern", every)
    if isinstance(pattern, np.ndarray | list):
        sliding = [bool(x) for x in pattern][:layers]
    else:
        every = scalar(gguf, "attention.sliding_window_pattern", every)
        place = 0 if full_first else every - 1
        sliding = [every > 0 and i % every != place for i in range(layers)]
    return {
        "sliding_window": scalar(gguf, "attention.sliding_window"),
        "sliding_window_pattern": every,
        "layer_types": ["sliding_attention" if x else "full_attention" for x in sliding],
    }


def experts(gguf: GGUFFile, config: Config) -> Config:
    """How many experts there are and how wide, under the names that families give it."""
    count, used = scalar(gguf, "expert_count"), scalar(gguf, "expert_used_count")
    if not 0 < used <= count:
        raise gguf.error(
            f"{gguf.architecture}.expert_used_count", expected=f"between 1 and {count}"
        )
    size = scalar(gguf, "expert_feed_forward_length", config["intermediate_size"])
    return {
        "num_experts": count,
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": size,
    }


def stablelm(gguf: GGUFFile, config: Config) -> Config:
    """What StableLM's class asks for."""
    # Files say use_parallel_residual, too; what decides is whether there is a second norm.
    return {
        "use_qkv_bias": config["attention_bias"],
        "qk_layernorm": "blk.0.attn_q_norm.0.weight" in gguf,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in gguf,
    }


# StableLM 2 12B has 32 heads.
NORMS_OF_HEADS = {
    f"attn_{side}_norm.{i}": f"self_attn.{side}_layernorm.norms.{i}"
    for side in "qk"
    for i in range(64)
}


def norms_of_heads(side: str, gguf: GGUFFile) -> list[tuple[str, int]]:
    """The norm of each head: a row of the file's matrix."""
    heads = scalar(gguf, "attention.head_count")
    count = heads if side == "q" else scalar(gguf, "attention.head_count_kv", heads)
    return [(f"attn_{side}_norm.{i}", 1) for i in range(count)]


def hunyuan(gguf: GGUFFile, config: Config) -> Config:
    """What Hunyuan's class asks for; its own way to a longer context is in the base of files."""
    unscaled(gguf, config)
    return {"use_qk_norm": True}


def fused_qkv(gguf: GGUFFile) -> list[tuple[str, int]]:
    """The parts of ``attn_qkv`` and their rows."""
    heads = scalar(gguf, "attention.head_count")
    width = scalar(gguf, "attention.key_length", scalar(gguf, "embedding_length") // heads)
    keys = scalar(gguf, "attention.head_count_kv", heads) * width
    return [("attn_q", heads * width), ("attn_k", keys), ("attn_v", keys)]


def needs_experts(gguf: GGUFFile, config: Config) -> None:
    """Refuse a file of an architecture that has dense layers, too, but never those alone."""
    if "num_experts" not in config:
        raise gguf.error(f"{gguf.architecture}.expert_count", expected="experts")


def routed(gguf: GGUFFile, config: Config) -> Config:
    """How tokens find their experts, as DeepSeek and its many relatives write it."""
    needs_experts(gguf, config)
    return {
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": scalar(gguf, "expert_shared_count", 0),
        "n_group": scalar(gguf, "expert_group_count", 1) or 1,
        "topk_group": scalar(gguf, "expert_group_used_count", 1) or 1,
        "first_k_dense_replace": scalar(gguf, "leading_dense_block_count", 0),
        "routed_scaling_factor": float_of(gguf, "expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": bool(gguf.key("expert_weights_norm", False)),
        "scoring_func": gating(gguf),
        "topk_method": "noaux_tc" if gating(gguf) == "sigmoid" else "greedy",
        "moe_layer_freq": 1,
    }


def gating(gguf: GGUFFile, default: int = 1) -> str:
    """How the logits of experts become weights."""
    number = scalar(gguf, "expert_gating_func", default) or default
    if number not in (1, 2):
        raise gguf.error(
            f"{gguf.architecture}.expert_gating_func", expected="1 (softmax) or 2 (sigmoid)"
        )
    return "sigmoid" if number == 2 else "softmax"


def correction(gguf: GGUFFile) -> GGUFTensor | None:
    """What is added to the weights of experts for choosing some, in the first layer that has it."""
    return next((tensor for tensor in gguf.tensors if "exp_probs_b" in tensor.name), None)


def uncorrected(gguf: GGUFFile) -> None:
    """Refuse a file with a correction that the model's class has no place for."""
    found = correction(gguf)
    if found is not None:
        raise found.error(expected="no correction of the choice of experts", found="one")


def only(gguf: GGUFFile, suffix: str, *allowed: object, absent: object = None) -> None:
    """Refuse a file with another value than those that the model's class has built in.

    Args:
        absent: what a file means that does not say; the first of those by default.
    """
    value = gguf.key(suffix, allowed[0] if absent is None else absent)
    if isinstance(value, np.ndarray | list) or value not in allowed:
        raise gguf.error(
            f"{gguf.architecture}.{suffix}",
            expected=f"{' or '.join(map(str, allowed))} in this architecture",
        )


def shared_width(gguf: GGUFFile) -> int:
    """Width of the experts that every token goes through, all together; 0 for none."""
    names = (f"blk.{i}.ffn_down_shexp.weight" for i in range(layer_count(gguf)))
    return next((gguf.tensor(name).shape[-1] for name in names if name in gguf), 0)


def shared_count(gguf: GGUFFile, config: Config) -> int:
    """How many experts every token goes through, where each is as wide as the others."""
    each = int(config["moe_intermediate_size"])
    count, rest = divmod(shared_width(gguf), each)
    if rest:
        raise gguf.error(
            f"{gguf.architecture}.expert_shared_feed_forward_length",
            expected=f"a multiple of {each} in this architecture",
            found=str(shared_width(gguf)),
        )
    return count


def unscaled(gguf: GGUFFile, config: Config, *known: str) -> None:
    """Refuse rotary scaling that the model's class would ignore; ``known`` are types it reads."""
    scaling = config.get("rope_scaling")
    if scaling and scaling["type"] not in known:
        raise gguf.error(
            f"{gguf.architecture}.rope.scaling.type",
            expected=f"{' or '.join(('none', *known))} in this architecture",
            found=scaling["type"],
        )
