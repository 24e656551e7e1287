"""GGUF files written by hand, byte by byte, so that any part of one can be wrong.

Independent of the reader: it shares no table and no code with it. ``Builder.marks`` says at which
byte each part was written, which is what an error has to name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B",
    U64: "Q", I64: "q", F64: "d",
}  # fmt: skip


class Raw(bytes):
    """A value to be written as it stands, right or wrong."""


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, values: list[Any]) -> bytes:
    return struct.pack("<IQ", kind, len(values)) + b"".join(value(kind, v) for v in values)


def value(kind: int, content: Any) -> bytes:
    """``content`` as stored; an array is given as ``(kind, values)``."""
    if isinstance(content, Raw):
        return content
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        return array(*content)
    return struct.pack("<" + FORMATS[kind], content)


@dataclass
class Tensor:
    name: str | bytes
    ne: list[int]  # GGUF order: the first one is contiguous
    nbytes: int
    type: int = 0
    offset: int | None = None  # of the data, from the data section on; None: after the one before
    n_dims: int | None = None


@dataclass
class Builder:
    keys: dict[Any, tuple[int, Any]] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    alignment: int = 32
    counts: tuple[int | None, int | None] = (None, None)  # tensors, keys: claimed instead of true
    doubled: str | None = None  # a key to write twice
    marks: dict[str, int] = field(default_factory=dict)

    def set(self, key: Any, kind: int, content: Any) -> Builder:
        self.keys[key] = (kind, content)
        return self

    def drop(self, *keys: str) -> Builder:
        for key in keys:
            del self.keys[key]
        return self

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def build(self) -> bytes:
        keys = list(self.keys.items())
        if self.doubled:
            keys.append((self.doubled, self.keys[self.doubled]))
        true = len(self.tensors), len(keys)
        counts = [n if c is None else c for c, n in zip(self.counts, true, strict=True)]
        out = bytearray(b"GGUF" + struct.pack("<IQQ", self.version, *counts))
        for key, (kind, content) in keys:
            again = f"again:{key}" if f"key:{key}" in self.marks else f"key:{key}"
            self.marks[again] = len(out)
            out += string(key)
            self.marks[f"type:{key}"] = len(out)
            out += struct.pack("<I", kind)
            self.marks.setdefault(f"value:{key}", len(out))
            out += value(kind, content)
        self.marks["directory"] = len(out)
        end = 0
        for tensor in self.tensors:
            end = self._entry(out, tensor, end)
        out += bytes(-len(out) % self.alignment)
        self.marks["data"] = len(out)
        data = bytes(range(256)) * (end // 256 + 1) if end < 1 << 28 else bytes(2048)
        return bytes(out) + data

    def _entry(self, out: bytearray, tensor: Tensor, end: int) -> int:
        offset = end if tensor.offset is None else tensor.offset
        mark = "tensor" if f"tensor:{tensor.name}" not in self.marks else "second"
        self.marks[f"{mark}:{tensor.name}"] = len(out)
        out += string(tensor.name)
        self.marks[f"n_dims:{tensor.name}"] = len(out)
        out += struct.pack("<I", len(tensor.ne) if tensor.n_dims is None else tensor.n_dims)
        self.marks[f"shape:{tensor.name}"] = len(out)
        out += b"".join(struct.pack("<Q", n) for n in tensor.ne)
        self.marks[f"type:{tensor.name}"] = len(out)
        out += struct.pack("<I", tensor.type)
        self.marks[f"offset:{tensor.name}"] = len(out)
        out += struct.pack("<Q", offset)
        return max(end, -(-(offset + tensor.nbytes) // self.alignment) * self.alignment)


def llama() -> Builder:
    """A tiny llama that nothing is wrong with: 2 blocks, 4 query and 2 key-value heads."""
    b = Builder()
    b.set("general.architecture", STRING, "llama").set("general.alignment", U32, 32)
    for key, number in {
        "block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48,
        "vocab_size": 5, "attention.head_count": 4, "attention.head_count_kv": 2,
        "rope.dimension_count": 8, "expert_count": 4, "expert_used_count": 2,
    }.items():  # fmt: skip
        b.set(f"llama.{key}", U32, number)
    b.set("llama.rope.freq_base", F32, 10000.0)
    b.set("llama.rope.scaling.type", STRING, "linear").set("llama.rope.scaling.factor", F32, 2.0)
    b.set("llama.attention.layer_norm_rms_epsilon", F32, 1e-5)
    b.set("tokenizer.ggml.model", STRING, "llama")
    b.set("tokenizer.ggml.tokens", ARRAY, (STRING, ["<unk>", "<s>", "</s>", "▁a", b"\xff\xfe"]))
    b.set("tokenizer.ggml.scores", ARRAY, (F32, [0.0, 0.0, 0.0, -1.0, -2.0]))
    b.set("tokenizer.ggml.token_type", ARRAY, (I32, [2, 3, 3, 1, 6]))
    b.set("tokenizer.ggml.merges", ARRAY, (STRING, ["a b"]))
    b.set("tokenizer.ggml.bos_token_id", U32, 1).set("tokenizer.ggml.eos_token_id", U32, 2)
    b.set("tokenizer.ggml.add_bos_token", BOOL, 1)
    b.tensors = [
        Tensor("token_embd.weight", [32, 5], 5 * 34, type=8),
        Tensor("blk.0.attn_q.weight", [32, 32], 32 * 18, type=2),
        Tensor("blk.1.ffn_gate_exps.weight", [32, 3, 2], 768),
        Tensor("output_norm.weight", [32], 128),
    ]
    return b
