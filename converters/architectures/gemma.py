"""Gemma 1 to 4."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from converters.architectures import names
from converters.architectures.base import Architecture, Shape, fixed, gate_and_up
from converters.architectures.hyperparameters import Config, Hyperparameters

_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _query_scalar(hp: Hyperparameters, layers_of_27b: int) -> Config:
    """The largest models scale scores by another width."""
    largest = hp["num_hidden_layers"] == layers_of_27b
    width = hp["hidden_size"] // hp["num_attention_heads"]
    return {"query_pre_attn_scalar": width if largest else hp["head_dim"]}


def _gemma2(hp: Hyperparameters) -> Config:
    hp.one_base()
    return {
        **_GELU,
        **_query_scalar(hp, 46),
        **hp.windows(2),
        "attn_logit_softcapping": hp.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": hp.number("final_logit_softcapping", 30.0),
    }


def _gemma3(hp: Hyperparameters) -> Config:
    cap = float(hp.key("final_logit_softcapping", 0.0))
    return {
        **_GELU,
        **_query_scalar(hp, 62),
        **hp.windows(6),
        "rope_local_base_freq": hp.number("rope.freq_base_swa", 10000.0),
        **({"final_logit_softcapping": cap} if cap else {}),
    }


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


def _inputs(hp: Hyperparameters) -> Config:
    """Sizes of the per-layer embeddings; zero in the larger models."""
    width = hp.integer("embedding_length_per_layer_input", 0)
    table = "per_layer_token_embd.weight"
    return {
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": hp.tensor(table).shape[0] if width else 0,
    }


def _gemma4(hp: Hyperparameters) -> Config:
    shared = hp.integer("attention.shared_kv_layers", 0)
    found = hp.windows(6, needed=True)
    moe = {
        "enable_moe_block": "num_experts" in hp.config,
        "top_k_experts": hp.config.get("num_experts_per_tok"),
    }
    return {
        **_GELU,
        **found,
        **_inputs(hp),
        **_widths(hp, shared),
        **_gemma4_heads(hp, found["layer_types"]),
        **_gemma4_rope(hp),
        **moe,
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": hp.number("final_logit_softcapping", 30.0) or None,
    }


def _widths(hp: Hyperparameters, shared: int) -> Config:
    """Feed-forwards of one width, or of twice that in the layers that share K/V."""
    found = hp.per_layer("feed_forward_length")
    plain = [found[0]] * (len(found) - shared)
    wide = plain + [2 * found[0]] * shared
    hp.refuse_if(
        found not in (wide, [found[0]] * len(found)),
        "feed_forward_length",
        "one size, doubled if at all in the layers that share keys",
    )
    return {"intermediate_size": found[0], "use_double_wide_mlp": shared > 0 and found == wide}


def _gemma4_heads(hp: Hyperparameters, kinds: list[str]) -> Config:
    """Heads of windowed layers and of full attention."""
    wide = hp.integer("attention.key_length")
    narrow = hp.integer("attention.key_length_swa")
    hp.only("attention.value_length_swa", narrow)
    hp.only("rope.dimension_count_swa", narrow)
    heads: dict[str, set[int]] = {}
    for kind, count in zip(kinds, hp.per_layer("attention.head_count_kv"), strict=True):
        heads.setdefault(kind, set()).add(count)
    key = "attention.head_count_kv"
    hp.refuse_if(
        any(len(counts) > 1 for counts in heads.values()), key, "one number for each kind of layer"
    )
    full, sliding = heads.get("full_attention"), heads.get("sliding_attention")
    # Full attention may use keys as values.
    owners = len(kinds) - hp.integer("attention.shared_kv_layers", 0)
    valued = {
        f"blk.{i}.attn_v.weight" in hp
        for i, kind in enumerate(kinds[:owners])
        if kind == "full_attention"
    }
    hp.refuse_if(
        len(valued) > 1 or (True in valued and full and sliding and full != sliding),
        key,
        "as many heads in all layers that have values of their own",
    )
    return {
        "head_dim": narrow,
        "global_head_dim": wide,
        "num_key_value_heads": min(sliding or full or {0}),
        "num_global_key_value_heads": min(full) if full else None,
        "attention_k_eq_v": valued == {False},
    }


def _gemma4_rope(hp: Hyperparameters) -> Config:
    """RoPE of both kinds of layers; full attention rotates a part of each head, at both ends.

    GGUF has that part as factors on frequencies: 1 for rotated pairs, 1e30 for the rest.
    """
    hp.only("rope.scaling.type", "none", "linear")
    hp.only("rope.scaling.factor", 0.0, 1.0)
    hp.config.pop("rope_scaling", None)
    tensor = hp.tensor("rope_freqs.weight")
    factors = tensor.raw().view("<f4") if tensor.type.name == "F32" else np.zeros(0, "<f4")
    rotated = int((factors == 1).sum())
    half = hp.integer("attention.key_length") // 2
    if (
        len(factors) != half
        or not (factors[:rotated] == 1).all()
        or (factors[rotated:] < 1e29).any()
    ):
        raise tensor.error(expected=f"{half} factors, ones and then 1e30", found="others")
    return {
        "partial_rotary_factor": 1.0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": hp["rope_theta"],
                "partial_rotary_factor": rotated / half,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": hp.number("rope.freq_base_swa", 10000.0),
            },
        },
    }


def _gemma3n(hp: Hyperparameters) -> Config:
    hp.tied()
    hp.unscaled()
    hp.only("altup.num_inputs", _STREAMS + 1)
    # Constants of llama.cpp, right for both sizes of the model.
    shared = max(0, hp.layers - 20)
    hp.only("attention.shared_kv_layers", shared)
    hp.only("final_logit_softcapping", 30.0)
    hp.only("altup.active_idx", 0)
    # The scale is a quantile of the normal distribution, the pattern its probability.
    scales = np.atleast_1d(hp.key("activation_sparsity_scale", -math.inf))
    hp.refuse_if(
        scales.dtype.kind != "f" or len(scales) not in (1, hp.layers),
        "activation_sparsity_scale",
        "a value for each layer",
    )
    sparsity = [round(0.5 * (1 + math.erf(float(x) / math.sqrt(2))), 6) for x in scales]
    sparsity *= hp.layers // len(sparsity)
    text: Config = {
        **hp.config,
        **_GELU,
        **hp.windows(5, needed=True),
        **_inputs(hp),
        "model_type": "gemma3n_text",
        "intermediate_size": hp.per_layer("feed_forward_length"),
        "num_kv_shared_layers": shared,
        "rope_local_base_freq": hp.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": sparsity,
        "altup_num_inputs": hp.integer("altup.num_inputs"),
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "laurel_rank": hp.tensor("blk.0.laurel_l.weight").shape[0],
    }
    return {"text_config": text}


# Streams after the first; a constant of llama.cpp's converter.
_STREAMS = 3


def _stream(name: str) -> Callable[[Hyperparameters], list[tuple[str, int]]]:
    """The projections of further streams, which GGUF stacks."""
    return lambda hp: [(f"{name}.{i}", 1) for i in range(_STREAMS)]


def _streams(name: str, target: str) -> dict[str, str]:
    return {f"{name}.{i}": f"model.language_model.{target}.{i}" for i in range(_STREAMS)}


def _drop_first(shape: Shape) -> Shape:
    return shape[1:]


_ALTUP = {
    **_streams("altup_proj", "altup_projections"),
    **_streams("altup_unembd_proj", "altup_unembed_projections"),
}

ROWS: dict[str, Architecture] = {
    "gemma": Architecture("gemma", "GemmaForCausalLM", keys=fixed(**_GELU), norm_offset=1.0),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", names.SANDWICH, keys=_gemma2, norm_offset=1.0
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        names.SANDWICH | names.QK_NORMS,
        keys=_gemma3,
        norm_offset=1.0,
    ),
    "gemma3n": Architecture(
        "gemma3n",
        "Gemma3nForConditionalGeneration",
        {
            **names.SANDWICH,
            **names.QK_NORMS,
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
            **names.renamed(_MODEL_INPUTS, "model.", "model.language_model."),
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
            **names.SANDWICH,
            # One by one, as layers that share K/V have no key norm.
            **{f"{module}.weight": f"{target}.weight" for module, target in names.QK_NORMS.items()},
            **_LAYER_INPUTS,
            "layer_output_scale.weight": "layer_scalar",
            "ffn_gate_inp": "router.proj",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_down_exps.scale": "router.per_expert_scale",
            **names.renamed(
                names.without(names.MOE, "ffn_gate_inp"), "mlp.switch_mlp", "experts.switch_glu"
            ),
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
