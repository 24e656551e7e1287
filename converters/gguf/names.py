"""From the tensors of a file to the parameters of its Hugging Face model.

Knows names and which rows a GGUF stores in another order; knows nothing of types or values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from converters.errors import UnsupportedArchitectureError
from converters.gguf.architectures import ARCHITECTURES, ENDS, Architecture
from converters.gguf.reader import GGUFFile
from converters.gguf.tensor import GGUFTensor

# Parameters that are not called weight or bias in the model.
_WHOLE_NAMES = ("attn_sinks.weight", "exp_probs_b.bias")

# Tensors whose values move into config.json.
_IN_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_PERMUTED = ("attn_q", "attn_k")
NO_PLACE = "the architecture has no such parameter"


@dataclass(frozen=True)
class Mapped:
    """One tensor of the file and the parameter it becomes.

    Attributes:
        permuted: rows are to be reordered for rotating halves.
        subtract: what GGUF has added to every element.
    """

    source: GGUFTensor
    target: str
    permuted: bool
    subtract: float = 0.0

    @property
    def as_row(self) -> bool:
        """Whether a vector becomes a matrix of one row."""
        return self.target.endswith("shared_expert_gate.weight")


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
    """The table row of a file's architecture.

    Raises:
        UnsupportedArchitectureError: nothing here knows it; the message names the nearest known.
    """
    name = gguf.architecture
    if name == "llama" and gguf.key("expert_count", 0):
        name = "mixtral"
    if name in ARCHITECTURES and not (gguf.architecture == name == "mixtral"):
        return ARCHITECTURES[name]
    near = get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.5)
    nearest = f"; the nearest known one is {near[0]}" if near else ""
    raise UnsupportedArchitectureError(
        f"{gguf.path.name}: architecture {name!r} is not supported{nearest}",
        hint=f"Supported: {', '.join(sorted(ARCHITECTURES))}",
    )


# One spelling for each layer: two of them would be two tensors for one parameter.
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)")


def map_names(gguf: GGUFFile) -> NameMap:
    """Map every tensor of a file to a parameter of its Hugging Face model.

    Raises:
        UnsupportedArchitectureError: the architecture is unknown.
        GGUFError: a tensor that every model of this architecture needs is missing.
    """
    architecture = architecture_of(gguf)
    layers = int(gguf.key("block_count"))
    mapped: list[Mapped] = []
    skipped: list[tuple[GGUFTensor, str]] = []
    for tensor in gguf.tensors:
        headless = tensor.name == "output.bias" and not architecture.head_bias
        if tensor.name.endswith(".scale") or headless:
            # To leave them out, as with other tensors without a place, would change every logit.
            raise tensor.error(
                expected="no factors on whole matrices and no bias on the output", found="one"
            )
        target, permuted, reason = _target(tensor.name, architecture, layers)
        if target:
            norm = "norm" in tensor.name and tensor.name.endswith(".weight")
            subtract = architecture.norm_offset if norm else 0.0
            mapped.append(Mapped(tensor, target, permuted, subtract))
        else:
            skipped.append((tensor, reason))
    _require(gguf, architecture, layers)
    return NameMap(tuple(mapped), tuple(skipped), tuple(_zero_biases(gguf, architecture, layers)))


def _target(name: str, architecture: Architecture, layers: int) -> tuple[str, bool, str]:
    if name in _IN_CONFIG:
        return "", False, "its values are stored in config.json (rope_scaling)"
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return "", False, NO_PLACE
    ends = {**ENDS, **architecture.ends}
    if module in ends:
        if kind == "bias" and not architecture.may_have_bias(module):
            return "", False, NO_PLACE
        return f"{ends[module]}.{kind}", False, ""
    inner = _LAYER.fullmatch(module)
    if not inner:
        return "", False, NO_PLACE
    layer, module = int(inner[1]), inner[2]
    if layer >= layers:
        return "", False, f"beyond the {layers} layers of block_count (not used for generation)"
    if f"{module}.{kind}" in _WHOLE_NAMES and module in architecture.layer:
        return f"model.layers.{layer}.{architecture.layer[module]}", False, ""
    if module not in architecture.layer:
        return "", False, NO_PLACE
    target = f"model.layers.{layer}.{architecture.layer[module]}.{kind}"
    if kind == "bias" and not architecture.may_have_bias(module):
        return "", False, NO_PLACE
    return target, architecture.permuted and module in _PERMUTED, ""


def _require(gguf: GGUFFile, architecture: Architecture, layers: int) -> None:
    """Every layer must have the weight of every module; only the output head may be absent."""
    gguf.tensor("token_embd.weight")
    gguf.tensor("output_norm.weight")
    for layer in range(layers):
        for module in architecture.layer:
            if module not in architecture.optional:
                gguf.tensor(f"blk.{layer}.{module}.weight")


def _zero_biases(gguf: GGUFFile, architecture: Architecture, layers: int) -> list[tuple[str, int]]:
    zeros = []
    for group in architecture.zero_biases:
        present = architecture.always_biased or any(
            f"blk.{i}.{m}.bias" in gguf for i in range(layers) for m in group
        )
        for i in range(layers if present else 0):
            for module in group:
                if f"blk.{i}.{module}.bias" not in gguf:
                    rows = gguf.tensor(f"blk.{i}.{module}.weight").shape[0]
                    zeros.append((f"model.layers.{i}.{architecture.layer[module]}.bias", rows))
    if "exp_probs_b" in architecture.layer and gguf.key("expert_gating_func", 1) == 2:
        for i in range(layers):
            name = f"blk.{i}.ffn_gate_inp.weight"
            if name in gguf and f"blk.{i}.exp_probs_b.bias" not in gguf:
                target = f"model.layers.{i}.{architecture.layer['exp_probs_b']}"
                zeros.append((target, gguf.tensor(name).shape[0]))
    return zeros
