"""llama.cpp's LoRA adapters, with the names and row orders of the Hugging Face model.

Format: llama.cpp's ``convert_lora_to_gguf.py`` and ``llama-adapter.cpp``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.architectures.base import Architecture
from converters.architectures.hyperparameters import Hyperparameters
from converters.architectures.mapping import ARCHITECTURES
from converters.architectures.names import ENDS, LLAMA
from converters.errors import AdapterError, shortened
from converters.gguf.file import GGUFTensor
from converters.gguf.reader import GGUFFile, read_gguf
from converters.quantize.encode import plain_floats, supported

Floats = npt.NDArray[np.float32]

_INNER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)")
_PAIR = re.compile(r"(.+)\.weight\.lora_([ab])")
# Modules that a row lacks, as its files have them fused or split.
_USUAL = {**LLAMA, "attn_qkv": "self_attn.qkv_proj"}
# Architectures for these model types, in addition to the rows' own.
_ALSO = {"mistral": "llama", "mixtral": "llama", "olmo3": "olmo2"}


@dataclass(frozen=True)
class Pair:
    """The factors of an update of one matrix: ``scale * b @ a``.

    Attributes:
        source: name of the adapted tensor in GGUF's terms.
        a: (..., rank, columns).
        b: (..., rows, rank), rows in the model's order.
    """

    source: str
    a: Floats | None
    b: Floats | None
    scale: float


@dataclass(frozen=True)
class GGUFAdapter:
    """An adapter in the names of the Hugging Face model.

    Attributes:
        pairs: by module, e.g. ``model.layers.0.self_attn.q_proj``.
        norms: whole new weights of norms, by parameter.
    """

    pairs: Mapping[str, Pair]
    norms: Mapping[str, Floats]


def read_adapter(path: Path, config: Mapping[str, Any]) -> GGUFAdapter:
    """Read an adapter for a model.

    Args:
        path: a GGUF with ``general.type = adapter`` and ``adapter.type = lora``.
        config: the model's ``config.json`` in Hugging Face terms.

    Raises:
        GGUFError: the file is malformed.
        AdapterError: it is no such adapter, or one for another architecture.
    """
    gguf = read_gguf(path)
    architecture = _architecture(gguf, config)
    gguf = gguf.with_keys(_keys(config))
    halves: dict[str, dict[str, GGUFTensor]] = defaultdict(dict)
    norms = {}
    for tensor in gguf.tensors:
        if not supported(tensor.type):
            raise tensor.error(expected="numbers", found=tensor.type.name)
        found = _PAIR.fullmatch(tensor.name)
        if found:
            halves[found[1]][found[2]] = tensor
        elif tensor.name.endswith("norm.weight"):
            module, _ = _module(gguf, tensor.name.removesuffix(".weight"), architecture)
            offset = np.float32(architecture.norm_offset)
            norms[f"{module}.weight"] = _floats(tensor) - offset
        else:
            raise AdapterError(
                f"{path.name}: tensor {shortened(tensor.name, 100)} is neither lora_a nor lora_b"
            )
    alpha = _alpha(gguf)
    pairs = {}
    for name, half in halves.items():
        module, key = _module(gguf, name, architecture)
        pairs[module] = _pair(gguf, architecture, name, key, half, alpha)
    if not pairs:
        raise AdapterError(f"{path.name} has no tensors of an adapter")
    return GGUFAdapter(pairs, norms)


def _architecture(gguf: GGUFFile, config: Mapping[str, Any]) -> Architecture:
    """The row of the adapter's architecture; AdapterError unless it is the model's."""
    kind, name = gguf.get("general.type"), gguf.path.name
    if kind != "adapter":
        raise AdapterError(
            f"{name} is no adapter: its general.type is {shortened(repr(kind), 60)}",
            hint="Give a LoRA adapter in llama.cpp's format",
        )
    method = gguf.get("adapter.type")
    if method != "lora":
        raise AdapterError(f"{name}: adapter.type is {shortened(repr(method), 60)}, not lora")
    if gguf.get("adapter.alora.invocation_tokens") is not None:
        raise AdapterError(
            f"{name} is an activated adapter (aLoRA), which only applies after certain tokens",
            hint="Only adapters that apply to the whole text are known here",
        )
    model = str(config.get("model_type"))
    fitting = {a for a, row in ARCHITECTURES.items() if row.model_type == model}
    fitting |= {_ALSO[model]} if model in _ALSO else set()
    if gguf.architecture not in fitting:
        expected = " or ".join(sorted(fitting)) or f"one that becomes {model}"
        raise AdapterError(
            f"{name} was made for architecture {shortened(gguf.architecture, 60)!r}, "
            f"the model's is {expected}",
            hint="Use an adapter that was made for this very model",
        )
    return ARCHITECTURES["mixtral" if model == "mixtral" else gguf.architecture]


def _keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that row orders depend on, which an adapter's file lacks."""
    heads = config["num_attention_heads"]
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
        "embedding_length": config["hidden_size"],
    }


def _alpha(gguf: GGUFFile) -> float:
    alpha = gguf.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise gguf.error("adapter.lora.alpha", expected="a finite number")
    return float(alpha)


def _module(gguf: GGUFFile, name: str, architecture: Architecture) -> tuple[str, str]:
    """A module's name in the model, and its key in the architecture's row."""
    inner, ends = _INNER.fullmatch(name), {**ENDS, **architecture.ends}
    # With row orders, only the row's own names are known.
    known = dict(architecture.layer) if architecture.order else _USUAL | dict(architecture.layer)
    if inner and inner[2] in known:
        return f"{architecture.prefix}.{inner[1]}.{known[inner[2]]}", inner[2]
    if name in ends:
        return ends[name], name
    raise AdapterError(
        f"{gguf.path.name}: {shortened(name, 100)} is no matrix of a {gguf.architecture} model",
        hint="Use an adapter that was made for this very model",
    )


def _pair(
    gguf: GGUFFile,
    architecture: Architecture,
    name: str,
    key: str,
    half: Mapping[str, GGUFTensor],
    alpha: float,
) -> Pair:
    a, b = (_floats(half[part]) if part in half else None for part in "ab")
    if a is None or b is None:
        return Pair(name, a, b, 1.0)
    # An alpha of zero stands for none (llama.cpp's get_scale).
    scale = alpha / b.shape[-1] if alpha else 1.0
    if key == "token_embd":  # stored for looking up rows: (vocabulary, rank), (columns, rank)
        return Pair(name, np.ascontiguousarray(b.swapaxes(-1, -2)), a, scale)
    if key in architecture.order:
        width = gguf.key("attention.key_length")
        if b.ndim != 2 or b.shape[0] % width:
            raise half["b"].error(expected=f"rows for heads of {width}", found=str(b.shape[0]))
        b = b[architecture.order[key](Hyperparameters(gguf), b.shape[0])]
    return Pair(name, a, b, scale)


def _floats(tensor: GGUFTensor) -> Floats:
    return plain_floats(tensor).reshape(tensor.shape)
