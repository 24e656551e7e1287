"""Tensors of a GGUF file to parameters of its Hugging Face model.

Experts are stacked, fused matrices split or joined, as the model has them. Matrices are stored by
rows, so a part is a slice of the bytes and nothing is decoded, unless rows of one matrix have
different types, which only plain floats can hold together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial

import numpy as np
import numpy.typing as npt

from converters.architectures import (
    cohere,
    deepseek,
    dense,
    gemma,
    glm,
    gpt,
    granite,
    linear_attention,
    llama,
    moe,
    olmo,
    phi,
    qwen,
    ssm,
)  # fmt: skip
from converters.architectures.base import Architecture, Rows, minus
from converters.architectures.hyperparameters import Hyperparameters
from converters.architectures.names import ENDS, GATED, MOE, SHARED_EXPERTS
from converters.errors import UnsupportedArchitectureError
from converters.gguf.file import GGUFTensor
from converters.gguf.reader import GGUFFile
from converters.gguf.types import GGMLType
from converters.quantize.encode import Change, plain_floats
from converters.quantize.policy import FLOATS

#: Every known architecture; a new one is a row in its family's file.
ARCHITECTURES: dict[str, Architecture] = {
    name: row
    for family in (
        llama, qwen, gemma, phi, glm, cohere, olmo, gpt, dense, ssm, granite, deepseek, moe,
        linear_attention,
    )
    for name, row in family.ROWS.items()
}  # fmt: skip
# Dense architectures, when they have experts.
_WITH_EXPERTS = {"granite": "granitemoe", "llama": "mixtral", "mistral3": "mixtral"}
# Tensors whose values move into config.json.
_IN_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
# Modules that are in a layer together or not at all.
_TOGETHER = (GATED, MOE, SHARED_EXPERTS)
NO_PLACE = "the architecture has no such parameter"


def architecture_of(gguf: GGUFFile) -> Architecture:
    """The row of a file's architecture, or UnsupportedArchitectureError."""
    name = gguf.architecture
    if gguf.key("expert_count", 0):
        name = _WITH_EXPERTS.get(name, name)
    if name in ARCHITECTURES and not (gguf.architecture == name == "mixtral"):
        return ARCHITECTURES[name]
    near = get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.5)
    nearest = f"; the nearest known one is {near[0]}" if near else ""
    raise UnsupportedArchitectureError(
        f"{gguf.path.name}: architecture {name!r} is not supported{nearest}",
        hint=f"Supported: {', '.join(sorted(ARCHITECTURES))}",
    )


# ---------------------------------------------------------------------------- names


@dataclass(frozen=True)
class Mapped:
    """A tensor of the file and its parameter.

    Attributes:
        order: the tensor's rows in the model's order, or None.
        columns: equal blocks of its columns in the model's order, or None.
        change: transformation of its values, or None.
        shape: of the parameter.
        factor: multiplies the whole matrix, or each expert, or None.
    """

    source: GGUFTensor
    target: str
    order: Rows | None
    columns: Rows | None
    change: Change | None
    shape: tuple[int, ...]
    factor: GGUFTensor | None = None


@dataclass(frozen=True)
class NameMap:
    """Every tensor of a file: mapped, or skipped with the reason.

    Attributes:
        mapped: in file order.
        skipped: ``(tensor, reason)``.
        zeros: parameters to fill with zeros: target name and length.
    """

    mapped: tuple[Mapped, ...]
    skipped: tuple[tuple[GGUFTensor, str], ...]
    zeros: tuple[tuple[str, int], ...]


# Numbers without leading zeros, so that no two tensors are one parameter.
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)")


def map_tensors(gguf: GGUFFile, architecture: Architecture) -> NameMap:
    """Map every tensor of a regrouped file to a parameter of its Hugging Face model.

    Raises:
        GGUFError: a tensor that every model of this architecture needs is missing.
    """
    hp = Hyperparameters(gguf)
    mapped: list[Mapped] = []
    skipped: list[tuple[GGUFTensor, str]] = []
    for tensor in gguf.tensors:
        if tensor.name == "output.bias" and not architecture.head_bias:
            # Skipping it, as other unknown tensors, would change every logit.
            raise tensor.error(expected="no bias on the output", found="one")
        own = tensor.name.split(".", 2)[-1] in architecture.layer
        if tensor.name.endswith(".scale") and not own:
            _check_factor(gguf, tensor)
            continue
        if tensor.name.endswith(".input_scale"):
            skipped.append((tensor, "activations are not quantized here"))
            continue
        target, module, reason = _target(hp, tensor.name, architecture)
        if target:
            mapped.append(_mapped(hp, architecture, tensor, target, module))
        else:
            skipped.append((tensor, reason))
    _require(hp, architecture)
    return NameMap(tuple(mapped), tuple(skipped), tuple(_zero_biases(hp, architecture)))


def _mapped(
    hp: Hyperparameters, architecture: Architecture, tensor: GGUFTensor, target: str, module: str
) -> Mapped:
    """``module`` is the tensor's key in ``Architecture.layer``."""
    order = architecture.order.get(module)
    bias = tensor.name.endswith(f"{module}.bias")
    columns = None if bias else architecture.columns.get(module)
    change = architecture.values.get(module)
    offset = architecture.norm_offset
    if offset and change is None and "norm" in tensor.name and tensor.name.endswith(".weight"):
        change = minus(offset)
    reshape = architecture.reshape.get(f"{module}.bias" if bias else module)
    if (change or reshape) and tensor.type not in FLOATS:
        raise tensor.error(expected="floats", found=tensor.type.name)
    factor = tensor.name.removesuffix("weight") + "scale"
    scaled = factor in hp and factor.split(".", 2)[-1] not in architecture.layer
    return Mapped(
        tensor,
        target,
        order(hp, tensor.shape[0]) if order else None,
        columns(hp) if columns else None,
        change,
        reshape(tensor.shape) if reshape else tensor.shape,
        hp.tensor(factor) if scaled else None,
    )


def _check_factor(gguf: GGUFFile, factor: GGUFTensor) -> None:
    """A factor must be one number, or one for each expert, of a matrix that is there."""
    matrix = gguf.tensor(factor.name.removesuffix("scale") + "weight")
    shape = matrix.shape[:1] if len(matrix.shape) == 3 else (1,)
    if factor.shape != shape or factor.type is not GGMLType.F32:
        raise factor.error(
            expected=f"{shape[0]} factors in F32", found=f"{factor.shape} in {factor.type.name}"
        )


def _target(hp: Hyperparameters, name: str, architecture: Architecture) -> tuple[str, str, str]:
    """The parameter of a tensor and its key in the row, or the reason why there is none."""
    if name in _IN_CONFIG:
        return "", "", "its values are stored in config.json (rope_scaling)"
    known, inner, local, prefix = {**ENDS, **architecture.ends}, _LAYER.fullmatch(name), name, ""
    if inner and name not in known:
        if int(inner[1]) >= hp.layers:
            return "", "", f"beyond the {hp.layers} layers that generate"
        known = {**architecture.layer, **architecture.by_layer(hp, int(inner[1]))}
        local, prefix = inner[2], f"{architecture.prefix}.{inner[1]}."
    if known.get(local):
        return prefix + known[local], local, ""
    module, _, kind = local.rpartition(".")
    if module in architecture.in_config:
        return "", "", "its values are stored in config.json"
    if "" in (known.get(local), known.get(module)):
        return "", "", "none of the layers that generate uses it"
    if kind not in ("weight", "bias") or module not in known:
        return "", "", NO_PLACE
    if kind == "bias" and not architecture.may_have_bias(module):
        return "", "", NO_PLACE
    return f"{prefix}{known[module]}.{kind}", module, ""


def _require(hp: Hyperparameters, architecture: Architecture) -> None:
    """Every layer must have the weight of every module; only the output head may be absent."""
    hp.tensor("token_embd.weight")
    if architecture.final_norm:
        hp.tensor(f"{architecture.final_norm}.weight")
    for layer in range(hp.layers):
        for module in architecture.layer:
            if module in architecture.required:
                name = f"blk.{layer}.{module}"
                hp.tensor(name if "." in module or name in hp else f"{name}.weight")
        for group in _TOGETHER:
            members = [f"blk.{layer}.{m}.weight" for m in group if m in architecture.layer]
            for name in members if any(name in hp for name in members) else ():
                hp.tensor(name)


def _zero_biases(hp: Hyperparameters, architecture: Architecture) -> list[tuple[str, int]]:
    zeros = []

    def fill(layer: int, module: str, target: str) -> None:
        if f"blk.{layer}.{module}.bias" not in hp:
            rows = hp.tensor(f"blk.{layer}.{module}.weight").shape[0]
            zeros.append((f"{architecture.prefix}.{layer}.{target}", rows))

    for group in architecture.zero_biases:
        present = any(any(hp.in_layers(f"{module}.bias")) for module in group)
        for i in range(hp.layers if present or architecture.always_biased else 0):
            for module in group:
                if f"blk.{i}.{module}.weight" in hp or module in architecture.required:
                    fill(i, module, f"{architecture.layer[module]}.bias")
    corrections = architecture.layer.get("exp_probs_b.bias")
    if corrections and hp.integer("expert_gating_func", 1) == 2:
        for i in range(hp.layers):
            router = f"blk.{i}.ffn_gate_inp.weight"
            if router in hp and f"blk.{i}.exp_probs_b.bias" not in hp:
                zeros.append(
                    (f"{architecture.prefix}.{i}.{corrections}", hp.tensor(router).shape[0])
                )
    return zeros


# ---------------------------------------------------------------------------- groups of tensors

_ONE_EXPERT = re.compile(r"(blk\.\d{1,9}\.ffn_(?:gate|up|down))\.(\d{1,6})\.(weight|bias)")
_MODULE = re.compile(r"(blk\.\d{1,9}\.)?(.+)\.(weight|bias|scale)")


def regroup(gguf: GGUFFile, architecture: Architecture) -> GGUFFile:
    """The file with the tensors of its architecture's model."""
    hp = Hyperparameters(gguf)
    tensors: dict[str, GGUFTensor] = {}
    experts: dict[str, dict[int, GGUFTensor]] = defaultdict(dict)
    for tensor in gguf.tensors:
        lone = _ONE_EXPERT.fullmatch(tensor.name)
        if lone:
            experts[f"{lone[1]}_exps.{lone[3]}"][int(lone[2])] = tensor
            continue
        inner = _MODULE.fullmatch(tensor.name)
        if inner and inner[2] in architecture.parts and inner[2] not in architecture.layer:
            split = architecture.parts[inner[2]](hp)
            layer = inner[1] or ""
            tensors |= _split(tensor, [(f"{layer}{m}.{inner[3]}", n) for m, n in split])
        else:
            tensors[tensor.name] = tensor
    for name, found in experts.items():
        tensors[name] = _stacked(gguf, name, found)
    for module, members in architecture.joins.items():
        _join(tensors, module, members)
    for name, values in architecture.made(hp).items():
        like = gguf.tensor("token_embd.weight")
        stored = values.reshape(-1).view(np.uint8)
        tensors[name] = _derived(
            like, name, values.shape, GGMLType.F32, len(stored), partial(np.asarray, stored)
        )
    if list(tensors.values()) == list(gguf.tensors):
        return gguf
    return replace(gguf, tensors=tuple(tensors.values()))


def _split(tensor: GGUFTensor, parts: Sequence[tuple[str, int | Rows]]) -> dict[str, GGUFTensor]:
    if tensor.name.endswith(".scale"):  # one factor for all parts
        return {name: replace(tensor, name=name) for name, _ in parts}
    expected = sum(rows if isinstance(rows, int) else len(rows) for _, rows in parts)
    found = tensor.shape[0]
    if not all(isinstance(rows, int) for _, rows in parts):
        found = tensor.elements // tensor.shape[-1]
    if found != expected:
        raise tensor.error(expected=f"{expected} rows", found=str(found))
    made: dict[str, GGUFTensor] = {}
    first = 0
    for name, rows in parts:
        if isinstance(rows, int):
            made[name] = tensor.rows(first, rows, name)
            first += rows
        else:
            made[name] = _gathered(tensor, rows, name)
    return made


def _gathered(tensor: GGUFTensor, rows: Rows, name: str) -> GGUFTensor:
    """Some rows of a matrix, or as many of each matrix of a stack."""
    *stack, every, columns = tensor.shape
    there = tensor.elements // columns
    shape = (*stack, len(rows) * every // there, columns)
    return _derived(
        tensor, name, shape, tensor.type, tensor.nbytes * len(rows) // there,
        lambda: tensor.raw().reshape(there, -1)[rows].reshape(-1),
    )  # fmt: skip


def _stacked(gguf: GGUFFile, name: str, found: dict[int, GGUFTensor]) -> GGUFTensor:
    count = int(gguf.key("expert_count", 0))
    if set(found) != set(range(count)):
        raise found[min(found)].error(
            expected=f"experts 0 to {count - 1}", found=f"{len(found)} of them, to {max(found)}"
        )
    members = [found[i] for i in range(count)]
    return _joined(name, members, (count, *members[0].shape))


def _join(tensors: dict[str, GGUFTensor], module: str, members: tuple[str, ...]) -> None:
    """Replace the members in each layer by their concatenation."""
    for name in [n for n in tensors if n.split(".", 2)[-1].rpartition(".")[0] == members[0]]:
        head, kind = name.split(".", 2)[:2], name.rpartition(".")[2]
        names = [".".join([*head, member, kind]) for member in members]
        whole = ".".join([*head, module, kind])
        if whole in tensors or any(n not in tensors for n in names):
            continue
        parts = [tensors.pop(n) for n in names]
        rows = sum(part.shape[0] for part in parts)
        tensors[whole] = _joined(whole, parts, (rows, *parts[0].shape[1:]))


def _joined(name: str, parts: list[GGUFTensor], shape: tuple[int, ...]) -> GGUFTensor:
    """The rows of several tensors, one after the other; floats where their types differ."""
    first = parts[0]
    stacked = len(shape) > len(first.shape)
    for part in parts[1:]:
        if part.shape != first.shape if stacked else part.shape[1:] != first.shape[1:]:
            raise part.error(expected=f"the shape of {first.name}", found=str(part.shape))
    same_type = all(part.type == first.type for part in parts)
    size = sum(part.nbytes if same_type else 4 * part.elements for part in parts)

    def make() -> npt.NDArray[np.uint8]:
        if same_type:
            return np.concatenate([part.raw() for part in parts])
        return np.concatenate([plain_floats(part).reshape(-1) for part in parts]).view(np.uint8)

    return _derived(first, name, shape, first.type if same_type else GGMLType.F32, size, make)


def _derived(
    like: GGUFTensor,
    name: str,
    shape: tuple[int, ...],
    kind: GGMLType,
    nbytes: int,
    make: Callable[[], npt.NDArray[np.uint8]],
) -> GGUFTensor:
    """``like`` is a tensor of the file for errors to point at."""
    place = (like.offset, like.path, like.entry, like._file)
    return DerivedTensor(name, shape, kind, nbytes, *place, make)


@dataclass(frozen=True, slots=True, eq=False)
class DerivedTensor(GGUFTensor):
    """A tensor of the model that is made from tensors or keys of the file."""

    make: Callable[[], npt.NDArray[np.uint8]]

    def raw(self) -> npt.NDArray[np.uint8]:
        return self.make()

    def stored_rows(self) -> npt.NDArray[np.uint8]:
        return self.raw().reshape(self.elements // self.shape[-1], -1)
