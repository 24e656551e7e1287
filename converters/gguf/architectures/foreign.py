"""Dense architectures that run on mlx-lm's classes, under the names that those have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.gguf.architectures.keys import windows
from converters.gguf.architectures.limits import whole_heads
from converters.gguf.architectures.row import (
    ATTENTION,
    FFN_NORM,
    GATED,
    LLAMA_BIASES,
    PERMUTED,
    QK_NORMS,
    SANDWICH,
    UNGATED,
    Architecture,
    Config,
    Floats,
    Shape,
    without,
)
from converters.gguf.architectures.uneven import per_layer
from converters.gguf.numbers import float_of, layer_count, scalar, tidy
from converters.gguf.reader import GGUFFile
from converters.quantize.encode import plain_floats

_XIELU = ("alpha_n", "alpha_p", "beta", "eps")


def _apertus(gguf: GGUFFile, config: Config) -> Config:
    whole_heads(gguf, config)
    return {"post_norm": False, "qk_norm": True, "hidden_act": "xielu"}


def _xielu(gguf: GGUFFile) -> dict[str, Floats]:
    """The numbers of each layer's activation."""
    return {
        f"blk.{i}.xielu_{name}": np.array([value], np.float32)
        for name in _XIELU
        for i, value in enumerate(per_layer(gguf, f"xielu.{name}"))
    }


def _scalar(shape: Shape) -> Shape:
    return ()


def _nanbeige(gguf: GGUFFile, config: Config) -> Config:
    return {
        "num_loops": scalar(gguf, "num_loops", 1),
        "skip_loop_final_norm": bool(gguf.key("skip_loop_final_norm", False)),
    }


def _plamo(gguf: GGUFFile, config: Config) -> Config:
    whole_heads(gguf, config)
    if config["tie_word_embeddings"] or config.get("rope_scaling"):
        key = f"{gguf.architecture}.rope.scaling.type"
        raise gguf.error(key, expected="plain rotary embeddings and an output head of its own")
    return {"n_shared_head": config["num_attention_heads"] // config["num_key_value_heads"]}


def _spread(gguf: GGUFFile) -> npt.NDArray[np.intp]:
    """Query heads in turn over the key heads; GGUF has those of a key head side by side."""
    heads = scalar(gguf, "attention.head_count")
    keys = scalar(gguf, "attention.head_count_kv", heads)
    if keys < 1 or heads % keys:
        key = f"{gguf.architecture}.attention.head_count_kv"
        raise gguf.error(key, expected=f"a divisor of head_count, {heads}")
    return np.arange(heads).reshape(keys, -1).T.ravel()


def _spread_rows(gguf: GGUFFile, rows: int) -> npt.NDArray[np.intp]:
    order = _spread(gguf)
    if not len(order) or rows % len(order):
        key = f"{gguf.architecture}.attention.head_count"
        raise gguf.error(key, expected=f"a divisor of the {rows} rows of attn_q")
    return np.arange(rows).reshape(len(order), -1)[order].ravel()


def _spark(gguf: GGUFFile, config: Config) -> Config:
    width = config["head_dim"]
    turned = scalar(gguf, "rope.dimension_count", width)
    turned_near = scalar(gguf, "rope.dimension_count_swa", turned)
    base = config["rope_theta"]
    if config.get("rope_scaling"):
        key = f"{gguf.architecture}.rope.scaling.type"
        raise gguf.error(key, expected="none in this architecture")
    return {
        **windows(gguf, 4),
        "hidden_act": "gelu",
        "rope_parameters": {
            "full_attention": {"rope_theta": base, "partial_rotary_factor": turned / width},
            "sliding_attention": {
                "rope_theta": float_of(gguf, "rope.freq_base_swa", base),
                "partial_rotary_factor": turned_near / width,
            },
        },
    }


def _muse_glimmer(gguf: GGUFFile, config: Config) -> Config:
    """The class has one factor on all queries where a file has a norm's weights."""
    factors = np.array([_constant(gguf, f"blk.{i}.attn_q_norm.weight") for i in _layers(gguf)])
    ones = np.array([_constant(gguf, f"blk.{i}.attn_k_norm.weight") for i in _layers(gguf)])
    if (factors != factors[0]).any() or (ones != 1).any():
        raise gguf.tensor("blk.0.attn_q_norm.weight").error(
            expected="one factor for the queries of all layers and none for keys", found="others"
        )
    found = windows(gguf, 4)
    base = config["rope_theta"]
    cap = float(gguf.key("final_logit_softcapping", 0.0))
    if not found or not cap or config.get("rope_scaling"):
        raise gguf.error(
            f"{gguf.architecture}.attention.sliding_window",
            expected="sliding windows, bounded logits and plain rotary embeddings",
        )
    return {
        "layer_types": found["layer_types"],
        "sliding_window": found["sliding_window"],
        "rope_theta": float_of(gguf, "rope.freq_base_swa", base),
        "qk_scale_factor": float(factors[0]),
        "post_norm_eps": 1e-8,
        "final_logit_softcapping": tidy(cap),
        "output_multiplier": float_of(gguf, "logit_scale", 1.0),
    }


def _layers(gguf: GGUFFile) -> range:
    return range(layer_count(gguf))


def _constant(gguf: GGUFFile, name: str) -> float:
    """What all values of a tensor are; not a number if they differ."""
    values = plain_floats(gguf.tensor(name)).reshape(-1)
    return float(values[0]) if (values == values[0]).all() else float("nan")


def _centred(x: Floats) -> Floats:
    return x - np.float32(1)


def _minicpm3(gguf: GGUFFile, config: Config) -> Config:
    """The class has numbers of its own where keys differ: they must be what it has."""
    turning, hidden = scalar(gguf, "rope.dimension_count"), config["hidden_size"]
    epsilon = float(config["rms_norm_eps"])
    if not np.isclose(epsilon, 1e-5) or config["tie_word_embeddings"]:
        raise gguf.error(
            f"{gguf.architecture}.attention.layer_norm_rms_epsilon",
            expected="1e-05 and an output head of its own, as in MiniCPM 3 4B",
            found=str(tidy(epsilon)),
        )
    plain = {"type": "longrope", "rope_type": "longrope", "short_factor": 1.0, "long_factor": 1.0}
    original = {"original_max_position_embeddings": config["max_position_embeddings"]}
    return {
        "q_lora_rank": scalar(gguf, "attention.q_lora_rank"),
        "kv_lora_rank": scalar(gguf, "attention.kv_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": config["head_dim"] - turning,
        "dim_model_base": 256,
        "scale_depth": 1.4,
        "scale_emb": 12.0,
        "rope_scaling": config.get("rope_scaling") or {**plain, **original},
        "hidden_size": hidden,
    }


FOREIGN: dict[str, Architecture] = {
    "apertus": Architecture(
        "apertus",
        "ApertusForCausalLM",
        {
            **ATTENTION,
            **QK_NORMS,
            **UNGATED,
            "attn_norm": "attention_layernorm",
            "ffn_norm": "feedforward_layernorm",
            **{f"xielu_{name}": f"mlp.act_fn.{name}" for name in _XIELU},
        },
        keys=_apertus,
        made=_xielu,
        reshape={f"xielu_{name}": _scalar for name in _XIELU},
    ),
    "minicpm3": Architecture(
        "minicpm3",
        "MiniCPM3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_kv_b": "self_attn.kv_b_proj",
            "attn_output": "self_attn.o_proj",
            **FFN_NORM,
            **GATED,
        },
        keys=_minicpm3,
        partial_rotary=True,
        value_width=True,
        own_shapes=True,
    ),
    "muse-glimmer": Architecture(
        "muse_glimmer",
        "MuseGlimmerForConditionalGeneration",
        {**SANDWICH, "attn_gate": "self_attn.gate_proj"},
        keys=_muse_glimmer,
        order=PERMUTED,
        values={name: _centred for name in SANDWICH if "norm" in name},
        in_config=frozenset(QK_NORMS),
    ),
    "nanbeige": Architecture(
        "nanbeige",
        "NanbeigeForCausalLM",
        keys=_nanbeige,
        order=PERMUTED,
        zero_biases=LLAMA_BIASES,
    ),
    "plamo": Architecture(
        "plamo",
        "PlamoForCausalLM",
        {**without(ATTENTION, "attn_norm"), "attn_norm": "norm", **GATED},
        prefix="model.layers.layers",
        keys=_plamo,
        order={"attn_q": _spread_rows},
        columns={"attn_output": _spread},
    ),
    "spark2_5": Architecture(
        "spark2_5",
        "Spark2_5ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.q_k_v_proj",
            "attn_gate": "self_attn.g_proj",
            "attn_output": "self_attn.out_proj",
            **FFN_NORM,
            **GATED,
        },
        ends={"token_embd": "model.embedding"},
        keys=_spark,
        joins={"attn_qkv": ("attn_q", "attn_k", "attn_v")},
        partial_rotary=True,
    ),
}
