"""One GGUF file: magic, version, metadata and tensor directory, validated while they are read.

Format: ggml's ``docs/gguf.md``, versions 2 and 3.
"""

from __future__ import annotations

import os
import stat
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Final

from converters.errors import GGUFError
from converters.gguf.cursor import PARTIAL, Cursor
from converters.gguf.file import Shard
from converters.gguf.sniff import describe
from converters.gguf.tensor import GGUFTensor, OpenFile
from converters.gguf.types import BLOCKS, MAX_DIMS, REMOVED, GGMLType, Value, ValueType, show

__all__ = ["read_shard"]

MAX_KEYS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 16
MAX_KEY_BYTES: Final = 65_535
MAX_NAME_BYTES: Final = 64
MAX_ELEMENTS: Final = 2**63 - 1

MAGIC: Final = b"GGUF"
ALIGNMENT: Final = "general.alignment"


def read_shard(path: Path) -> Shard:
    """Read the header of one file, which stays open for its data; raises GGUFError."""
    cursor = Cursor(path, _open(path))
    version, tensor_count, key_count = _prologue(cursor)
    metadata, offsets = _metadata(cursor, key_count)
    alignment = _alignment(cursor, metadata, offsets)
    metadata_end = cursor.pos
    tensors = _directory(cursor, tensor_count, alignment)
    return Shard(path, version, alignment, metadata, offsets, metadata_end, tensors)


def _open(path: Path) -> OpenFile:
    """The file, opened; GGUFError for anything but a readable regular file."""

    def error(found: str, hint: str | None = None) -> GGUFError:
        return GGUFError(
            path, field="file", offset=0, expected="a GGUF file", found=found, hint=hint
        )

    try:
        status = path.stat()  # before opening: opening a pipe waits for its writer
        if stat.S_ISDIR(status.st_mode):
            raise error("a directory", "Give the .gguf file itself")
        if not stat.S_ISREG(status.st_mode):
            raise error("something that is not a regular file")
        if status.st_size == 0:
            raise error("an empty file", PARTIAL)
        return OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise error("nothing at this path") from None
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        raise error(f"one that cannot be read ({reason})") from None


def _prologue(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    start = cursor.start()
    if not MAGIC.startswith(start[:4]):
        found, hint = describe(start)
        raise cursor.error("magic", "the bytes 'GGUF'", found, hint=hint)
    cursor.need(4, "magic")
    cursor.pos = 4
    _check_version(cursor, version := cursor.u32("version"))
    tensors, keys = cursor.u64("tensor_count"), cursor.u64("metadata_kv_count")
    for field, at, count, smallest, bound in (
        ("tensor_count", 8, tensors, 33, MAX_TENSORS),  # a name of 1 byte, 1 axis
        ("metadata_kv_count", 16, keys, 14, MAX_KEYS),  # a key of 1 byte, a value of 1 byte
    ):
        if count > bound:
            raise cursor.error(field, f"at most {bound}", str(count), at=at)
        if count * smallest > cursor.end - cursor.pos:
            fits = f"at most {(cursor.end - cursor.pos) // smallest}, what the file has room for"
            raise cursor.error(field, fits, str(count), at=at, hint=PARTIAL)
    return version, tensors, keys


def _check_version(cursor: Cursor, version: int) -> None:
    """Versions 2 and 3 are the same, but 3 may be big-endian."""
    if version in (2, 3):
        return
    expected = "GGUF version 2 or 3"
    if version == 1:
        found, hint = "version 1, which is too old", "Convert the model again with a current tool"
    elif version and version & 0xFFFF == 0:
        found = f"a big-endian file of version {int.from_bytes(version.to_bytes(4, 'little'))}"
        hint = (
            "Download the little-endian file of this model, or convert this one with "
            "gguf_convert_endian.py of the gguf package"
        )
    else:
        found, hint = f"version {version}", "A newer release may be able to read it"
    raise cursor.error("version", expected, found, at=4, hint=hint)


def _metadata(cursor: Cursor, count: int) -> tuple[dict[str, Value], dict[str, int]]:
    """Values, and their offsets, in file order."""
    metadata: dict[str, Value] = {}
    offsets: dict[str, int] = {}
    for index in range(count):
        start = cursor.pos
        key = cursor.name(f"metadata[{index}].key", MAX_KEY_BYTES)
        if key in metadata:
            found = f"a second one (the first is at byte {offsets[key]})"
            raise cursor.error(key, "each key once", found, at=start)
        kind = cursor.kind(key)
        offsets[key] = cursor.pos
        if key == ALIGNMENT and kind is not ValueType.UINT32:
            raise cursor.error(key, "a value of type UINT32", f"one of type {kind.name}")
        metadata[key] = cursor.value(kind, key)
    return metadata, offsets


def _alignment(cursor: Cursor, metadata: dict[str, Value], offsets: dict[str, int]) -> int:
    alignment = metadata.get(ALIGNMENT, 32)
    assert isinstance(alignment, int)  # checked by _metadata
    if alignment.bit_count() != 1:
        raise cursor.error(ALIGNMENT, "a power of two", str(alignment), at=offsets[ALIGNMENT])
    return alignment


def _directory(cursor: Cursor, count: int, alignment: int) -> tuple[GGUFTensor, ...]:
    """The tensors in file order, their data inside the file and without overlap."""
    entries = []
    seen: set[str] = set()
    for index in range(count):
        start = cursor.pos
        name = cursor.name(f"tensors[{index}].name", MAX_NAME_BYTES)
        if name in seen:
            raise cursor.error(f"tensor {name}", "each name once", "a second one", at=start)
        seen.add(name)
        shape = _shape(cursor, name)
        kind, nbytes = _type(cursor, name, shape)
        at = cursor.pos
        offset = cursor.u64(f"tensor {name} offset")
        if offset % alignment:
            expected = f"a multiple of the alignment, {alignment}"
            raise cursor.error(f"tensor {name} offset", expected, str(offset), at=at)
        entries.append((name, shape, kind, nbytes, offset, start, at))
    base = -(-cursor.pos // alignment) * alignment
    _check_extents(cursor, base, alignment, [(e[4], e[3], e[0], e[6]) for e in entries])
    return tuple(
        GGUFTensor(name, shape, kind, nbytes, base + offset, cursor.path, start, cursor.file)
        for name, shape, kind, nbytes, offset, start, _ in entries
    )


def _shape(cursor: Cursor, name: str) -> tuple[int, ...]:
    """The axes, last one contiguous."""
    start = cursor.pos
    axes = cursor.u32(f"tensor {name} n_dims")
    if not 1 <= axes <= MAX_DIMS:
        expected = f"1 to {MAX_DIMS} dimensions"
        raise cursor.error(f"tensor {name} n_dims", expected, str(axes), at=start)
    field = f"tensor {name} shape"
    start = cursor.pos
    sizes = [cursor.u64(field) for _ in range(axes)]
    if 0 in sizes:
        at = start + 8 * sizes.index(0)
        raise cursor.error(field, "dimensions of at least 1", "0", at=at)
    if prod(sizes) > MAX_ELEMENTS:
        expected = f"at most {MAX_ELEMENTS} elements"
        raise cursor.error(field, expected, " x ".join(map(str, sizes)), at=start)
    return tuple(reversed(sizes))


def _type(cursor: Cursor, name: str, shape: tuple[int, ...]) -> tuple[GGMLType, int]:
    """The type, and the size of the data in bytes."""
    field = f"tensor {name} type"
    start = cursor.pos
    number = cursor.u32(field)
    if number in REMOVED:
        raise cursor.error(
            field,
            "a current GGML type",
            f"{number} ({REMOVED[number]}), which llama.cpp has removed",
            at=start,
            hint="Quantize the model again with a current tool, for example to Q4_0",
        )
    try:
        kind = GGMLType(number)
    except ValueError:
        expected = f"a GGML type from 0 to {max(GGMLType)}"
        hint = "The file is damaged, or newer than this release"
        raise cursor.error(field, expected, str(number), at=start, hint=hint) from None
    block, size = BLOCKS[kind]
    if shape[-1] % block:
        expected = f"rows of a multiple of {block} elements for {kind.name}"
        at = start - 8 * len(shape)
        raise cursor.error(f"tensor {name} shape", expected, str(shape[-1]), at=at)
    return kind, prod(shape) // block * size


def _check_extents(
    cursor: Cursor, base: int, alignment: int, extents: list[tuple[int, int, str, int]]
) -> None:
    """Raise unless every (offset, nbytes, name, where the offset is stored) lies inside, apart."""
    extents.sort()
    for (offset, nbytes, before, _), (following, _, name, at) in pairwise(extents):
        if following < offset + nbytes:
            expected = f"at least {offset + nbytes}, where tensor {show(before)} ends"
            raise cursor.error(f"tensor {name} offset", expected, str(following), at=at)
    room = cursor.file.size - base
    packed = sum(-(-nbytes // alignment) * alignment for _, nbytes, _, _ in extents)
    for offset, nbytes, name, at in extents:
        if offset + nbytes > room:
            if offset > packed:  # not a truncated file
                expected = f"at most {packed}, the size of all tensors together"
                raise cursor.error(f"tensor {name} offset", expected, str(offset), at=at)
            needed = base + max(o + n for o, n, _, _ in extents)
            raise cursor.error(
                f"tensor {name} data",
                f"{nbytes} bytes from byte {base + offset} on",
                f"the end of the file at byte {cursor.file.size}",
                at=at,
                hint=f"{needed - cursor.file.size} bytes are missing. {PARTIAL}",
            )
