"""Other dense decoders, a row each: Nemotron, StableLM, EXAONE 4, Hunyuan, MiniCPM 3, PLaMo ..."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from converters.architectures import names
from converters.architectures.base import (
    PERMUTED,
    Architecture,
    Floats,
    Shape,
    fixed,
    flat,
    halves,
    minus,
)
from converters.architectures.hyperparameters import Config, Hyperparameters, tidy
from converters.quantize.encode import plain_floats


def _exaone4(hp: Hyperparameters) -> Config:
    # The smaller model has no windows, whatever its file says.
    large = hp["num_hidden_layers"] == 64
    found = hp.windows(4, needed=True) if large else {}
    # Stock mlx-lm needs all of these keys, null or not.
    keys: Config = {"rope_scaling": hp.config.get("rope_scaling")}
    if not found:
        return {**keys, "sliding_window": None, "sliding_window_pattern": None}
    pattern = "L" * (found["sliding_window_pattern"] - 1) + "G"
    return {**keys, **found, "sliding_window_pattern": pattern}


def stablelm(hp: Hyperparameters) -> Config:
    # Files have use_parallel_residual, too, but the second norm decides.
    return {
        "use_qkv_bias": hp["attention_bias"],
        "qk_layernorm": "blk.0.attn_q_norm.0.weight" in hp,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in hp,
    }


# StableLM 2 12B has 32 heads.
NORMS_OF_HEADS = {
    f"attn_{side}_norm.{i}": f"self_attn.{side}_layernorm.norms.{i}"
    for side in "qk"
    for i in range(64)
}


def norms_of_heads(side: str, hp: Hyperparameters) -> list[tuple[str, int]]:
    """The norm of each head: a row of the file's matrix."""
    heads = hp.integer("attention.head_count")
    count = heads if side == "q" else hp.integer("attention.head_count_kv", heads)
    return [(f"attn_{side}_norm.{i}", 1) for i in range(count)]


def hunyuan(hp: Hyperparameters) -> Config:
    """Files have Hunyuan's scaling of RoPE in its base."""
    hp.unscaled()
    return {"use_qk_norm": True}


_XIELU = ("alpha_n", "alpha_p", "beta", "eps")


def _apertus(hp: Hyperparameters) -> Config:
    hp.whole_heads()
    return {"post_norm": False, "qk_norm": True, "hidden_act": "xielu"}


def _xielu(hp: Hyperparameters) -> dict[str, Floats]:
    """Parameters of each layer's activation."""
    return {
        f"blk.{i}.xielu_{name}": np.array([value], np.float32)
        for name in _XIELU
        for i, value in enumerate(hp.for_each_layer(f"xielu.{name}", hp.gguf.get(f"xielu.{name}")))
    }


def _scalar(shape: Shape) -> Shape:
    return ()


def _plamo(hp: Hyperparameters) -> Config:
    hp.whole_heads()
    hp.refuse_if(
        hp["tie_word_embeddings"] or hp.config.get("rope_scaling"),
        "rope.scaling.type",
        "plain rotary embeddings and an output head of its own",
    )
    return {"n_shared_head": len(_spread(hp)) // hp["num_key_value_heads"]}


def _spread(hp: Hyperparameters) -> npt.NDArray[np.intp]:
    """Query heads interleaved over the key heads; GGUF has those of a key head in a row."""
    heads = hp.integer("attention.head_count")
    keys = hp.integer("attention.head_count_kv", heads)
    hp.refuse_if(
        keys < 1 or heads % keys, "attention.head_count_kv", f"a divisor of head_count, {heads}"
    )
    return np.arange(heads).reshape(keys, -1).T.ravel()


def _spread_rows(hp: Hyperparameters, rows: int) -> npt.NDArray[np.intp]:
    order = _spread(hp)
    hp.refuse_if(
        not len(order) or rows % len(order),
        "attention.head_count",
        f"a divisor of the {rows} rows of attn_q",
    )
    return np.arange(rows).reshape(len(order), -1)[order].ravel()


def _spark(hp: Hyperparameters) -> Config:
    width = hp["head_dim"]
    rope_dim = hp.integer("rope.dimension_count", width)
    rope_dim_swa = hp.integer("rope.dimension_count_swa", rope_dim)
    base = hp["rope_theta"]
    hp.refuse_if(hp.config.get("rope_scaling"), "rope.scaling.type", "none in this architecture")
    return {
        **hp.windows(4),
        "hidden_act": "gelu",
        "rope_parameters": {
            "full_attention": {"rope_theta": base, "partial_rotary_factor": rope_dim / width},
            "sliding_attention": {
                "rope_theta": hp.number("rope.freq_base_swa", base),
                "partial_rotary_factor": rope_dim_swa / width,
            },
        },
    }


def _muse_glimmer(hp: Hyperparameters) -> Config:
    """The class has one factor on all queries, GGUF the weights of a norm."""
    factors = np.array([_constant(hp, f"blk.{i}.attn_q_norm.weight") for i in _layers(hp)])
    ones = np.array([_constant(hp, f"blk.{i}.attn_k_norm.weight") for i in _layers(hp)])
    if (factors != factors[0]).any() or (ones != 1).any():
        raise hp.tensor("blk.0.attn_q_norm.weight").error(
            expected="one factor for the queries of all layers and none for keys", found="others"
        )
    found = hp.windows(4)
    base = hp["rope_theta"]
    cap = float(hp.key("final_logit_softcapping", 0.0))
    hp.refuse_if(
        not found or not cap or hp.config.get("rope_scaling"),
        "attention.sliding_window",
        "sliding windows, bounded logits and plain rotary embeddings",
    )
    return {
        "layer_types": found["layer_types"],
        "sliding_window": found["sliding_window"],
        "rope_theta": hp.number("rope.freq_base_swa", base),
        "qk_scale_factor": float(factors[0]),
        "post_norm_eps": 1e-8,
        "final_logit_softcapping": tidy(cap),
        "output_multiplier": hp.number("logit_scale", 1.0),
    }


def _layers(hp: Hyperparameters) -> range:
    return range(hp.layers)


def _constant(hp: Hyperparameters, name: str) -> float:
    """The value of a constant tensor, else NaN."""
    values = plain_floats(hp.tensor(name)).reshape(-1)
    return float(values[0]) if (values == values[0]).all() else float("nan")


def _minicpm3(hp: Hyperparameters) -> Config:
    """The class has constants where GGUF has keys; files must have its values."""
    rope_dim, hidden = hp.integer("rope.dimension_count"), hp["hidden_size"]
    epsilon = float(hp["rms_norm_eps"])
    hp.refuse_if(
        not np.isclose(epsilon, 1e-5) or hp["tie_word_embeddings"],
        "attention.layer_norm_rms_epsilon",
        "1e-05 and an output head of its own, as in MiniCPM 3 4B",
        str(tidy(epsilon)),
    )
    plain = {"type": "longrope", "rope_type": "longrope", "short_factor": 1.0, "long_factor": 1.0}
    original = {"original_max_position_embeddings": hp["max_position_embeddings"]}
    return {
        "q_lora_rank": hp.integer("attention.q_lora_rank"),
        "kv_lora_rank": hp.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": hp["head_dim"] - rope_dim,
        "dim_model_base": 256,
        "scale_depth": 1.4,
        "scale_emb": 12.0,
        "rope_scaling": hp.config.get("rope_scaling") or {**plain, **original},
        "hidden_size": hidden,
    }


def _openelm(hp: Hyperparameters) -> Config:
    hp.tied()
    hp.refuse_if(hp.config.get("rope_scaling"), "rope.scaling.type", "none in this architecture")
    hidden = hp["hidden_size"]
    return {
        "num_transformer_layers": hp["num_hidden_layers"],
        "model_dim": hidden,
        "num_query_heads": hp.values_per_layer("attention.head_count"),
        "num_kv_heads": hp.values_per_layer("attention.head_count_kv"),
        "ffn_multipliers": [x / hidden for x in hp.values_per_layer("feed_forward_length")],
        "ffn_dim_divisor": 1,
        "rope_freq_constant": hp["rope_theta"],
    }


ROWS: dict[str, Architecture] = {
    "apertus": Architecture(
        "apertus",
        "ApertusForCausalLM",
        {
            **names.ATTENTION,
            **names.QK_NORMS,
            **names.UNGATED,
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
        names.without(names.LLAMA, "attn_norm", "ffn_norm") | names.QK_NORMS | names.AFTER_NORMS,
        keys=_exaone4,
    ),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        names.LLAMA | names.HUNYUAN_NORMS,
        keys=hunyuan,
        zero_biases=(names.BIASED_ATTENTION,),
    ),
    "jais2": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        {**names.ATTENTION, **names.FFN_NORM, **names.UNGATED},
        keys=fixed(hidden_act="relu2"),
        epsilon="norm_eps",
        norm_offset=1.0,  # Nemotron's norms are stored as offsets from one
        zero_biases=(names.BIASED_ATTENTION, ("ffn_up", "ffn_down")),
        norm_biases=True,
    ),
    "maincoder": Architecture(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        names.LLAMA | names.HUNYUAN_NORMS,
        keys=hunyuan,
        # Norms come after RoPE, so their weights are in the order of its pairs.
        order={**PERMUTED, "attn_q_norm": halves, "attn_k_norm": halves},
        zero_biases=(names.BIASED_ATTENTION,),
    ),
    "minicpm3": Architecture(
        "minicpm3",
        "MiniCPM3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            **names.MLA_Q,
            **names.MLA_KV,
            "attn_kv_b": "self_attn.kv_b_proj",
            "attn_output": "self_attn.o_proj",
            **names.FFN_NORM,
            **names.GATED,
        },
        keys=_minicpm3,
        partial_rotary=True,
        value_width=True,
        own_shapes=True,
    ),
    "muse-glimmer": Architecture(
        "muse_glimmer",
        "MuseGlimmerForConditionalGeneration",
        {**names.SANDWICH, "attn_gate": "self_attn.gate_proj"},
        keys=_muse_glimmer,
        order=PERMUTED,
        values={name: minus(1) for name in names.SANDWICH if "norm" in name},
        in_config=frozenset(names.QK_NORMS),
    ),
    "nemotron": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        {**names.ATTENTION, **names.FFN_NORM, **names.UNGATED},
        keys=fixed(hidden_act="relu2"),
        epsilon="norm_eps",
        norm_offset=1.0,
        zero_biases=(names.BIASED_ATTENTION, ("ffn_up", "ffn_down")),
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
        zero_biases=(names.QKV,),
        norm_biases=True,
    ),
    "plamo": Architecture(
        "plamo",
        "PlamoForCausalLM",
        {**names.without(names.ATTENTION, "attn_norm"), "attn_norm": "norm", **names.GATED},
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
            **names.FFN_NORM,
            **names.GATED,
        },
        ends={"token_embd": "model.embedding"},
        keys=_spark,
        joins={"attn_qkv": names.QKV},
        partial_rotary=True,
    ),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        names.LLAMA | NORMS_OF_HEADS,
        keys=stablelm,
        epsilon="layer_norm_eps",
        parts={f"attn_{side}_norm": partial(norms_of_heads, side) for side in "qk"},
        reshape=dict.fromkeys(NORMS_OF_HEADS, flat),
        zero_biases=(names.QKV,),
        optional=frozenset({"ffn_norm", *NORMS_OF_HEADS}),
        norm_biases=True,
        partial_rotary=True,
    ),
}
