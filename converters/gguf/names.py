"""Tensors of a GGUF file to parameters of its Hugging Face model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import numpy as np
import numpy.typing as npt

from converters.architectures import ARCHITECTURES, ENDS, Architecture
from converters.architectures.base import GATED, MOE, SHARED_EXPERTS
from converters.errors import UnsupportedArchitectureError
from converters.gguf.file import GGUFTensor
from converters.gguf.reader import GGUFFile
from converters.gguf.regroup import regroup
from converters.gguf.types import GGMLType
from converters.gguf.validate import layer_count, scalar
from converters.quantize.encode import Change
from converters.quantize.policy import FLOATS

# Tensors whose values move into config.json.
_IN_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
# Modules that are in a layer together or not at all.
_TOGETHER = (GATED, MOE, SHARED_EXPERTS)
# Dense architectures, when they have experts.
_WITH_EXPERTS = {"granite": "granitemoe", "llama": "mixtral", "mistral3": "mixtral"}
NO_PLACE = "the architecture has no such parameter"


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
    order: npt.NDArray[np.intp] | None
    columns: npt.NDArray[np.intp] | None
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


def architecture_of(gguf: GGUFFile) -> Architecture:
    """The table row of a file's architecture, or UnsupportedArchitectureError."""
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


# Numbers without leading zeros, so that no two tensors are one parameter.
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)")


def map_names(gguf: GGUFFile) -> NameMap:
    """Map every tensor of a file to a parameter of its Hugging Face model.

    Raises:
        UnsupportedArchitectureError: the architecture is unknown.
        GGUFError: a tensor that every model of this architecture needs is missing.
    """
    architecture = architecture_of(gguf)
    return map_tensors(regroup(gguf, architecture), architecture)


def map_tensors(gguf: GGUFFile, architecture: Architecture) -> NameMap:
    """As :func:`map_names`, of a file whose tensors are regrouped already."""
    layers = layer_count(gguf)
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
        target, module, reason = _target(gguf, tensor.name, architecture, layers)
        if target:
            mapped.append(_mapped(gguf, architecture, tensor, target, module))
        else:
            skipped.append((tensor, reason))
    _require(gguf, architecture, layers)
    return NameMap(tuple(mapped), tuple(skipped), tuple(_zero_biases(gguf, architecture, layers)))


def _mapped(
    gguf: GGUFFile, architecture: Architecture, tensor: GGUFTensor, target: str, module: str
) -> Mapped:
    """``module`` is the tensor's key in ``Architecture.layer``."""
    order = architecture.order.get(module)
    bias = tensor.name.endswith(f"{module}.bias")
    columns = None if bias else architecture.columns.get(module)
    change = architecture.values.get(module)
    offset = architecture.norm_offset
    if offset and change is None and "norm" in tensor.name and tensor.name.endswith(".weight"):
        change = partial(_less, np.float32(offset))
    reshape = architecture.reshape.get(f"{module}.bias" if bias else module)
    if (change or reshape) and tensor.type not in FLOATS:
        raise tensor.error(expected="floats", found=tensor.type.name)
    factor = tensor.name.removesuffix("weight") + "scale"
    scaled = factor in gguf and factor.split(".", 2)[-1] not in architecture.layer
    return Mapped(
        tensor,
        target,
        order(gguf, tensor.shape[0]) if order else None,
        columns(gguf) if columns else None,
        change,
        reshape(tensor.shape) if reshape else tensor.shape,
        gguf.tensor(factor) if scaled else None,
    )


def _check_factor(gguf: GGUFFile, factor: GGUFTensor) -> None:
    """A factor must be one number, or one for each expert, of a matrix that is there."""
    matrix = gguf.tensor(factor.name.removesuffix("scale") + "weight")
    wanted = matrix.shape[:1] if len(matrix.shape) == 3 else (1,)
    if factor.shape != wanted or factor.type is not GGMLType.F32:
        raise factor.error(
            expected=f"{wanted[0]} factors in F32", found=f"{factor.shape} in {factor.type.name}"
        )


def _less(offset: np.float32, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return x - offset


def _target(
    gguf: GGUFFile, name: str, architecture: Architecture, layers: int
) -> tuple[str, str, str]:
    """The parameter of a tensor and its key in the row, or the reason why there is none."""
    if name in _IN_CONFIG:
        return "", "", "its values are stored in config.json (rope_scaling)"
    ends = {**ENDS, **architecture.ends}
    if name in ends:
        return ends[name], name, ""
    inner = _LAYER.fullmatch(name)
    if inner and int(inner[1]) >= layers:
        return "", "", f"beyond the {layers} layers that generate"
    known = ends
    if inner:
        known = {**architecture.layer, **architecture.by_layer(gguf, int(inner[1]))}
        if known.get(inner[2]):
            return f"{architecture.prefix}.{inner[1]}.{known[inner[2]]}", inner[2], ""
    module, _, kind = (inner[2] if inner else name).rpartition(".")
    if module in architecture.in_config:
        return "", "", "its values are stored in config.json"
    if "" in (known.get(name.split(".", 2)[-1]), known.get(module)):
        return "", "", "none of the layers that generate uses it"
    if kind not in ("weight", "bias") or module not in known:
        return "", "", NO_PLACE
    if kind == "bias" and not architecture.may_have_bias(module):
        return "", "", NO_PLACE
    place = f"{architecture.prefix}.{inner[1]}.{known[module]}" if inner else known[module]
    return f"{place}.{kind}", module, ""


def _require(gguf: GGUFFile, architecture: Architecture, layers: int) -> None:
    """Every layer must have the weight of every module; only the output head may be absent."""
    gguf.tensor("token_embd.weight")
    if architecture.final_norm:
        gguf.tensor(f"{architecture.final_norm}.weight")
    for layer in range(layers):
        for module in architecture.layer:
            if module in architecture.required:
                name = f"blk.{layer}.{module}"
                gguf.tensor(name if "." in module or name in gguf else f"{name}.weight")
        for group in _TOGETHER:
            members = [f"blk.{layer}.{m}.weight" for m in group if m in architecture.layer]
            for name in members if any(name in gguf for name in members) else ():
                gguf.tensor(name)


def _zero_biases(gguf: GGUFFile, architecture: Architecture, layers: int) -> list[tuple[str, int]]:
    zeros = []
    for group in architecture.zero_biases:
        present = architecture.always_biased or any(
            f"blk.{i}.{m}.bias" in gguf for i in range(layers) for m in group
        )
        for i in range(layers if present else 0):
            for module in group:
                absent = f"blk.{i}.{module}.weight" not in gguf
                if absent and module not in architecture.required:
                    continue
                if f"blk.{i}.{module}.bias" not in gguf:
                    rows = gguf.tensor(f"blk.{i}.{module}.weight").shape[0]
                    zeros.append(
                        (f"{architecture.prefix}.{i}.{architecture.layer[module]}.bias", rows)
                    )
    corrections = architecture.layer.get("exp_probs_b.bias")
    if corrections and scalar(gguf, "expert_gating_func", 1) == 2:
        for i in range(layers):
            name = f"blk.{i}.ffn_gate_inp.weight"
            if name in gguf and f"blk.{i}.exp_probs_b.bias" not in gguf:
                target = f"{architecture.prefix}.{i}.{corrections}"
                zeros.append((target, gguf.tensor(name).shape[0]))
    return zeros
