"""Tiny random models as GGUF files, in as many shapes as real ones have, and random blocks.

Shares no code with the tested modules: files are written by the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType

# Where each type keeps its float16 scales, in bytes from the start of a block.
HALF_SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "Q1_0": (0,), "Q2_0": (0,),
}  # fmt: skip


def random_blocks(
    kind: str, count: int, size: int, rng: np.random.Generator, scale: float | None = None
) -> np.ndarray:
    """``count`` blocks of ``size`` random bytes whose scales are finite; uint8 (count, size).

    ``scale``: the magnitude of the scales; any finite float16 if not given.
    """
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for start in HALF_SCALES.get(kind, ()):
        if scale is None:
            bits = rng.integers(0, 1 << 16, count, dtype=np.uint16)
            bits[(bits & 0x7C00) == 0x7C00] &= 0xBFFF  # neither infinite nor not-a-number
        else:
            bits = (scale * rng.uniform(0.5, 1.5, count)).astype(np.float16).view(np.uint16)
        blocks[:, start : start + 2] = bits[:, None].view(np.uint8)
    if kind == "IQ1_M":  # a float16 in the top nibbles of four words
        value = rng.integers(0, 1 << 16, count, dtype=np.uint16) & np.uint16(0xBFFF)
        if scale is not None:
            value = (scale * rng.uniform(0.5, 1.5, count)).astype(np.float16).view(np.uint16)
        for word in range(4):
            high = 48 + 2 * word + 1
            nibble = (value >> (4 * word) & 15).astype(np.uint8)
            blocks[:, high] = (blocks[:, high] & 0x0F) | nibble << 4
    if kind == "MXFP4":
        near = round(np.log2(scale)) + 127 if scale else 0
        low, high = (near - 1, near + 2) if scale else (0, 255)
        blocks[:, 0] = rng.integers(low, high, count)
    if kind == "NVFP4":
        low, high = (48, 64) if scale else (0, 127)  # E4M3 around one, or any finite one
        blocks[:, :4] = rng.integers(low, high, (count, 4))
    return blocks


@dataclass
class Tiny:
    """A model to write. ``kinds`` gives GGML types by tensor name (else by ``"*"``, else F32).

    Attributes:
        keys: metadata of the architecture to add, or to leave out where the value is None.
        biases: modules that have one, for each layer.
        drop: tensors to leave out.
        weights: values to use instead of random ones.
        template: the chat template.
        general: more metadata, under whole keys.
    """

    arch: str = "llama"
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    layers: int = 2
    ffn: int = 96
    vocab: int = 288
    tied: bool = False
    biases: tuple[str, ...] = ()
    bias_layers: tuple[int, ...] | None = None
    rope_freqs: np.ndarray | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    raw: Mapping[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    template: str | None = None
    general: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, dim = self.hidden, self.width
        query, key = self.heads * dim, self.kv_heads * dim
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, hidden)}
        layer = {
            "attn_q": (query, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden),
            "attn_output": (hidden, query), "ffn_gate": (self.ffn, hidden),
            "ffn_up": (self.ffn, hidden), "ffn_down": (hidden, self.ffn),
        }  # fmt: skip
        for i in range(self.layers):
            for name, shape in layer.items():
                shapes[f"blk.{i}.{name}.weight"] = shape
                if name in self.biases and (self.bias_layers is None or i in self.bias_layers):
                    shapes[f"blk.{i}.{name}.bias"] = shape[:1]
            for name in ("attn_norm", "ffn_norm"):
                shapes[f"blk.{i}.{name}.weight"] = (hidden,)
            if self.arch == "qwen3":
                for name in ("attn_q_norm", "attn_k_norm"):
                    shapes[f"blk.{i}.{name}.weight"] = (dim,)
        shapes["output_norm.weight"] = (hidden,)
        if not self.tied:
            shapes["output.weight"] = (self.vocab, hidden)
        if self.rope_freqs is not None:
            shapes["rope_freqs.weight"] = (dim // 2,)
        return {name: shape for name, shape in shapes.items() if name not in self.drop}

    def values(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Seeded float32 weights of one tensor."""
        if name in self.weights:
            return self.weights[name].astype(np.float32)
        if name == "rope_freqs.weight":
            assert self.rope_freqs is not None
            return self.rope_freqs.astype(np.float32)
        rng = np.random.default_rng([self.seed, *name.encode()])
        x = rng.standard_normal(shape, dtype=np.float32)
        if "norm" in name:
            return 1 + np.float32(0.1) * x
        if len(shape) == 1:
            return np.float32(0.3) * x
        scale = 0.5 if name == "token_embd.weight" else shape[-1] ** -0.5
        return np.float32(scale) * x

    def stored(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, Kind]:
        """One tensor of the file: an array of floats or of blocks."""
        if name in self.raw:
            kind, blocks = self.raw[name]
            return blocks.reshape(shape[0], -1), Kind[kind]
        kind = self.kinds.get(name, self.kinds.get("*", "F32") if len(shape) > 1 else "F32")
        if kind in _RANDOM_ONLY:
            elements, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
            rng = np.random.default_rng([self.seed, *name.encode()])
            count = int(np.prod(shape)) // elements
            blocks = random_blocks(kind, count, size, rng, _RANDOM_ONLY[kind] * shape[-1] ** -0.5)
            return blocks.reshape(shape[0], -1), Kind[kind]
        return gguf.quants.quantize(self.values(name, shape), Kind[kind]), Kind[kind]

    def write(self, path: Path, *, expand: bool = False) -> Path:
        """Write the file; ``expand`` stores the blocks dequantized to float32."""
        w = gguf.GGUFWriter(path, self.arch)
        for key, value in self.metadata().items():
            _add(w, f"{self.arch}.{key}", value)
        for key, value in self.general.items():
            _add(w, key, value)
        _add_vocabulary(w, self.vocab)
        if self.template:
            w.add_chat_template(self.template)
        for name, shape in self.shapes().items():
            data, kind = self.stored(name, shape)
            if expand:
                data, kind = gguf.quants.dequantize(data, kind), Kind.F32
            w.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return path

    def metadata(self) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "context_length": 2048, "embedding_length": self.hidden, "block_count": self.layers,
            "feed_forward_length": self.ffn, "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads, "vocab_size": self.vocab,
            "rope.dimension_count": self.width, "rope.freq_base": 10000.0,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }  # fmt: skip
        if self.head_dim:
            keys |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        return {key: v for key, v in (keys | dict(self.keys)).items() if v is not None}


# Types that the gguf package cannot quantize to: scales that give weights of about one.
_RANDOM_ONLY = {
    "Q2_K": 0.05, "Q3_K": 0.02, "Q4_K": 0.005, "Q5_K": 0.0025, "Q6_K": 0.001, "IQ4_XS": 0.0008,
    "IQ2_XXS": 0.02, "IQ2_XS": 0.02, "IQ2_S": 0.02, "IQ3_XXS": 0.01, "IQ3_S": 0.01, "IQ1_S": 0.1,
    "IQ1_M": 0.1, "IQ4_NL": 0.015, "Q1_0": 1.0, "Q2_0": 1.0, "MXFP4": 0.4, "NVFP4": 0.4,
}  # fmt: skip


def _add(w: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        w.add_bool(key, value)
    elif isinstance(value, int):
        w.add_uint32(key, value)
    elif isinstance(value, float):
        w.add_float32(key, value)
    elif isinstance(value, str):
        w.add_string(key, value)
    else:
        w.add_array(key, value)


def _add_vocabulary(w: gguf.GGUFWriter, size: int) -> None:
    """A sentencepiece vocabulary: three control tokens, all bytes, then pieces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁etaoinshrdlcumwfgypbvkjxqz", *(f"piece{i}" for i in range(size))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * size]
    w.add_string("tokenizer.ggml.model", "llama")
    w.add_string("tokenizer.ggml.pre", "default")
    w.add_array("tokenizer.ggml.tokens", pieces[:size])
    w.add_array("tokenizer.ggml.scores", [-float(i) for i in range(size)])
    w.add_array("tokenizer.ggml.token_type", kinds[:size])
    w.add_uint32("tokenizer.ggml.bos_token_id", 1)
    w.add_uint32("tokenizer.ggml.eos_token_id", 2)


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean square difference relative to the mean square of ``b``."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(((a - b) ** 2).mean() / (b**2).mean())


def split(source: Path, stem: Path, shards: int) -> None:
    """Split a file as llama.cpp's tool does: metadata in the first, tensors in turn."""
    reader = gguf.GGUFReader(source)
    tensors = list(reader.tensors)
    for number in range(shards):
        w = gguf.GGUFWriter(f"{stem}-{number + 1:05}-of-{shards:05}.gguf", "llama")
        w.add_uint16("split.no", number)
        w.add_uint16("split.count", shards)
        w.add_int32("split.tensors.count", len(tensors))
        for entry in reader.fields.values() if number == 0 else ():
            if entry.name.startswith("GGUF.") or entry.name == "general.architecture":
                continue
            sub = entry.types[1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            w.add_key_value(entry.name, entry.contents(), entry.types[0], sub)
        for tensor in tensors[number::shards]:
            w.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
