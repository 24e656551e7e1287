"""Gemma 3n and 4: embeddings for each layer, and layers that share the keys of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from converters.gguf.architectures.fused import gate_and_up
from converters.gguf.architectures.keys import only, unscaled, windows
from converters.gguf.architectures.limits import needs_windows, tied
from converters.gguf.architectures.row import (
    QK_NORMS,
    SANDWICH,
    SPARSE,
    Architecture,
    Config,
    Shape,
    renamed,
    without,
)
from converters.gguf.numbers import float_of, layer_count, per_layer, scalar
from converters.gguf.reader import GGUFFile

_LAYER_INPUTS = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
_MODEL_INPUTS = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _inputs(gguf: GGUFFile) -> Config:
    """Sizes of the embeddings for each layer; none for the larger models."""
    width = scalar(gguf, "embedding_length_per_layer_input", 0)
    table = "per_layer_token_embd.weight"
    return {
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": gguf.tensor(table).shape[0] if width else 0,
    }


def _gemma4(gguf: GGUFFile, config: Config) -> Config:
    shared = scalar(gguf, "attention.shared_kv_layers", 0)
    found = needs_windows(gguf, windows(gguf, 6))
    moe = {
        "enable_moe_block": "num_experts" in config,
        "top_k_experts": config.get("num_experts_per_tok"),
    }
    return {
        **_GELU,
        **found,
        **_inputs(gguf),
        **_widths(gguf, shared),
        **_gemma4_heads(gguf, found["layer_types"]),
        **_gemma4_rope(gguf, config),
        **moe,
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": float_of(gguf, "final_logit_softcapping", 30.0) or None,
    }


def _widths(gguf: GGUFFile, shared: int) -> Config:
    """Feed-forwards are as wide in all layers, or twice as wide in those that share keys."""
    found = per_layer(gguf, "feed_forward_length")
    plain = [found[0]] * (len(found) - shared)
    wide = plain + [2 * found[0]] * shared
    if found not in (wide, [found[0]] * len(found)):
        raise gguf.error(
            f"{gguf.architecture}.feed_forward_length",
            expected="one size, doubled if at all in the layers that share keys",
        )
    return {"intermediate_size": found[0], "use_double_wide_mlp": shared > 0 and found == wide}


def _gemma4_heads(gguf: GGUFFile, kinds: list[str]) -> Config:
    """Heads of layers with windows and of those without."""
    wide = scalar(gguf, "attention.key_length")
    narrow = scalar(gguf, "attention.key_length_swa")
    only(gguf, "attention.value_length_swa", narrow)
    only(gguf, "rope.dimension_count_swa", narrow)
    heads: dict[str, set[int]] = {}
    for kind, count in zip(kinds, per_layer(gguf, "attention.head_count_kv"), strict=True):
        heads.setdefault(kind, set()).add(count)
    key = f"{gguf.architecture}.attention.head_count_kv"
    if any(len(counts) > 1 for counts in heads.values()):
        raise gguf.error(key, expected="one number for each kind of layer")
    full, sliding = heads.get("full_attention"), heads.get("sliding_attention")
    # Layers without a window may use their keys as values.
    owners = len(kinds) - scalar(gguf, "attention.shared_kv_layers", 0)
    valued = {
        f"blk.{i}.attn_v.weight" in gguf
        for i, kind in enumerate(kinds[:owners])
        if kind == "full_attention"
    }
    if len(valued) > 1 or (True in valued and full and sliding and full != sliding):
        raise gguf.error(key, expected="as many heads in all layers that have values of their own")
    return {
        "head_dim": narrow,
        "global_head_dim": wide,
        "num_key_value_heads": min(sliding or full or {0}),
        "num_global_key_value_heads": min(full) if full else None,
        "attention_k_eq_v": valued == {False},
    }


def _gemma4_rope(gguf: GGUFFile, config: Config) -> Config:
    """Positions of both kinds; layers without a window turn a part of each head, at both ends.

    A file says how large a part by factors on frequencies: 1 for what turns, 1e30 for the rest.
    """
    only(gguf, "rope.scaling.type", "none", "linear")
    only(gguf, "rope.scaling.factor", 0.0, 1.0)
    config.pop("rope_scaling", None)
    tensor = gguf.tensor("rope_freqs.weight")
    factors = tensor.raw().view("<f4") if tensor.type.name == "F32" else np.zeros(0, "<f4")
    turning = int((factors == 1).sum())
    half = scalar(gguf, "attention.key_length") // 2
    if (
        len(factors) != half
        or not (factors[:turning] == 1).all()
        or (factors[turning:] < 1e29).any()
    ):
        raise tensor.error(expected=f"{half} factors, ones and then 1e30", found="others")
    return {
        "partial_rotary_factor": 1.0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config["rope_theta"],
                "partial_rotary_factor": turning / half,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float_of(gguf, "rope.freq_base_swa", 10000.0),
            },
        },
    }


def _gemma3n(gguf: GGUFFile, config: Config) -> Config:
    tied(gguf)
    unscaled(gguf, config)
    only(gguf, "altup.num_inputs", _STREAMS + 1)
    # What llama.cpp does not ask for but has built in, as both sizes of the model have it.
    shared = max(0, layer_count(gguf) - 20)
    only(gguf, "attention.shared_kv_layers", shared)
    only(gguf, "final_logit_softcapping", 30.0)
    only(gguf, "altup.active_idx", 0)
    # A scale is the quantile of the normal distribution that activations must reach.
    scales = np.atleast_1d(gguf.key("activation_sparsity_scale", -math.inf))
    if scales.dtype.kind != "f" or len(scales) not in (1, layer_count(gguf)):
        key = f"{gguf.architecture}.activation_sparsity_scale"
        raise gguf.error(key, expected="a value for each layer")
    sparsity = [round(0.5 * (1 + math.erf(float(x) / math.sqrt(2))), 6) for x in scales]
    sparsity *= layer_count(gguf) // len(sparsity)
    text: Config = {
        **config,
        **_GELU,
        **needs_windows(gguf, windows(gguf, 5)),
        **_inputs(gguf),
        "model_type": "gemma3n_text",
        "intermediate_size": per_layer(gguf, "feed_forward_length"),
        "num_kv_shared_layers": shared,
        "rope_local_base_freq": float_of(gguf, "rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": sparsity,
        "altup_num_inputs": scalar(gguf, "altup.num_inputs"),
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "laurel_rank": gguf.tensor("blk.0.laurel_l.weight").shape[0],
    }
    return {"text_config": text}


# Streams beside the first; llama.cpp's converter knows no other number.
_STREAMS = 3


def _stream(name: str) -> Callable[[GGUFFile], list[tuple[str, int]]]:
    """Projections of further streams, which GGUF stacks and the model has one by one."""
    return lambda gguf: [(f"{name}.{i}", 1) for i in range(_STREAMS)]


def _streams(name: str, target: str) -> dict[str, str]:
    return {f"{name}.{i}": f"model.language_model.{target}.{i}" for i in range(_STREAMS)}


def _drop_first(shape: Shape) -> Shape:
    return shape[1:]


_ALTUP = {
    **_streams("altup_proj", "altup_projections"),
    **_streams("altup_unembd_proj", "altup_unembed_projections"),
}

GEMMA: dict[str, Architecture] = {
    "gemma3n": Architecture(
        "gemma3n",
        "Gemma3nForConditionalGeneration",
        {
            **SANDWICH,
            **QK_NORMS,
            **_LAYER_INPUTS,
            "altup_correct_coef": "altup.correction_coefs",
            "altup_correct_scale.weight": "altup.correct_output_scale",
            "altup_predict_coef": "altup.prediction_coefs",
            "altup_router": "altup.modality_router",
            "altup_router_norm": "altup.router_norm",
            "laurel_l": "laurel.linear_left",
            "laurel_r": "laurel.linear_right",
            "laurel_post_norm": "laurel.post_laurel_norm",
        },
        ends={
            "token_embd": "model.language_model.embed_tokens",
            "output_norm": "model.language_model.norm",
            **renamed(_MODEL_INPUTS, "model.", "model.language_model."),
            **_ALTUP,
        },
        prefix="model.language_model.layers",
        keys=_gemma3n,
        reshape=dict.fromkeys(_ALTUP, _drop_first),
        parts={name: _stream(name) for name in ("altup_proj", "altup_unembd_proj")},
        own_shapes=True,
        per_layer=True,
    ),
    "gemma4": Architecture(
        "gemma4_text",
        "Gemma4ForCausalLM",
        {
            **SANDWICH,
            # Each by itself: layers that share keys have no norm of them.
            **{f"{module}.weight": f"{target}.weight" for module, target in QK_NORMS.items()},
            **_LAYER_INPUTS,
            "layer_output_scale.weight": "layer_scalar",
            "ffn_gate_inp": "router.proj",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_down_exps.scale": "router.per_expert_scale",
            **renamed(without(SPARSE, "ffn_gate_inp"), "mlp.switch_mlp", "experts.switch_glu"),
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
        },
        ends=_MODEL_INPUTS,
        keys=_gemma4,
        parts={"ffn_gate_up_exps": gate_and_up},
        optional=None,
        own_shapes=True,
        per_layer=True,
    ),
}
