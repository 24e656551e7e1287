"""A row of the table of architectures: how one GGUF architecture is spelt in Hugging Face's terms.

Knows the vocabulary of a row (module names that families share, and what may differ); the rows
themselves are in this package's other files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.numbers import scalar
from converters.gguf.reader import GGUFFile

Config = dict[str, Any]
Names = Mapping[str, str]
Shape = tuple[int, ...]
Floats = npt.NDArray[np.float32]
# A file and a number of rows to the order in which the model wants them.
RowOrder = Callable[[GGUFFile, int], npt.NDArray[np.intp]]
# A file to the order in which the model wants equal blocks of columns.
ColumnOrder = Callable[[GGUFFile], npt.NDArray[np.intp]]
# A file to the parts of a tensor: (module, how many of the next rows, or which rows of all).
Parts = Callable[[GGUFFile], Sequence[tuple[str, int | npt.NDArray[np.intp]]]]

# Modules outside the layers.
ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Modules of one layer, below ``blk.N.`` and ``model.layers.N.``.
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
UNGATED = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
FUSED_GATE = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
LLAMA = {**ATTENTION, **FFN_NORM, **GATED}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
HUNYUAN_NORMS = {
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}
AFTER_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
SANDWICH = {**LLAMA, **AFTER_NORMS, "ffn_norm": "pre_feedforward_layernorm"}
SPARSE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
SPARSE_LLAMA = {**ATTENTION, **FFN_NORM, **SPARSE}
SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
CORRECTION = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
# Some layers with experts, the others without; what is missing in a layer is found when it is run.
SOMETIMES_SPARSE = {**GATED, **SPARSE, **SHARED_EXPERTS, **CORRECTION}
BIASED_QKV = ("attn_q", "attn_k", "attn_v")
BIASED_ATTENTION = (*BIASED_QKV, "attn_output")
BIASED_FFN = ("ffn_gate", "ffn_up", "ffn_down")
LLAMA_BIASES = (BIASED_ATTENTION, BIASED_FFN)


def without(names: Names, *left_out: str) -> dict[str, str]:
    """The names but for some."""
    return {name: target for name, target in names.items() if name not in left_out}


def renamed(names: Names, old: str, new: str) -> dict[str, str]:
    """The names with a part of each target replaced."""
    return {name: target.replace(old, new, 1) for name, target in names.items()}


def halves(gguf: GGUFFile, rows: int) -> npt.NDArray[np.intp]:
    """Row order that turns interleaved rotary pairs (2i, 2i+1) into halves (i, i + d/2)."""
    heads = int(np.max(gguf.key("attention.head_count"), initial=0))
    if heads < 1:
        raise gguf.error(f"{gguf.architecture}.attention.head_count", expected="at least one head")
    width = scalar(gguf, "attention.key_length", scalar(gguf, "embedding_length") // heads)
    if width < 2 or rows % (width // 2 * 2):
        key = f"{gguf.architecture}.attention.head_count"
        raise gguf.error(key, expected=f"heads that divide {rows} rows of queries or keys")
    pairs = np.arange(rows).reshape(-1, width // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def log_of_negative(x: Floats) -> Floats:
    """``log(-x)``: GGUF stores the decay of a state-space layer as ``-exp(A_log)``."""
    return np.log(-x)


def as_row(shape: Shape) -> Shape:
    """A vector as a matrix of one row."""
    return (1, *shape)


def depthwise(shape: Shape) -> Shape:
    """A kernel (channels, width) as MLX's convolution has it: (channels, width, 1)."""
    return (*shape, 1)


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is spelt in Hugging Face terms.

    A key of ``layer`` is a module (``attn_q`` stands for its ``weight`` and ``bias``) or, where the
    model's parameter is called neither, a whole tensor (``attn_sinks.weight``, ``ssm_a``).

    Attributes:
        model_type: ``model_type`` of ``config.json``.
        class_name: the entry of ``architectures`` in ``config.json``.
        layer: module names of a layer.
        by_layer: what is called otherwise in one of the layers; an empty name is of a tensor that
            only fills its place there.
        ends: module names outside the layers that differ from the usual ones.
        final_norm: what GGUF calls the norm before the output head; None for one without weights.
        prefix: what layers are under in the model.
        keys: what the family adds to ``config.json``, from the file and the common keys.
        epsilon: what the family calls the norms' epsilon; ``rms`` in it says which norm it is.
        order: modules whose rows GGUF stores in another order than the model has them.
        columns: modules whose columns it stores in another order, in blocks of the same width.
        values: modules of floats whose values GGUF stores in another way.
        reshape: modules to which the model gives another shape.
        parts: fused tensors that the model has separately: module to (module, rows) of each part.
        joins: modules that the model has fused: module to those that make up its rows.
        in_config: modules whose values ``keys`` puts into ``config.json``.
        made: tensors of the model that a file has as keys, by the names of this row.
        norm_offset: what GGUF has added to the weights of norms.
        zero_biases: modules that get a zero bias where a sibling has one, because stock classes
            switch all of a group on together.
        always_biased: whether stock classes have those biases even where a file has none.
        optional: modules that a file may lack, in some layers or in all; None for any.
        norm_biases: whether norms may have biases.
        head_bias: whether the output head may have one.
        partial_rotary: whether less than a whole head may turn.
        value_width: whether values may be of another width than keys.
        own_shapes: whether tensors of layers have other shapes than the common keys imply.
        per_layer: whether sizes may differ between layers; the common keys then have the largest,
            and ``keys`` reads the rest.
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


#: Rows of queries and keys of files made from Meta's Llama and its relatives.
PERMUTED: Mapping[str, RowOrder] = {"attn_q": halves, "attn_k": halves}
