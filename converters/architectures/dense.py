"""Other dense decoders, a row each: Nemotron, StableLM, EXAONE 4, Hunyuan, MiniCPM 3, PLaMo ..."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from converters.architectures.base import (
    AFTER_NORMS,
    ATTENTION,
    BIASED_ATTENTION,
    FFN_NORM,
    GATED,
    HUNYUAN_NORMS,
    LLAMA,
    MLA_KV,
    MLA_Q,
    PERMUTED,
    QK_NORMS,
    QKV,
    SANDWICH,
    UNGATED,
    Architecture,
    Config,
    Floats,
    Shape,
    fixed,
    flat,
    halves,
    needs_windows,
    tied,
    unscaled,
    whole_heads,
    windows,
    without,
)
from converters.gguf.reader import GGUFFile
from converters.gguf.validate import (
    float_of,
    for_each_layer,
    layer_count,
    scalar,
    tidy,
    values_per_layer,
)
from converters.quantize.encode import plain_floats


def _exaone4(gguf: GGUFFile, config: Config) -> Config:
    # The smaller model has no windows, whatever its file says.
    large = config["num_hidden_layers"] == 64
    found = needs_windows(gguf, windows(gguf, 4)) if large else {}
    # Stock mlx-lm needs all of these keys, null or not.
    keys: Config = {"rope_scaling": config.get("rope_scaling")}
    if not found:
        return {**keys, "sliding_window": None, "sliding_window_pattern": None}
    pattern = "L" * (found["sliding_window_pattern"] - 1) + "G"
    return {**keys, **found, "sliding_window_pattern": pattern}


def stablelm(gguf: GGUFFile, config: Config) -> Config:
    # Files have use_parallel_residual, too, but the second norm decides.
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
    """Files have Hunyuan's scaling of RoPE in its base."""
    unscaled(gguf, config)
    return {"use_qk_norm": True}


_XIELU = ("alpha_n", "alpha_p", "beta", "eps")


def _apertus(gguf: GGUFFile, config: Config) -> Config:
    whole_heads(gguf, config)
    return {"post_norm": False, "qk_norm": True, "hidden_act": "xielu"}


def _xielu(gguf: GGUFFile) -> dict[str, Floats]:
    """Parameters of each layer's activation."""
    return {
        f"blk.{i}.xielu_{name}": np.array([value], np.float32)
        for name in _XIELU
        for i, value in enumerate(for_each_layer(gguf, f"xielu.{name}", gguf.get(f"xielu.{name}")))
    }


def _scalar(shape: Shape) -> Shape:
    return ()


def _plamo(gguf: GGUFFile, config: Config) -> Config:
    whole_heads(gguf, config)
    if config["tie_word_embeddings"] or config.get("rope_scaling"):
        raise gguf.key_error(
            "rope.scaling.type", expected="plain rotary embeddings and an output head of its own"
        )
    return {"n_shared_head": config["num_attention_heads"] // config["num_key_value_heads"]}


def _spread(gguf: GGUFFile) -> npt.NDArray[np.intp]:
    """Query heads interleaved over the key heads; GGUF has those of a key head in a row."""
    heads = scalar(gguf, "attention.head_count")
    keys = scalar(gguf, "attention.head_count_kv", heads)
    if keys < 1 or heads % keys:
        raise gguf.key_error(
            "attention.head_count_kv", expected=f"a divisor of head_count, {heads}"
        )
    return np.arange(heads).reshape(keys, -1).T.ravel()


def _spread_rows(gguf: GGUFFile, rows: int) -> npt.NDArray[np.intp]:
    order = _spread(gguf)
    if not len(order) or rows % len(order):
        raise gguf.key_error(
            "attention.head_count", expected=f"a divisor of the {rows} rows of attn_q"
        )
    return np.arange(rows).reshape(len(order), -1)[order].ravel()


def _spark(gguf: GGUFFile, config: Config) -> Config:
    width = config["head_dim"]
    rope_dim = scalar(gguf, "rope.dimension_count", width)
    rope_dim_swa = scalar(gguf, "rope.dimension_count_swa", rope_dim)
    base = config["rope_theta"]
    if config.get("rope_scaling"):
        raise gguf.key_error("rope.scaling.type", expected="none in this architecture")
    return {
        **windows(gguf, 4),
        "hidden_act": "gelu",
        "rope_parameters": {
            "full_attention": {"rope_theta": base, "partial_rotary_factor": rope_dim / width},
            "sliding_attention": {
                "rope_theta": float_of(gguf, "rope.freq_base_swa", base),
                "partial_rotary_factor": rope_dim_swa / width,
            },
        },
    }


def _muse_glimmer(gguf: GGUFFile, config: Config) -> Config:
    """The class has one factor on all queries, GGUF the weights of a norm."""
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
        raise gguf.key_error(
            "attention.sliding_window",
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
    """The value of a constant tensor, else NaN."""
    values = plain_floats(gguf.tensor(name)).reshape(-1)
    return float(values[0]) if (values == values[0]).all() else float("nan")


def _centred(x: Floats) -> Floats:
    return x - np.float32(1)


def _minicpm3(gguf: GGUFFile, config: Config) -> Config:
    """The class has constants where GGUF has keys; files must have its values."""
    rope_dim, hidden = scalar(gguf, "rope.dimension_count"), config["hidden_size"]
    epsilon = float(config["rms_norm_eps"])
    if not np.isclose(epsilon, 1e-5) or config["tie_word_embeddings"]:
        raise gguf.key_error(
            "attention.layer_norm_rms_epsilon",
            expected="1e-05 and an output head of its own, as in MiniCPM 3 4B",
            found=str(tidy(epsilon)),
        )
    plain = {"type": "longrope", "rope_type": "longrope", "short_factor": 1.0, "long_factor": 1.0}
    original = {"original_max_position_embeddings": config["max_position_embeddings"]}
    return {
        "q_lora_rank": scalar(gguf, "attention.q_lora_rank"),
        "kv_lora_rank": scalar(gguf, "attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": config["head_dim"] - rope_dim,
        "dim_model_base": 256,
        "scale_depth": 1.4,
        "scale_emb": 12.0,
        "rope_scaling": config.get("rope_scaling") or {**plain, **original},
        "hidden_size": hidden,
    }


def _openelm(gguf: GGUFFile, config: Config) -> Config:
    tied(gguf)
    if config.get("rope_scaling"):
        raise gguf.key_error("rope.scaling.type", expected="none in this architecture")
    hidden = config["hidden_size"]
    return {
        "num_transformer_layers": config["num_hidden_layers"],
        "model_dim": hidden,
        "num_query_heads": values_per_layer(gguf, "attention.head_count"),
        "num_kv_heads": values_per_layer(gguf, "attention.head_count_kv"),
        "ffn_multipliers": [x / hidden for x in values_per_layer(gguf, "feed_forward_length")],
        "ffn_dim_divisor": 1,
        "rope_freq_constant": config["rope_theta"],
    }


ROWS: dict[str, Architecture] = {
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
    "exaone4": Architecture(
        "exaone4",
        "Exaone4ForCausalLM",
        without(LLAMA, "attn_norm", "ffn_norm") | QK_NORMS | AFTER_NORMS,
        keys=_exaone4,
    ),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        LLAMA | HUNYUAN_NORMS,
        keys=hunyuan,
        zero_biases=(BIASED_ATTENTION,),
    ),
    "jais2": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        {**ATTENTION, **FFN_NORM, **UNGATED},
        keys=fixed(hidden_act="relu2"),
        epsilon="norm_eps",
        norm_offset=1.0,  # Nemotron's norms are stored as offsets from one
        zero_biases=(BIASED_ATTENTION, ("ffn_up", "ffn_down")),
        norm_biases=True,
    ),
    "maincoder": Architecture(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        LLAMA | HUNYUAN_NORMS,
        keys=hunyuan,
        # Norms come after RoPE, so their weights are in the order of its pairs.
        order={**PERMUTED, "attn_q_norm": halves, "attn_k_norm": halves},
        zero_biases=(BIASED_ATTENTION,),
    ),
    "minicpm3": Architecture(
        "minicpm3",
        "MiniCPM3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            **MLA_Q,
            **MLA_KV,
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
    "nemotron": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        {**ATTENTION, **FFN_NORM, **UNGATED},
        keys=fixed(hidden_act="relu2"),
        epsilon="norm_eps",
        norm_offset=1.0,
        zero_biases=(BIASED_ATTENTION, ("ffn_up", "ffn_down")),
        norm_biases=True,
        partial_rotary=True,
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
        ends={"token_embd": "transformer.token_embeddings", "output_norm": "transformer.norm"},
        prefix="transformer.layers",
        keys=_openelm,
        joins={"ffn_gate_up": ("ffn_gate", "ffn_up")},
        per_layer=True,
    ),
    "orion": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        keys=stablelm,
        epsilon="layer_norm_eps",
        zero_biases=(QKV,),
        norm_biases=True,
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
        joins={"attn_qkv": QKV},
        partial_rotary=True,
    ),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        LLAMA | NORMS_OF_HEADS,
        keys=stablelm,
        epsilon="layer_norm_eps",
        parts={f"attn_{side}_norm": partial(norms_of_heads, side) for side in "qk"},
        reshape=dict.fromkeys(NORMS_OF_HEADS, flat),
        zero_biases=(QKV,),
        optional=frozenset({"ffn_norm", *NORMS_OF_HEADS}),
        norm_biases=True,
        partial_rotary=True,
    ),
}
