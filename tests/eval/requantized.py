"""A GGUF with its matrices in Q6_K, the most common type that MLX has no exact form for.

The quantizer is the simplest there is; shares no code with what is tested.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType


def q6_k(x: np.ndarray) -> np.ndarray:
    """Rows of floats as blocks of 256 weights; uint8 (rows, bytes)."""
    groups = x.reshape(-1, 16, 16).astype(np.float32)  # (blocks, groups, weights)
    scales = np.abs(groups).max(axis=-1) / 31
    d = (scales.max(axis=-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    steps = np.rint(scales / np.maximum(d, 1e-12)).astype(np.int8)
    units = np.maximum(d * steps, 1e-12)[..., None]
    codes = (np.clip(np.rint(groups / units), -32, 31) + 32).astype(np.uint8)
    quarters = codes.reshape(-1, 2, 4, 32)  # halves of a block, quarters of a half
    low, high = quarters & 15, quarters >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], -1)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = (ql.reshape(-1, 128), qh.reshape(-1, 64), steps.view(np.uint8), _bytes(d))
    return np.concatenate(parts, axis=1).reshape(x.shape[0], -1)


def _bytes(d: np.ndarray) -> np.ndarray:
    return d.astype(np.float16).view(np.uint8)


def requantized(source: Path, target: Path) -> Path:
    """Write a copy of a GGUF with every quantized matrix in Q6_K."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data, kind = np.asarray(tensor.data), tensor.tensor_type
        if kind != Kind.F32:
            data, kind = q6_k(gguf.quants.dequantize(data, kind)), Kind.Q6_K
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
