"""Tiny models under the names of their original repositories, with random weights of mlx-lm's.

Each ``undo_*`` is the inverse of what mlx-lm's class does to such a repository when it loads it, so
that mlx-lm's own loading is the judge of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Arrays = dict[str, mx.array]
Undo = Callable[[Arrays], Arrays]

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
_FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 0.707,
    "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "moe_layer_freq": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
}  # fmt: skip
_ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "head_dim": 16,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "rope_scaling": None,
    "attention_bias": False,
}  # fmt: skip
_GEMMA3 = {
    "head_dim": 16, "query_pre_attn_scalar": 16, "rope_local_base_freq": 10000.0,
    "sliding_window": 16, "sliding_window_pattern": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama"},
    "mixtral": SIZES
    | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": SIZES
    | _FEW
    | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64, "num_experts": 4},
    "qwen3_moe": SIZES
    | _FEW
    | {
        "model_type": "qwen3_moe", "head_dim": 32, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True,
    },
    "olmoe": SIZES | {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": SIZES
    | {
        "model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2,
        "logits_scaling": 4.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5, "attention_bias": False,
    },
    "gpt_oss": SIZES
    | {
        "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v2": SIZES | _LATENT | {"model_type": "deepseek_v2", "num_key_value_heads": 4,
        "topk_method": "greedy", "norm_topk_prob": False, "scoring_func": "softmax",
        "rope_scaling": _YARN},
    "deepseek_v3": SIZES | _LATENT | {"model_type": "deepseek_v3", "num_key_value_heads": 4,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek": SIZES | _ROUTED | {"model_type": "deepseek", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0},
    "dots1": SIZES | _ROUTED | {"model_type": "dots1", "scoring_func": "noaux_tc"},
    "glm4_moe": SIZES | _ROUTED | {"model_type": "glm4_moe", "partial_rotary_factor": 0.5,
        "use_qk_norm": True, "attention_bias": True},
    "gemma3": {
        "model_type": "gemma3", "vocab_size": 300,
        "text_config": SIZES | _GEMMA3 | {"model_type": "gemma3_text", "tie_word_embeddings": True},
    },
    "mistral3": {
        "model_type": "mistral3", "text_config": SIZES | {"model_type": "mistral"},
    },
}  # fmt: skip


def stock(config: dict[str, Any], dtype: mx.Dtype = mx.float32) -> nn.Module:
    """mlx-lm's model of a config, with seeded weights."""
    from mlx_lm.utils import _get_classes

    mx.random.seed(11)
    kind, arguments = _get_classes(config)
    model = kind(arguments.from_dict(json.loads(json.dumps(config))))
    weights = [
        (
            name,
            (a + 0.1 * mx.random.normal(a.shape)).astype(dtype) if a.ndim == 1 else a.astype(dtype),
        )
        for name, a in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    return model  # type: ignore[no-any-return]


def one_by_one(names: dict[str, str]) -> Undo:
    """Stacked experts as ``experts.N``, their projections called as ``names`` says."""

    def undo(arrays: Arrays) -> Arrays:
        found: Arrays = {}
        for name, array in arrays.items():
            part = re.fullmatch(r"(.+)\.(?:switch_mlp|experts)\.(\w+)\.(\w+)", name)
            if part is None:
                found[name] = array
                continue
            for number in range(array.shape[0]):
                found[f"{part[1]}.experts.{number}.{names[part[2]]}.{part[3]}"] = array[number]
        return found

    return undo


SAME = one_by_one({name: name for name in ("gate_proj", "up_proj", "down_proj")})
MIXTRAL = one_by_one({"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"})


def fused(gate_up: str, down: str, *, turned: bool = False, interleaved: bool = False) -> Undo:
    """Gate and up projections of all experts in one array, below the module of the experts."""

    def undo(arrays: Arrays) -> Arrays:
        found = dict(arrays)
        for name in arrays:
            base, gate, kind = name.rpartition(".gate_proj")
            if not gate or not re.search(r"switch_mlp|mlp\.experts", base):
                continue
            home = base.removesuffix(".switch_mlp").removesuffix(".experts")
            parts = [found.pop(f"{base}.{part}{kind}") for part in ("gate_proj", "up_proj")]
            axis = 1
            both = mx.concatenate(parts, axis=axis)
            if interleaved:
                both = mx.stack(parts, axis=2).flatten(1, 2)
            last = found.pop(f"{base}.down_proj{kind}")
            bias = kind == ".bias"
            if turned and not bias:
                both, last = both.swapaxes(1, 2), last.swapaxes(1, 2)
            end = "_bias" if bias else ""
            found[f"{home}.{gate_up}{end}"], found[f"{home}.{down}{end}"] = both, last
        return found

    return undo


def whole_latent(arrays: Arrays) -> Arrays:
    """``embed_q`` and ``unembed_out`` as one ``kv_b_proj``."""
    found = dict(arrays)
    for name in arrays:
        base, latent, _ = name.partition(".embed_q.weight")
        if latent:
            keys = found.pop(name).swapaxes(1, 2)
            values = found.pop(f"{base}.unembed_out.weight")
            joint = mx.concatenate([keys, values], axis=1)
            found[f"{base}.kv_b_proj.weight"] = joint.flatten(0, 1)
    return found


def renamed(old: str, new: str) -> Undo:
    return lambda arrays: {
        (new + name.removeprefix(old) if name.startswith(old) else name): array
        for name, array in arrays.items()
    }


def with_extra(*names: str) -> Undo:
    return lambda arrays: arrays | {name: mx.ones((8, 8)) for name in names}


def both(*steps: Undo) -> Undo:
    def undo(arrays: Arrays) -> Arrays:
        for step in steps:
            arrays = step(arrays)
        return arrays

    return undo


VISION = ("vision_tower.layers.0.weight", "multi_modal_projector.linear.weight")
INV_FREQ = with_extra("model.layers.0.self_attn.rotary_emb.inv_freq")


def save_arrays(path: Path, config: dict[str, Any], arrays: Arrays) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), arrays)
    return path


def parameters(model: nn.Module) -> Arrays:
    return dict(tree_flatten(model.parameters()))
