"""Reading good files: every metadata type, every tensor type, data, real vocabularies."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
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
    llama,
)  # fmt: skip

from converters.errors import GGUFError
from converters.gguf.file import OpenFile
from converters.gguf.reader import BLOCKS, GGMLType, read_gguf

SCALARS: list[tuple[int, Any]] = [
    (U8, 255), (I8, -128), (U16, 65535), (I16, -32768), (U32, 2**32 - 1), (I32, -(2**31)),
    (U64, 2**64 - 1), (I64, -(2**63)), (F32, 0.5), (F64, 1e300), (BOOL, True), (BOOL, False),
]  # fmt: skip


def write(folder: Path, content: Builder | bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.build())
    return path


def test_writer_of_the_gguf_package(tmp_path: Path) -> None:
    """What the format's own package writes comes back: values, shapes, types and bytes."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("some.names", ["a", "été", ""])
    writer.add_array("some.numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.standard_normal((3, 5, 64), dtype=np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
        "d": rng.standard_normal((2, 2)),
        "i": np.arange(6, dtype=np.int64).reshape(3, 2),
    }
    for name, data in weights.items():
        writer.add_tensor(name, data)
    packed = gguf.quants.quantize(weights["a"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(path)
    assert (file.version, file.alignment, file.architecture) == (3, 32, "llama")
    assert file.path == path and file.paths == (path,)
    assert file.get("some.names") == ["a", "été", ""]
    assert file.get("some.numbers").tolist() == [1, 2, 3]
    assert [tensor.name for tensor in file.tensors] == ["a", "b", "d", "i", "q"]
    kinds = [tensor.type for tensor in file.tensors]
    assert kinds == [GGMLType.F32, GGMLType.F16, GGMLType.F64, GGMLType.I64, GGMLType.Q8_0]
    for name, data in weights.items():
        tensor = file.tensor(name)
        assert tensor.shape == data.shape and tensor.elements == data.size
        assert tensor.raw().tobytes() == data.tobytes()
    assert file.tensor("q").shape == (3, 5, 64)
    assert file.tensor("q").raw().tobytes() == packed.tobytes()


@pytest.mark.parametrize(("kind", "content"), SCALARS)
def test_scalars(tmp_path: Path, kind: int, content: Any) -> None:
    found = read_gguf(write(tmp_path, llama().set("some.key", kind, content))).get("some.key")
    assert found == content and type(found) is type(content)


@pytest.mark.parametrize(("kind", "content"), SCALARS)
def test_arrays_of_numbers(tmp_path: Path, kind: int, content: Any) -> None:
    path = write(tmp_path, llama().set("some.key", ARRAY, (kind, [content, 0, 1])))
    found = read_gguf(path).get("some.key")
    assert isinstance(found, np.ndarray) and found.tolist() == [content, 0, 1]
    assert (found.dtype == np.bool_) == (kind == BOOL)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ((STRING, []), []),
        ((STRING, ["", "x", "é"]), ["", "x", "é"]),
        ((ARRAY, []), []),
        ((ARRAY, [(STRING, ["a"]), (STRING, [])]), [["a"], []]),
        ((ARRAY, [(ARRAY, [(ARRAY, [(STRING, ["deep"])])])]), [[[["deep"]]]]),
    ],
)
def test_arrays_of_strings_and_nested(tmp_path: Path, content: Any, expected: Any) -> None:
    file = read_gguf(write(tmp_path, llama().set("some.key", ARRAY, content)))
    assert file.get("some.key") == expected


def test_empty_array_of_numbers_and_nested_numbers(tmp_path: Path) -> None:
    b = llama().set("empty", ARRAY, (F32, [])).set("nested", ARRAY, (ARRAY, [(U8, [1, 2])]))
    file = read_gguf(write(tmp_path, b))
    assert file.get("empty").shape == (0,)
    assert [part.tolist() for part in file.get("nested")] == [[1, 2]]


def test_bytes_that_are_not_utf8_survive(tmp_path: Path) -> None:
    """Tokens may be any bytes: they come back as surrogates and give the same bytes again."""
    raw = bytes(range(256))
    b = llama().set("some.text", STRING, raw)
    file = read_gguf(write(tmp_path, b))
    assert file.get("some.text").encode("utf-8", "surrogateescape") == raw
    assert file.get("tokenizer.ggml.tokens")[4].encode("utf-8", "surrogateescape") == b"\xff\xfe"
    repr(file), str(file.error("some.text", expected="text")).encode()  # printable all the same


def test_version_2_and_other_alignments(tmp_path: Path) -> None:
    b = llama().set("general.alignment", U32, 256)
    b.version, b.alignment = 2, 256
    file = read_gguf(write(tmp_path, b))
    assert (file.version, file.alignment) == (2, 256)
    assert all(tensor.offset % 256 == 0 for tensor in file.tensors)


def test_order_and_offsets_are_kept(tmp_path: Path) -> None:
    b = llama()
    content = b.build()
    file = read_gguf(write(tmp_path, content))
    assert list(file.metadata) == list(b.keys)
    assert [tensor.name for tensor in file.tensors] == [tensor.name for tensor in b.tensors]
    for key in b.keys:
        assert file.offsets[key] == b.marks[f"value:{key}"]
    assert file.metadata_end == b.marks["directory"]
    for tensor in file.tensors:
        assert tensor.entry == b.marks[f"tensor:{tensor.name}"]
        assert tensor.raw().tobytes() == content[tensor.offset : tensor.offset + tensor.nbytes]


def test_data_may_lie_in_any_order_and_with_gaps(tmp_path: Path) -> None:
    b = llama()
    for tensor, offset in zip(b.tensors, (4096, 2048, 0, 1024), strict=True):
        tensor.offset = offset
    file = read_gguf(write(tmp_path, b))
    base = b.marks["data"]
    assert [tensor.offset - base for tensor in file.tensors] == [4096, 2048, 0, 1024]


def test_access_by_name(tmp_path: Path) -> None:
    b = llama()
    file = read_gguf(write(tmp_path, b))
    assert file.key("block_count") == 2 and file.key("no.such", 7) == 7
    assert file.get("no.such.key") is None and file.get("no.such.key", 3) == 3
    assert "output_norm.weight" in file and "output.weight" not in file
    assert repr(file) == "GGUFFile('model.gguf', 'llama', 24 keys, 4 tensors, 1 file)"
    with pytest.raises(GGUFError) as caught:
        file.key("no.such")
    assert (caught.value.field, caught.value.found) == ("llama.no.such", "no such key")
    assert caught.value.offset == b.marks["directory"]
    with pytest.raises(GGUFError) as caught:
        file.tensor("output.weight")
    assert caught.value.field == "tensor output.weight"


def test_errors_to_raise_about_keys_and_tensors(tmp_path: Path) -> None:
    b = llama()
    file = read_gguf(write(tmp_path, b))
    error = file.error("llama.block_count", expected="3", hint="Do this")
    assert (error.field, error.expected, error.found) == ("llama.block_count", "3", "2")
    assert error.offset == b.marks["value:llama.block_count"] and error.hint == "Do this"
    assert file.error("tokenizer.ggml.tokens", expected="x").found == "an array of 5"
    assert file.error("bad\x1b[2Jkey", expected="x").field == r"bad\x1b[2Jkey"
    tensor = file.tensor("output_norm.weight")
    wrong = tensor.error(expected="F16", found="F32")
    assert (wrong.field, wrong.offset) == ("tensor output_norm.weight", tensor.entry)


def test_data_is_read_for_as_long_as_a_tensor_lives(tmp_path: Path) -> None:
    content = llama().build()
    path = write(tmp_path, content)
    file = read_gguf(path)
    tensor = file.tensors[0]
    path.unlink()
    del file
    gc.collect()
    whole = tensor.raw()
    assert whole.dtype == np.uint8 and whole.shape == (tensor.nbytes,)
    assert whole.tobytes() == content[tensor.offset : tensor.offset + tensor.nbytes]


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_files_are_closed_with_their_last_tensor(tmp_path: Path) -> None:
    before = open_files()
    file = read_gguf(write(tmp_path, llama()))
    tensor = file.tensors[0]
    del file
    gc.collect()
    assert open_files() == before + 1 and tensor.raw().size
    del tensor
    gc.collect()
    assert open_files() == before


def test_rows_are_read_as_slices_ask_for_them(tmp_path: Path) -> None:
    b = llama()
    b.tensors.append(Tensor("t", [64, 5, 3], 15 * 36, type=GGMLType.Q4_0.value))
    tensor = read_gguf(write(tmp_path, b)).tensor("t")
    rows, whole = tensor.stored_rows(), tensor.raw().reshape(15, 36)
    assert len(rows) == 15
    for part in (slice(0, 4), slice(14, 99), slice(15, 15), slice(None)):
        np.testing.assert_array_equal(rows[part], whole[part])


def test_a_header_of_more_than_one_read(tmp_path: Path) -> None:
    texts = [f"token {'x' * (n % 300)} {n}" for n in range(30_000)]
    b = Builder().set("general.architecture", STRING, "any")
    b.set("a.numbers", ARRAY, (I32, list(range(400_000))))
    b.set("tokenizer.ggml.tokens", ARRAY, (STRING, texts))
    b.set("a.text", STRING, "y" * 3_000_000)
    file = read_gguf(write(tmp_path, b))
    assert file.get("tokenizer.ggml.tokens") == texts
    assert file.get("a.text") == "y" * 3_000_000
    assert file.get("a.numbers").tolist() == list(range(400_000))


def test_a_file_that_is_cut_while_its_tensors_are_read(tmp_path: Path) -> None:
    """Of a map of it, the system would kill the process."""
    path = write(tmp_path, llama())
    tensor = read_gguf(path).tensors[-1]
    os.truncate(path, tensor.offset + 3)
    for read in (tensor.raw, lambda: tensor.stored_rows()[0:1]):
        with pytest.raises(
            GGUFError, match=r"found the end of the file at byte \d+.*cut short since"
        ):
            read()


def test_a_file_that_is_cut_while_its_header_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = Builder().set("general.architecture", STRING, "any")
    b.set("tokenizer.ggml.tokens", ARRAY, (STRING, ["x" * 1000] * 3000))
    path = write(tmp_path, b)
    real, reads = OpenFile.read_into, []

    def cut(self: OpenFile, buffer: memoryview, offset: int) -> int:
        reads.append(offset)
        if len(reads) == 2:
            os.truncate(path, offset + 100)
        return real(self, buffer, offset)

    monkeypatch.setattr(OpenFile, "read_into", cut)
    with pytest.raises(
        GGUFError, match=r"expected a file of \d+ bytes, found the end .* cut short"
    ):
        read_gguf(path)


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, llama())
    tensor = read_gguf(path).tensors[0]

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(GGUFError, match="expected data that can be read, found Input/output error"):
        tensor.raw()
    with pytest.raises(GGUFError, match="expected data that can be read, found Input/output error"):
        read_gguf(path)


def test_type_table() -> None:
    """Ids and blocks agree with the gguf package where it is right; ggml's Q8_1 is 36 bytes."""
    assert BLOCKS.keys() == set(GGMLType)
    for kind in gguf.GGMLQuantizationType:
        assert GGMLType[kind.name] == kind.value
        if kind.name != "Q8_1":
            assert BLOCKS[GGMLType[kind.name]] == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("kind", list(GGMLType))
def test_every_tensor_type(tmp_path: Path, kind: GGMLType) -> None:
    block, size = BLOCKS[kind]
    b = llama()
    b.tensors.append(Tensor("t", [2 * block, 3], 6 * size, type=kind.value))
    tensor = read_gguf(write(tmp_path, b)).tensor("t")
    assert (tensor.type, tensor.shape, tensor.nbytes) == (kind, (3, 2 * block), 6 * size)


def test_vocabulary_without_tensors(tmp_path: Path) -> None:
    b = Builder().set("general.architecture", STRING, "any")
    b.set("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b"]))
    file = read_gguf(str(write(tmp_path, b)))
    assert file.tensors == () and file.get("tokenizer.ggml.tokens") == ["a", "b"]


def test_imports_neither_mlx_nor_gguf() -> None:
    code = "import sys, converters.gguf.reader; print({'mlx', 'gguf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
