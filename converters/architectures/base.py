"""An architecture as a row of a table, and the tensor names and keys that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.file import GGUFTensor
from converters.gguf.reader import GGUFFile
from converters.gguf.validate import float_of, layer_count, scalar

Config = dict[str, Any]
Names = Mapping[str, str]
Shape = tuple[int, ...]
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]
# (file, number of rows) -> the file's rows in the model's order.
RowOrder = Callable[[GGUFFile, int], Rows]
# file -> the file's blocks of columns in the model's order.
ColumnOrder = Callable[[GGUFFile], Rows]
# file -> the parts of a fused tensor: (module, number of the next rows, or their indices).
Parts = Callable[[GGUFFile], Sequence[tuple[str, int | Rows]]]

# Modules outside the layers.
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LANGUAGE_MODEL = {
    "token_embd": "language_model.model.embed_tokens",
    "output_norm": "language_model.model.norm",
    "output": "language_model.lm_head",
}
LANGUAGE_MODEL_LAYERS = "language_model.model.layers"

# Modules of a layer, below ``blk.N.`` and ``model.layers.N.``.
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
HUNYUAN_NORMS = {
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}
# Multi-head latent attention.
MLA_Q = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
}
MLA_KV = {
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
}
MLA_ABSORBED = {"attn_k_b": "self_attn.embed_q", "attn_v_b": "self_attn.unembed_out"}

FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
AFTER_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
UNGATED = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
FUSED_GATE = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
LLAMA = {**ATTENTION, **FFN_NORM, **GATED}
SANDWICH = {**LLAMA, **AFTER_NORMS, "ffn_norm": "pre_feedforward_layernorm"}

MOE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
MOE_LLAMA = {**ATTENTION, **FFN_NORM, **MOE}
SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
GATED_SHARED_EXPERT = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
ROUTER_BIAS = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
# Layers with and without experts; the loader finds what a layer lacks.
DENSE_OR_MOE = {**GATED, **MOE, **SHARED_EXPERTS, **ROUTER_BIAS}
MOE_LAYER = {**ATTENTION, **FFN_NORM, **DENSE_OR_MOE}
MOE_OPTIONAL = frozenset(DENSE_OR_MOE)

QKV = ("attn_q", "attn_k", "attn_v")
BIASED_ATTENTION = (*QKV, "attn_output")
LLAMA_BIASES = (BIASED_ATTENTION, ("ffn_gate", "ffn_up", "ffn_down"))


def without(names: Names, *excluded: str) -> dict[str, str]:
    return {name: target for name, target in names.items() if name not in excluded}


def renamed(names: Names, old: str, new: str) -> dict[str, str]:
    """The names with the first ``old`` of each target replaced."""
    return {name: target.replace(old, new, 1) for name, target in names.items()}


@dataclass(frozen=True)
class Architecture:
    """A GGUF architecture in Hugging Face terms.

    A key of ``layer`` is a module (``attn_q`` stands for its ``weight`` and ``bias``) or, where the
    model's parameter is called neither, a whole tensor (``attn_sinks.weight``, ``ssm_a``).

    Attributes:
        model_type: ``model_type`` of ``config.json``.
        class_name: the entry of ``architectures`` in ``config.json``.
        layer: module names of a layer.
        by_layer: module names that differ in one of the layers; empty for an unused tensor.
        ends: module names outside the layers that differ from ``ENDS``.
        final_norm: GGUF's name of the norm before the output head; None for one without weights.
        prefix: of the layers in the model.
        keys: the family's own keys of ``config.json``, from the file and the common keys.
        epsilon: the family's key for the epsilon of norms, RMS norms if it contains ``rms``.
        order: row orders, by module, where GGUF's differs.
        columns: orders of equal blocks of columns, by module, where GGUF's differs.
        values: transformations of values, by module, where GGUF stores others; floats only.
        reshape: shapes in the model, by module, where they differ.
        parts: fused tensors that the model has apart: module to (module, rows) of each part.
        joins: modules that the model has fused: module to the modules of its rows.
        in_config: modules whose values ``keys`` puts into ``config.json``.
        made: tensors of the model that are keys in GGUF, by GGUF-style names.
        norm_offset: GGUF has added this to the weights of norms.
        zero_biases: groups of modules; where one has a bias, the others get a zero bias, because
            stock classes have one switch for the group.
        always_biased: stock classes have these biases even where a file has none.
        optional: modules that may be absent from some or all layers; None for any.
        norm_biases, head_bias: norms, or the output head, may have biases.
        partial_rotary: RoPE may rotate less than a whole head.
        value_width: values may be of another width than keys.
        own_shapes: tensors of layers have other shapes than the common keys imply.
        per_layer: sizes may differ between layers; the common keys then have the largest, and
            ``keys`` reads the rest.
    """

    model_type: str
    class_name: str
    layer: Names = field(default_factory=lambda: LLAMA)
    by_layer: Callable[[GGUFFile, int], Names] = lambda gguf, layer: {}
    ends: Names = field(default_factory=dict)
    final_norm: str | None = "output_norm"
    prefix: str = "model.layers"
    keys: Callable[[GGUFFile, Config], Config] = lambda gguf, config: {}
    epsilon: str = "rms_norm_eps"
    order: Mapping[str, RowOrder] = field(default_factory=dict)
    columns: Mapping[str, ColumnOrder] = field(default_factory=dict)
    values: Mapping[str, Callable[[Floats], Floats]] = field(default_factory=dict)
    reshape: Mapping[str, Callable[[Shape], Shape]] = field(default_factory=dict)
    parts: Mapping[str, Parts] = field(default_factory=dict)
    joins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    in_config: frozenset[str] = frozenset()
    made: Callable[[GGUFFile], Mapping[str, Floats]] = lambda gguf: {}
    norm_offset: float = 0.0
    zero_biases: tuple[tuple[str, ...], ...] = ()
    always_biased: bool = False
    optional: frozenset[str] | None = frozenset()
    norm_biases: bool = False
    head_bias: bool = False
    partial_rotary: bool = False
    value_width: bool = False
    own_shapes: bool = False
    per_layer: bool = False

    @property
    def required(self) -> frozenset[str]:
        """Keys of ``layer`` that every layer of a file must have."""
        return frozenset() if self.optional is None else frozenset(self.layer) - self.optional

    def may_have_bias(self, module: str) -> bool:
        """Whether a module, in GGUF's terms, may have a bias."""
        if module == "output":
            return self.head_bias
        return self.norm_biases if "norm" in module else module != "token_embd"


def fixed(**keys: Any) -> Callable[[GGUFFile, Config], Config]:
    """An ``Architecture.keys`` of constants."""
    return lambda gguf, config: keys


# ---------------------------------------------------------------------------- rows and shapes


def halves(gguf: GGUFFile, rows: int) -> Rows:
    """Row order from interleaved rotary pairs (2i, 2i+1) to halves (i, i + d/2)."""
    heads = int(np.max(gguf.key("attention.head_count"), initial=0))
    if heads < 1:
        raise gguf.key_error("attention.head_count", expected="at least one head")
    width = scalar(gguf, "attention.key_length", scalar(gguf, "embedding_length") // heads)
    if width < 2 or rows % (width // 2 * 2):
        expected = f"heads that divide {rows} rows of queries or keys"
        raise gguf.key_error("attention.head_count", expected=expected)
    pairs = np.arange(rows).reshape(-1, width // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


#: Rows of queries and keys of files made from Meta's Llama and its relatives.
PERMUTED: Mapping[str, RowOrder] = {"attn_q": halves, "attn_k": halves}


def fused_qkv(gguf: GGUFFile) -> list[tuple[str, int]]:
    """The parts of ``attn_qkv`` and their rows."""
    heads = scalar(gguf, "attention.head_count")
    width = scalar(gguf, "attention.key_length", scalar(gguf, "embedding_length") // heads)
    keys = scalar(gguf, "attention.head_count_kv", heads) * width
    return [("attn_q", heads * width), ("attn_k", keys), ("attn_v", keys)]


def shape_of(gguf: GGUFFile, module: str) -> Shape:
    """Shape of a module in the first layer that has it (a bound on index arrays over its rows)."""
    names = [f"blk.{i}.{module}.weight" for i in range(layer_count(gguf))]
    return gguf.tensor(next((name for name in names if name in gguf), names[0])).shape


def gate_and_up(gguf: GGUFFile) -> list[tuple[str, Rows]]:
    """The parts of ``ffn_gate_up_exps``."""
    count, size = shape_of(gguf, "ffn_gate_up_exps")[:2]
    if size % 2:
        expected = f"half of the {size} rows of gates and up projections"
        raise gguf.key_error("expert_feed_forward_length", expected=expected)
    rows = np.arange(count * size).reshape(count, 2, -1)
    return [("ffn_gate_exps", rows[:, 0].ravel()), ("ffn_up_exps", rows[:, 1].ravel())]


def log_of_negative(x: Floats) -> Floats:
    """``log(-x)``: GGUF stores the decay of a state-space layer as ``-exp(A_log)``."""
    return np.log(-x)


def as_row(shape: Shape) -> Shape:
    return (1, *shape)


def flat(shape: Shape) -> Shape:
    """One axis: GGUF gives decays a second one, and norms one for groups."""
    return (prod(shape),)


def depthwise(shape: Shape) -> Shape:
    """A kernel (channels, width) in the shape of MLX's convolution: (channels, width, 1)."""
    return (*shape, 1)


# ---------------------------------------------------------------------------- hyperparameters


def windows(gguf: GGUFFile, every: int, *, full_first: bool = False) -> Config:
    """Sliding windows: by the file's own pattern, else in all but one of ``every`` layers.

    Args:
        full_first: full attention is in the first layer of each ``every``, not in the last.
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
        full = 0 if full_first else every - 1
        sliding = [every > 0 and i % every != full for i in range(layers)]
    return {
        "sliding_window": scalar(gguf, "attention.sliding_window"),
        "sliding_window_pattern": every,
        "layer_types": ["sliding_attention" if x else "full_attention" for x in sliding],
    }


def experts(gguf: GGUFFile, config: Config) -> Config:
    """Number and width of the experts, under the keys of all families."""
    count, used = scalar(gguf, "expert_count"), scalar(gguf, "expert_used_count")
    if not 0 < used <= count:
        raise gguf.key_error("expert_used_count", expected=f"between 1 and {count}")
    return {
        "num_experts": count,
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": scalar(
            gguf, "expert_feed_forward_length", config["intermediate_size"]
        ),
    }


def gating(gguf: GGUFFile, default: int = 1) -> str:
    """The function from router logits to weights."""
    number = scalar(gguf, "expert_gating_func", default) or default
    if number not in (1, 2):
        raise gguf.key_error("expert_gating_func", expected="1 (softmax) or 2 (sigmoid)")
    return "sigmoid" if number == 2 else "softmax"


def routed(gguf: GGUFFile, config: Config) -> Config:
    """Routing under DeepSeek's keys."""
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


def router_bias(gguf: GGUFFile) -> GGUFTensor | None:
    """The first layer's bias on the selection of experts."""
    return next((tensor for tensor in gguf.tensors if "exp_probs_b" in tensor.name), None)


def shared_width(gguf: GGUFFile) -> int:
    """Width of all shared experts together; 0 for none."""
    names = (f"blk.{i}.ffn_down_shexp.weight" for i in range(layer_count(gguf)))
    return next((gguf.tensor(name).shape[-1] for name in names if name in gguf), 0)


def shared_count(gguf: GGUFFile, config: Config) -> int:
    """Number of shared experts, each as wide as the routed ones."""
    each = int(config["moe_intermediate_size"])
    count, rest = divmod(shared_width(gguf), each)
    if rest:
        raise gguf.key_error(
            "expert_shared_feed_forward_length",
            expected=f"a multiple of {each} in this architecture",
            found=str(shared_width(gguf)),
        )
    return count


# ---------------------------------------------------------------------------- refusals
# Model classes of mlx-lm have constants where llama.cpp has keys; a file with other values is
# refused, not run with the class's.


def only(gguf: GGUFFile, suffix: str, *allowed: object, absent: object = None) -> None:
    """Allow only some values of a key; ``absent`` is the meaning of a missing one (the first)."""
    value = gguf.key(suffix, allowed[0] if absent is None else absent)
    if isinstance(value, np.ndarray | list) or value not in allowed:
        raise gguf.key_error(
            suffix, expected=f"{' or '.join(map(str, allowed))} in this architecture"
        )


def needs_experts(gguf: GGUFFile, config: Config) -> None:
    if "num_experts" not in config:
        raise gguf.key_error("expert_count", expected="experts")


def several_experts(gguf: GGUFFile, config: Config) -> None:
    """At least two experts per token, for classes that normalize the weight of one to 1."""
    if config["model_type"] in _SEVERAL_EXPERTS and config.get("num_experts_per_tok") == 1:
        raise gguf.key_error("expert_used_count", expected="at least 2 in this architecture")


_SEVERAL_EXPERTS = (
    "afmoe", "bailing_hybrid", "bailing_moe", "deepseek_v32", "exaone_moe", "glm_moe_dsa",
    "kimi_linear", "mimo_v2_flash", "nemotron_h",
)  # fmt: skip


def no_router_bias(gguf: GGUFFile) -> None:
    found = router_bias(gguf)
    if found is not None:
        raise found.error(expected="no bias on the selection of experts", found="one")


def no_windows(gguf: GGUFFile) -> None:
    if scalar(gguf, "attention.sliding_window", 0):
        raise gguf.key_error(
            "attention.sliding_window", expected="no sliding window in this architecture"
        )


def needs_windows(gguf: GGUFFile, found: Config) -> Config:
    """``found`` by :func:`windows`, of which there must be some."""
    if not found:
        raise gguf.key_error("attention.sliding_window", expected="a sliding window")
    if len(found["layer_types"]) != layer_count(gguf):
        raise gguf.key_error("attention.sliding_window_pattern", expected="a value for each layer")
    return found


def tied(gguf: GGUFFile) -> None:
    """Only the embedding as output head."""
    if "output.weight" in gguf:
        raise gguf.tensor("output.weight").error(
            expected="the embeddings as output head in this architecture", found="another one"
        )


def whole_heads(gguf: GGUFFile, config: Config) -> None:
    """Heads must have the width hidden size / heads."""
    width = config["hidden_size"] // config["num_attention_heads"]
    if config["head_dim"] != width:
        expected = f"{width}, the hidden size over the heads"
        raise gguf.key_error("attention.key_length", expected=expected)


def one_base(gguf: GGUFFile, config: Config) -> None:
    """Windowed layers must have the RoPE base of all layers."""
    base = config["rope_theta"]
    if float_of(gguf, "rope.freq_base_swa", base) != base:
        expected = f"{base:g}, that of all layers, in this architecture"
        raise gguf.key_error("rope.freq_base_swa", expected=expected)


def unscaled(gguf: GGUFFile, config: Config, *known: str) -> None:
    """No RoPE scaling but of the ``known`` types."""
    scaling = config.get("rope_scaling")
    if scaling and scaling["type"] not in known:
        raise gguf.key_error(
            "rope.scaling.type",
            expected=f"{' or '.join(('none', *known))} in this architecture",
            found=scaling["type"],
        )


def small_epsilon(gguf: GGUFFile, config: Config) -> None:
    """A usual epsilon, for classes in which some norms have a constant one."""
    epsilon = config.get("rms_norm_eps", 0.0)
    if config["model_type"] in _CONSTANT_EPSILON and epsilon > _LARGEST_EPSILON:
        expected = f"at most {_LARGEST_EPSILON:g} in this architecture"
        raise gguf.key_error("attention.layer_norm_rms_epsilon", expected=expected)


_CONSTANT_EPSILON = (
    "bailing_hybrid", "deepseek_v32", "glm_moe_dsa", "kimi_linear", "llama4", "mamba2", "mistral4",
    "plamo2", "qwen3_5", "qwen3_5_moe", "qwen3_next",
)  # fmt: skip
# Up to it, the squared error of the logits stays below 1e-8 of their square.
_LARGEST_EPSILON = 2e-5


def text_rope(gguf: GGUFFile, config: Config, *, interleaved: bool) -> None:
    """Refuse sections of a multimodal RoPE (time, height, width) that change RoPE on text.

    Text has one position for all three. Interleaved sections take turns; where a pair's section has
    ended already, as for two pairs of Qwen 3 VL, llama.cpp does not rotate it, and models do. Such
    pairs are among the slowest and hardly rotate if the base is as large as in those models.
    """
    if gguf.key("rope.dimension_sections", None) is None:
        return
    given = np.atleast_1d(gguf.key("rope.dimension_sections"))
    if given.dtype.kind not in "iu":
        raise gguf.key_error("rope.dimension_sections", expected="whole numbers")
    sections = [int(x) for x in given] + [0] * (3 - len(given))
    pairs = round(config["head_dim"] * config["partial_rotary_factor"]) // 2
    if any(sections[3:]) or (interleaved and sum(sections) != pairs):
        raise gguf.key_error(
            "rope.dimension_sections",
            expected=f"three sections for the {pairs} pairs that rotate",
            found=str(sections),
        )
    ended = interleaved and any(i >= 3 * sections[i % 3] for i in range(pairs))
    if ended and config["rope_theta"] < _LARGE_BASE:
        expected = f"at least {_LARGE_BASE:g} with sections {sections}"
        raise gguf.key_error("rope.freq_base", expected=expected)


# The least that makes no measurable difference (as for _LARGEST_EPSILON).
_LARGE_BASE = 1e6


def text_of_vl(gguf: GGUFFile, config: Config) -> Config:
    """No keys of its own: the text model of a vision-language model."""
    text_rope(gguf, config, interleaved=gguf.architecture == "qwen3vl")
    return {}
