"""The oracle's files and skeletons: everything that llama.cpp reads or writes is accepted."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf_builder import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Builder,
    Tensor,
)  # fmt: skip

from converters.gguf.reader import GGMLType, read_gguf


def test_files_of_the_oracle(oracle: Path) -> None:
    """Every file reads, and its tensors end where the file does: so the block sizes are right."""
    paths = sorted(oracle.glob("*/*.gguf"))
    assert paths
    for path in paths:
        file = read_gguf(path)
        if file.tensors:
            end = max(tensor.offset + tensor.nbytes for tensor in file.tensors)
            assert 0 <= path.stat().st_size - end < file.alignment


def test_agrees_with_the_gguf_package(oracle: Path) -> None:
    for path in (oracle / "stories" / "stories260K.gguf", oracle / "quants" / "Q4_K_M.gguf"):
        ours, theirs = read_gguf(path), gguf.GGUFReader(path)
        for key, value in ours.metadata.items():
            expected = theirs.fields[key].contents()
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected
        assert len(ours.tensors) == len(theirs.tensors)
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            assert (a.name, a.type, a.offset) == (b.name, b.tensor_type, b.data_offset)
            assert a.shape == tuple(reversed(b.shape.tolist()))
            assert np.array_equal(a.raw(), b.data.view(np.uint8).ravel())


KINDS = {
    "UINT8": U8, "INT8": I8, "UINT16": U16, "INT16": I16, "UINT32": U32, "INT32": I32,
    "UINT64": U64, "INT64": I64, "FLOAT32": F32, "FLOAT64": F64, "BOOL": BOOL, "STRING": STRING,
}  # fmt: skip


def test_skeletons_of_every_architecture(oracle: Path, tmp_path: Path) -> None:
    """No check refuses what llama.cpp's own architecture test writes."""
    skeletons = sorted([*oracle.glob("archs/*.json"), *oracle.glob("peer/*.json")])
    assert skeletons
    for skeleton in skeletons:
        described = json.loads(skeleton.read_text())
        b = Builder()
        for key, (kind, element, content) in described["kv"].items():
            if kind == "ARRAY":
                b.set(key, ARRAY, (KINDS[element], content))
            else:
                b.set(key, KINDS[kind], content)
        for name, (shape, kind) in described["tensors"].items():
            size = np.dtype({"F32": np.float32, "F16": np.float16}[kind]).itemsize
            b.tensors.append(Tensor(name, shape[::-1], prod(shape) * size, GGMLType[kind]))
        path = tmp_path / "model.gguf"
        path.write_bytes(b.build())
        file = read_gguf(path)
        assert file.architecture == described["arch"]
        assert [[t.name, list(t.shape)] for t in file.tensors] == [
            [name, shape] for name, (shape, _) in described["tensors"].items()
        ]
