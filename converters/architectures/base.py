"""An architecture as a row of a table, and the tensor names and keys that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.architectures.hyperparameters import Config, Hyperparameters
from converters.architectures.names import LLAMA, Names

Shape = tuple[int, ...]
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]
# (hp, number of rows) -> the file's rows in the model's order.
RowOrder = Callable[[Hyperparameters, int], Rows]
# hp -> the file's blocks of columns in the model's order.
ColumnOrder = Callable[[Hyperparameters], Rows]
# hp -> the parts of a fused tensor: (module, number of the next rows, or their indices).
Parts = Callable[[Hyperparameters], Sequence[tuple[str, int | Rows]]]


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
    by_layer: Callable[[Hyperparameters, int], Names] = lambda hp, layer: {}
    ends: Names = field(default_factory=dict)
    final_norm: str | None = "output_norm"
    prefix: str = "model.layers"
    keys: Callable[[Hyperparameters], Config] = lambda hp: {}
    epsilon: str = "rms_norm_eps"
    order: Mapping[str, RowOrder] = field(default_factory=dict)
    columns: Mapping[str, ColumnOrder] = field(default_factory=dict)
    values: Mapping[str, Callable[[Floats], Floats]] = field(default_factory=dict)
    reshape: Mapping[str, Callable[[Shape], Shape]] = field(default_factory=dict)
    parts: Mapping[str, Parts] = field(default_factory=dict)
    joins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    in_config: frozenset[str] = frozenset()
    made: Callable[[Hyperparameters], Mapping[str, Floats]] = lambda hp: {}
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


def fixed(**keys: Any) -> Callable[[Hyperparameters], Config]:
    """An ``Architecture.keys`` of constants."""
    return lambda hp: keys


# ---------------------------------------------------------------------------- rows and shapes


def halves(hp: Hyperparameters, rows: int) -> Rows:
    """Row order from interleaved rotary pairs (2i, 2i+1) to halves (i, i + d/2)."""
    heads = int(np.max(hp.key("attention.head_count"), initial=0))
    hp.refuse_if(heads < 1, "attention.head_count", "at least one head")
    width = hp.integer("attention.key_length", hp.integer("embedding_length") // heads)
    if width < 2 or rows % (width // 2 * 2):
        expected = f"heads that divide {rows} rows of queries or keys"
        raise hp.error("attention.head_count", expected=expected)
    pairs = np.arange(rows).reshape(-1, width // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


#: Rows of queries and keys of files made from Meta's Llama and its relatives.
PERMUTED: Mapping[str, RowOrder] = {"attn_q": halves, "attn_k": halves}


def fused_qkv(hp: Hyperparameters) -> list[tuple[str, int]]:
    """The parts of ``attn_qkv`` and their rows."""
    heads = hp.integer("attention.head_count")
    width = hp.integer("attention.key_length", hp.integer("embedding_length") // heads)
    keys = hp.integer("attention.head_count_kv", heads) * width
    return [("attn_q", heads * width), ("attn_k", keys), ("attn_v", keys)]


def shape_of(hp: Hyperparameters, module: str) -> Shape:
    """Shape of a module in the first layer that has it (a bound on index arrays over its rows)."""
    names = [f"blk.{i}.{module}.weight" for i in range(hp.layers)]
    return hp.tensor(next((name for name in names if name in hp), names[0])).shape


def gate_and_up(hp: Hyperparameters) -> list[tuple[str, Rows]]:
    """The parts of ``ffn_gate_up_exps``."""
    count, size = shape_of(hp, "ffn_gate_up_exps")[:2]
    if size % 2:
        expected = f"half of the {size} rows of gates and up projections"
        raise hp.error("expert_feed_forward_length", expected=expected)
    rows = np.arange(count * size).reshape(count, 2, -1)
    return [("ffn_gate_exps", rows[:, 0].ravel()), ("ffn_up_exps", rows[:, 1].ravel())]


def minus(offset: float) -> Callable[[Floats], Floats]:
    """Of a norm whose stored weights have had a constant added."""
    return lambda x: x - np.float32(offset)


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
