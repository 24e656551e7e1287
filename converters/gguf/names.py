"""Tensor names per architecture: from GGUF's to Hugging Face's, as tables.

Knows names and which rows a GGUF stores in another order; knows nothing of types or values. To add
an architecture, add its row to ``ARCHITECTURES``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from converters.errors import UnsupportedArchitectureError
from converters.gguf.reader import GGUFFile
from converters.gguf.tensor import GGUFTensor

# Modules outside the layers.
_ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Modules of one layer, below ``blk.N.`` and ``model.layers.N.``.
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

# Tensors whose values move into config.json.
_IN_CONFIG = {"rope_freqs.weight"}


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is spelt in Hugging Face terms.

    Attributes:
        model_type: ``model_type`` of ``config.json``.
        class_name: the entry of ``architectures`` in ``config.json``.
        layer: module names of a layer.
        permuted: modules whose rows are stored for interleaved rotary embedding.
        zero_biases: modules that get a zero bias where a sibling has one, because stock classes
            switch all of a group on together.
        always_biased: whether stock classes have those biases even where a file has none.
    """

    model_type: str
    class_name: str
    layer: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    permuted: frozenset[str] = frozenset()
    zero_biases: tuple[tuple[str, ...], ...] = ()
    always_biased: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        permuted=frozenset({"attn_q", "attn_k"}),
        zero_biases=(
            ("attn_q", "attn_k", "attn_v", "attn_output"),
            ("ffn_gate", "ffn_up", "ffn_down"),
        ),
    ),
    "qwen2": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        zero_biases=(("attn_q", "attn_k", "attn_v"),),
        always_biased=True,
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", layer=_LLAMA | _QK_NORMS),
}


@dataclass(frozen=True)
class Mapped:
    """One tensor of the file and the parameter it becomes."""

    source: GGUFTensor
    target: str
    permuted: bool


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
    if name in ARCHITECTURES:
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
        if tensor.name.endswith(".scale") or tensor.name == "output.bias":
            # To leave them out, as with other tensors without a place, would change every logit.
            raise tensor.error(
                expected="no factors on whole matrices and no bias on the output", found="one"
            )
        target, permuted, reason = _target(tensor.name, architecture, layers)
        if target:
            mapped.append(Mapped(tensor, target, permuted))
        else:
            skipped.append((tensor, reason))
    _require(gguf, architecture, layers)
    return NameMap(tuple(mapped), tuple(skipped), tuple(_zero_biases(gguf, architecture, layers)))


def _target(name: str, architecture: Architecture, layers: int) -> tuple[str, bool, str]:
    if name in _IN_CONFIG:
        return "", False, "its values are stored in config.json (rope_scaling)"
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return "", False, "the architecture has no such parameter"
    if module in _ENDS and kind == "weight":
        return f"{_ENDS[module]}.weight", False, ""
    inner = _LAYER.fullmatch(module)
    if not inner or inner[2] not in architecture.layer:
        return "", False, "the architecture has no such parameter"
    layer, module = int(inner[1]), inner[2]
    if layer >= layers:
        return "", False, f"beyond the {layers} layers of block_count (not used for generation)"
    target = f"model.layers.{layer}.{architecture.layer[module]}.{kind}"
    if kind == "bias" and not architecture.layer[module].endswith("_proj"):
        return "", False, "the architecture has no such parameter"
    return target, module in architecture.permuted, ""


def _require(gguf: GGUFFile, architecture: Architecture, layers: int) -> None:
    """Every layer must have the weight of every module; only the output head may be absent."""
    gguf.tensor("token_embd.weight")
    gguf.tensor("output_norm.weight")
    for layer in range(layers):
        for module in architecture.layer:
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
    return zeros
