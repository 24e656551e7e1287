"""Malformed containers: each gives one GGUFError that names the field, the byte and both values."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_builder import (
    ARRAY,
    BOOL,
    STRING,
    U8,
    U32,
    U64,
    Builder,
    Raw,
    llama,
    string,
)  # fmt: skip

from converters.errors import GGUFError
from converters.gguf.reader import read_gguf

Q = "blk.0.attn_q.weight"


def refused(path: Path) -> GGUFError:
    with pytest.raises(GGUFError) as caught:
        read_gguf(path)
    error = caught.value
    assert str(error).startswith(f"{path.name}: {error.field} at byte {error.offset}: expected ")
    assert error.expected and error.found and "\n" not in str(error)
    return error


def raw_array(kind: int, count: int, body: bytes = b"") -> Raw:
    return Raw(struct.pack("<IQ", kind, count) + body)


def nested(depth: int) -> Raw:
    return Raw(raw_array(ARRAY, 1) * depth + raw_array(U8, 0))


def change(which: str = Q, /, **values: object) -> Callable[[Builder], None]:
    def apply(b: Builder) -> None:
        tensor = b.tensor(which)
        for key, value in values.items():
            setattr(tensor, key, value)

    return apply


def extra(kind: int, content: object) -> Callable[[Builder], None]:
    return lambda b: b.set("some.key", kind, content) and None


def key(name: str | bytes) -> Callable[[Builder], None]:
    return lambda b: b.set(name, U32, 0) and None


def counts(tensors: int | None, keys: int | None) -> Callable[[Builder], None]:
    return lambda b: setattr(b, "counts", (tensors, keys))


def version(number: int) -> Callable[[Builder], None]:
    return lambda b: setattr(b, "version", number)


def alignment(kind: int, content: object) -> Callable[[Builder], None]:
    return lambda b: b.set("general.alignment", kind, content) and None


#: What is wrong -> (how to make it so, field, where (a mark or a byte), expected, found).
CASES: dict[str, tuple[Callable[[Builder], object], str, str | int, str, str]] = {
    "version 0": (version(0), "version", 4, "GGUF version 2 or 3", "version 0"),
    "version 1": (version(1), "version", 4, "GGUF version 2 or 3", "too old"),
    "version 4": (version(4), "version", 4, "GGUF version 2 or 3", "version 4"),
    "big-endian": (version(3 << 24), "version", 4, "version 2", "big-endian file of version 3"),
    "tensor count": (counts(2**64 - 1, None), "tensor_count", 8, "at most 65536", str(2**64 - 1)),
    "tensor count beyond the file": (counts(60_000, None), "tensor_count", 8, "room", "60000"),
    "key count": (counts(None, 2**63), "metadata_kv_count", 16, "at most 65536", str(2**63)),
    "key count beyond the file": (counts(None, 60_000), "metadata_kv_count", 16, "room", "60000"),
    "empty key": (key(""), "metadata[24].key", "key:", "a length of 1 to 65535 bytes", "0"),
    "long key": (key("k" * 70_000), "metadata[24].key", "key:" + "k" * 70_000, "65535", "70000"),
    "key not UTF-8": (key(b"a\xff"), "metadata[24].key", "key:b'a\\xff'", "UTF-8", "b'a\\xff'"),
    "duplicate key": (
        lambda b: setattr(b, "doubled", "llama.block_count"),
        "llama.block_count",
        "again:llama.block_count",
        "each key once",
        "a second one",
    ),
    "metadata type": (extra(13, Raw()), "some.key type", "type:some.key", "from 0 to 12", "13"),
    "string length": (
        extra(STRING, Raw(struct.pack("<Q", 2**64 - 1))),
        "some.key",
        "value:some.key",
        f"{2**64 - 1} bytes",
        "before the end of the file",
    ),
    "boolean": (extra(BOOL, Raw(b"\2")), "some.key", "value:some.key", "byte of 0 or 1", "2"),
    "array type": (
        extra(ARRAY, raw_array(99, 0)),
        "some.key element type",
        "value:some.key",
        "from 0 to 12",
        "99",
    ),
    "array of numbers too long": (
        extra(ARRAY, raw_array(U64, 2**61 + 1)),
        "some.key",
        "value:some.key+4",
        f"{2**64 + 8} bytes",
        "before the end",
    ),
    "array of strings too long": (
        extra(ARRAY, raw_array(STRING, 2**60)),
        "some.key",
        "value:some.key+4",
        f"{2**63} bytes",
        "before the end",
    ),
    "array of arrays too long": (
        extra(ARRAY, raw_array(ARRAY, 2**50)),
        "some.key",
        "value:some.key+4",
        f"{12 * 2**50} bytes",
        "before the end",
    ),
    "string in an array too long": (
        extra(ARRAY, raw_array(STRING, 2, string("a") + struct.pack("<Q", 10**6))),
        "some.key[1]",
        "value:some.key+21",
        "1000000 bytes",
        "before the end",
    ),
    "boolean in an array": (
        extra(ARRAY, raw_array(BOOL, 3, b"\0\1\7")),
        "some.key",
        "value:some.key+14",
        "a boolean byte of 0 or 1",
        "7",
    ),
    "nesting": (
        extra(ARRAY, nested(5000)),
        "some.key[0][0][0][0]",
        "value:some.key+48",
        "arrays nested at most 4 deep",
        "a deeper one",
    ),
    "alignment of another type": (
        alignment(U64, 32),
        "general.alignment",
        "value:general.alignment",
        "a value of type UINT32",
        "one of type UINT64",
    ),
    "alignment of 0": (
        alignment(U32, 0), "general.alignment", "value:general.alignment", "a power of two", "0",
    ),
    "alignment of 24": (
        alignment(U32, 24), "general.alignment", "value:general.alignment", "a power of two", "24",
    ),
    "empty tensor name": (
        change(name=""), "tensors[1].name", "tensor:", "a length of 1 to 64 bytes", "0",
    ),
    "long tensor name": (
        change(name="n" * 65), "tensors[1].name", "tensor:" + "n" * 65, "1 to 64", "65",
    ),
    "tensor name not UTF-8": (
        change(name=b"\xc3"), "tensors[1].name", "tensor:b'\\xc3'", "UTF-8 text", "b'\\xc3'",
    ),
    "duplicate tensor": (
        change(name="token_embd.weight"),
        "tensor token_embd.weight",
        "second:token_embd.weight",
        "each name once",
        "a second one",
    ),
    "0 dimensions": (change(n_dims=0), f"tensor {Q} n_dims", f"n_dims:{Q}", "1 to 4", "0"),
    "5 dimensions": (change(n_dims=5), f"tensor {Q} n_dims", f"n_dims:{Q}", "1 to 4", "5"),
    "2**32 - 1 dimensions": (
        change(n_dims=2**32 - 1), f"tensor {Q} n_dims", f"n_dims:{Q}", "1 to 4", str(2**32 - 1),
    ),
    "empty axis": (
        change(ne=[32, 0]), f"tensor {Q} shape", f"shape:{Q}+8", "dimensions of at least 1", "0",
    ),
    "shape that overflows": (
        change(ne=[2**32, 2**32]),
        f"tensor {Q} shape",
        f"shape:{Q}",
        f"at most {2**63 - 1} elements",
        "4294967296 x 4294967296",
    ),
    "negative axis": (
        change(ne=[2**64 - 32]), f"tensor {Q} shape", f"shape:{Q}", "at most", str(2**64 - 32),
    ),
    "row of part of a block": (
        change(ne=[33, 32]), f"tensor {Q} shape", f"shape:{Q}", "a multiple of 32", "33",
    ),
    "unknown type": (change(type=43), f"tensor {Q} type", f"type:{Q}", "from 0 to 42", "43"),
    "removed type": (change(type=4), f"tensor {Q} type", f"type:{Q}", "current", "Q4_2"),
    "removed repacked type": (
        change(type=31), f"tensor {Q} type", f"type:{Q}", "current", "Q4_0_4_4",
    ),
    "misaligned offset": (
        change(offset=200), f"tensor {Q} offset", f"offset:{Q}", "the alignment, 32", "200",
    ),
    "offset that overflows": (
        change(offset=2**64 - 32),
        f"tensor {Q} offset",
        f"offset:{Q}",
        "at most 1664, the size of all tensors",
        str(2**64 - 32),
    ),
    "overlap": (
        change(offset=160),
        f"tensor {Q} offset",
        f"offset:{Q}",
        "at least 170, where tensor 'token_embd.weight' ends",
        "160",
    ),
    "tensor larger than the file": (
        change(ne=[32, 2**40]),
        "tensor blk.1.ffn_gate_exps.weight offset",
        "offset:blk.1.ffn_gate_exps.weight",
        f"at least {192 + 18 * 2**40}",
        "768",
    ),
    "last tensor larger than the file": (
        change("output_norm.weight", ne=[2**40]),
        "tensor output_norm.weight data",
        "offset:output_norm.weight",
        f"{2**42} bytes from byte",
        "the end of the file",
    ),
}  # fmt: skip


def located(b: Builder, where: str | int) -> int:
    if isinstance(where, int):
        return where
    if where in b.marks:
        return b.marks[where]
    mark, _, more = where.rpartition("+")
    return b.marks[mark] + int(more)


@pytest.mark.parametrize("case", CASES)
def test_malformed(tmp_path: Path, case: str) -> None:
    spoil, field, where, expected, found = CASES[case]
    b = llama()
    for tensor, offset in zip(b.tensors, (0, 192, 768, 1536), strict=True):
        tensor.offset = offset  # so that spoiling one leaves the others where they were
    spoil(b)
    path = tmp_path / "bad.gguf"
    path.write_bytes(b.build())
    error = refused(path)
    assert error.field == field
    assert error.offset == located(b, where)
    assert expected in error.expected
    assert found in error.found


@pytest.mark.parametrize(
    ("case", "advice"),
    [
        ("version 1", "Convert the model again"),
        ("version 4", "A newer release"),
        ("big-endian", "gguf_convert_endian.py"),
        ("removed type", "Quantize the model again"),
        ("unknown type", "newer than this release"),
        ("last tensor larger than the file", "bytes are missing. The file is cut short"),
    ],
)
def test_says_what_to_do(tmp_path: Path, case: str, advice: str) -> None:
    b = llama()
    CASES[case][0](b)
    path = tmp_path / "bad.gguf"
    path.write_bytes(b.build())
    assert advice in str(refused(path))


def test_truncated_anywhere(tmp_path: Path) -> None:
    """Every prefix of the header and many of the data are refused, at a byte that is there."""
    b = llama()
    content = b.build()
    end = b.marks["data"] + b.tensors[-1].nbytes + 1536
    path = tmp_path / "part.gguf"
    for length in [*range(b.marks["data"]), *range(b.marks["data"], end, 41)]:
        path.write_bytes(content[:length])
        error = refused(path)
        assert error.offset <= length
        assert error.hint and "fetch it again" in error.hint
        if length >= b.marks["data"]:
            assert f"{end - length} bytes are missing" in error.hint
    path.write_bytes(content[:end])
    assert len(read_gguf(path).tensors) == 4


def test_header_beyond_the_bound(tmp_path: Path) -> None:
    """A header may not fill a large file: it is refused without reading that far."""
    b = Builder().set("general.architecture", STRING, "llama")
    b.set("some.key", ARRAY, raw_array(U8, 2**29))
    path = tmp_path / "large.gguf"
    path.write_bytes(b.build())
    os.truncate(path, 2**30)
    error = refused(path)
    assert error.field == "some.key" and "the bound of 134217728 bytes" in error.found
    assert error.hint is None


@pytest.mark.parametrize(("kind", "size"), [(STRING, 8), (ARRAY, 12)])
def test_too_many_objects(tmp_path: Path, kind: int, size: int) -> None:
    """Strings and arrays cost more in memory than in the file: there is a bound on their number."""
    b = Builder().set("general.architecture", STRING, "llama")
    b.set("some.key", ARRAY, raw_array(kind, 2**23))
    path = tmp_path / "many.gguf"
    path.write_bytes(b.build())
    os.truncate(path, 2**23 * size + 1000)
    error = refused(path)
    assert error.field == "some.key" and error.found == "8388608 more"
    assert error.offset == b.marks["value:some.key"] + 4


def test_error_text_is_safe_to_print(tmp_path: Path) -> None:
    """What a file says cannot drive a terminal or break the encoding of the message."""
    b = llama().set("k\x1b[31m", ARRAY, raw_array(99, 0))
    path = tmp_path / "bad.gguf"
    path.write_bytes(b.build())
    error = refused(path)
    assert error.field == r"k\x1b[31m element type" and str(error).isprintable()
