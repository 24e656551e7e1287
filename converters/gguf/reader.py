"""Open a GGUF file: metadata, tensor directory, and access to the tensors' bytes.

Every length is compared with the bytes left before anything is allocated: opening any file takes
well under a second and memory in proportion to its header, and ends in a :class:`GGUFFile` or in a
``GGUFError`` with the field, the byte offset, the expected and the found value.

Format: ggml's ``docs/gguf.md``, versions 2 and 3. Split files (``name-00001-of-00003.gguf``) are
those of llama-gguf-split; the first shard has all metadata but the ``split.*`` keys of the others.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from converters.errors import GGUFError
from converters.gguf.file import GGUFFile, GGUFTensor, OpenFile
from converters.gguf.types import (
    BLOCKS,
    MAX_DIMS,
    REMOVED,
    SCALARS,
    GGMLType,
    Value,
    ValueType,
    printable,
    show,
)
from converters.gguf.validate import validate

__all__ = ["BLOCKS", "GGMLType", "GGUFFile", "GGUFTensor", "Value", "read_gguf"]

#: Bounds far above real files (the largest headers are some 30 MB: vocabularies of 260,000 tokens
#: with twice as many merges) that keep the worst hostile file within a second.
MAX_HEADER: Final = 1 << 27
MAX_OBJECTS: Final = 1_500_000  # strings and, at NESTED_COST each, nested arrays
MAX_DEPTH: Final = 4
NESTED_COST: Final = 16
MAX_KEYS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 16
MAX_KEY_BYTES: Final = 65_535
MAX_NAME_BYTES: Final = 64
MAX_ELEMENTS: Final = 2**63 - 1
MAX_SHARDS: Final = 99_999  # five digits in the name

MAGIC: Final = b"GGUF"
ALIGNMENT: Final = "general.alignment"
SHARD: Final = "split.no"  # from 0, while file names count from 1
SHARDS: Final = "split.count"
SHARDED_TENSORS: Final = "split.tensors.count"  # in all shards together
PARTIAL: Final = "The file is cut short, as a download that stopped is: fetch it again"

_READ_AT_ONCE: Final = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SHARD_NAME: Final = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL
)


def read_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file, or all shards of a split one given any of them.

    Args:
        path: a ``.gguf`` file of version 2 or 3, little-endian, of one model or vocabulary.

    Raises:
        GGUFError: the file cannot be read, is malformed, or its metadata says something impossible.
    """
    file = _with_siblings(_read_file(Path(path)))
    validate(file)
    return file


# --- shards ---------------------------------------------------------------------------------------


def _with_siblings(file: GGUFFile) -> GGUFFile:
    """All shards of the set that a file is of, found by name in its directory."""
    count = _integer(file, SHARDS, 0, MAX_SHARDS) if SHARDS in file.metadata else 0
    if count < 2:  # merging writes 0
        return file
    number = _integer(file, SHARD, 0, count - 1)
    name = _SHARD_NAME.fullmatch(file.path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        raise file.error(
            SHARD,
            expected=f"a file named ...-{number + 1:05d}-of-{count:05d}.gguf",
            found=show(file.path.name),
            hint="Give the shards of a split file their original names",
        )
    shards = []
    for index in range(count):
        sibling = file.path.with_name(f"{name['stem']}-{index + 1:05d}-of-{count:05d}.gguf")
        shards.append(file if index == number else _sibling(sibling, index, count))
    tensors: dict[str, GGUFTensor] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in tensors:
            found = f"a second one (the first is in {tensors[tensor.name].path.name})"
            raise tensor.error(expected="each name once in all shards", found=found)
        tensors[tensor.name] = tensor
    for shard in shards:
        if SHARDED_TENSORS in shard.metadata or shard is shards[0]:
            promised = _integer(shard, SHARDED_TENSORS, 0, 2**31 - 1)
            if promised != len(tensors):
                raise shard.error(SHARDED_TENSORS, expected=f"{len(tensors)}, the tensors found")
    paths = tuple(shard.path for shard in shards)
    return replace(shards[0], paths=paths, tensors=tuple(tensors.values()))


def _sibling(path: Path, index: int, count: int) -> GGUFFile:
    """Shard ``index`` of ``count``, as its own keys must say."""
    if not path.exists():
        expected, found = f"shard {index + 1} of {count}", "nothing at this path"
        hint = "Download the missing shard into the same directory"
        raise GGUFError(path, "file", 0, expected, found, hint)
    shard = _read_file(path)
    for key, value in ((SHARDS, count), (SHARD, index)):
        if type(shard.get(key)) is not int or shard.get(key) != value:
            raise shard.error(key, expected=str(value), hint="The shards are not of one set")
    return shard


def _integer(shard: GGUFFile, key: str, low: int, high: int) -> int:
    value = shard.get(key)
    if type(value) is int and low <= value <= high:
        return value
    raise shard.error(key, expected=f"an integer from {low} to {high}")


# --- one file -------------------------------------------------------------------------------------


def _read_file(path: Path) -> GGUFFile:
    """Read the header of one file, which stays open for its data."""
    cursor = Cursor(path, _open(path))
    version, tensor_count, key_count = _prologue(cursor)
    metadata, offsets = _metadata(cursor, key_count)
    alignment = metadata.get(ALIGNMENT, 32)
    assert isinstance(alignment, int)  # checked by _metadata
    if alignment.bit_count() != 1:
        raise cursor.error(ALIGNMENT, "a power of two", str(alignment), at=offsets[ALIGNMENT])
    metadata_end = cursor.pos
    tensors = _directory(cursor, tensor_count, alignment)
    keys = MappingProxyType(metadata)
    return GGUFFile((path,), version, alignment, keys, tensors, offsets, metadata_end)


def _open(path: Path) -> OpenFile:
    """The file, opened; GGUFError for anything but a readable regular file."""

    def error(found: str, hint: str | None = None) -> GGUFError:
        return GGUFError(path, "file", 0, "a GGUF file", found, hint)

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
        found, hint = _resembling(start)
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
            fits = f"at most {(cursor.end - cursor.pos) // smallest}, for which the file has room"
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


# --- bytes ----------------------------------------------------------------------------------------


class Cursor:
    """Reads little-endian values at ``pos`` and moves past them; ``field`` is their name in errors.

    Attributes:
        pos: the byte offset of the next value.
        end: latest end of the header: the file's size, or MAX_HEADER.
    """

    def __init__(self, path: Path, file: OpenFile) -> None:
        self.path = path
        self.file = file
        self.pos = 0
        self.end = min(file.size, MAX_HEADER)
        # Pages are allocated when first written, so the unread part is free.
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._data = mmap.mmap(-1, self.end, flags=anonymous)
        self._loaded = 0
        self._budget = MAX_OBJECTS

    def start(self) -> bytes:
        size = min(self.end, 512)
        self.need(size, "file")
        return self._data[:size]

    def _load(self, stop: int, field: str) -> None:
        """Read on, at least up to byte ``stop``."""
        stop = min(max(stop, self._loaded + _READ_AT_ONCE), self.end)
        with memoryview(self._data) as whole, whole[self._loaded : stop] as part:
            try:
                done = self.file.read_into(part, self._loaded)
            except OSError as error:
                found = error.strerror or str(error)
                raise self.error(field, "data that can be read", found) from error
        self._loaded += done
        if self._loaded < stop:
            found = f"the end of the file at byte {self._loaded}"
            raise self.error(field, f"a file of {self.file.size} bytes", found, hint=PARTIAL)

    def error(
        self,
        field: str,
        expected: str,
        found: str,
        *,
        at: int | None = None,
        hint: str | None = None,
    ) -> GGUFError:
        """An error about ``field`` at the byte offset ``at`` (default: the next value's)."""
        offset = self.pos if at is None else at
        return GGUFError(self.path, printable(field), offset, expected, found, hint)

    def need(self, size: int, field: str, *, at: int | None = None) -> None:
        """Raise unless ``size`` more bytes are there."""
        left = self.end - self.pos
        if size <= left:
            if self.pos + size > self._loaded:
                self._load(self.pos + size, field)
            return
        if self.end < self.file.size:
            limit, hint = f"the bound of {MAX_HEADER} bytes on a header", None
        else:
            limit, hint = "the end of the file", PARTIAL
        raise self.error(field, f"{size} bytes", f"{left} before {limit}", at=at, hint=hint)

    def u32(self, field: str) -> int:
        self.need(4, field)
        (value,) = _U32.unpack_from(self._data, self.pos)
        self.pos += 4
        return int(value)

    def u64(self, field: str) -> int:
        self.need(8, field)
        (value,) = _U64.unpack_from(self._data, self.pos)
        self.pos += 8
        return int(value)

    def name(self, field: str, limit: int) -> str:
        """A key or a tensor's name: UTF-8, not empty, at most ``limit`` bytes."""
        start = self.pos
        size = self.u64(field)
        if not 0 < size <= limit:
            raise self.error(field, f"a length of 1 to {limit} bytes", str(size), at=start)
        self.need(size, field, at=start)
        raw = self._data[self.pos : self.pos + size]
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise self.error(field, "UTF-8 text", show(raw), at=start) from None
        self.pos += size
        return text

    def value(self, kind: ValueType, field: str) -> Value:
        if kind is ValueType.STRING:
            return self._string(field)
        if kind is ValueType.ARRAY:
            return self._array(field, depth=1)
        scalar: bool | int | float = self._numbers(kind, 1, field)[0].item()
        return scalar

    def kind(self, field: str) -> ValueType:
        start = self.pos
        number = self.u32(f"{field} type")
        try:
            return ValueType(number)
        except ValueError:
            expected = f"a metadata type from 0 to {max(ValueType)}"
            raise self.error(f"{field} type", expected, str(number), at=start) from None

    def _array(self, field: str, depth: int) -> list[Any] | npt.NDArray[Any]:
        if depth > MAX_DEPTH:
            raise self.error(field, f"arrays nested at most {MAX_DEPTH} deep", "a deeper one")
        kind = self.kind(f"{field} element")
        start = self.pos
        count = self.u64(f"{field} length")
        if kind is ValueType.STRING:
            return self._strings(count, field, start)
        if kind is not ValueType.ARRAY:
            return self._numbers(kind, count, field, start)
        self._spend(count, NESTED_COST, 12, field, start)
        return [self._array(f"{field}[{index}]", depth + 1) for index in range(count)]

    def _numbers(
        self, kind: ValueType, count: int, field: str, start: int | None = None
    ) -> npt.NDArray[Any]:
        dtype = SCALARS[kind]
        self.need(count * dtype.itemsize, field, at=start)
        numbers = np.frombuffer(self._data, dtype, count, self.pos).copy()
        if kind is ValueType.BOOL:
            numbers = self._booleans(numbers, field)
        self.pos += count * dtype.itemsize
        return numbers

    def _booleans(self, stored: npt.NDArray[Any], field: str) -> npt.NDArray[np.bool_]:
        if stored.size and stored.max() > 1:
            index = int(np.argmax(stored > 1))
            raise self.error(
                field, "a boolean byte of 0 or 1", str(stored[index]), at=self.pos + index
            )
        return stored.astype(np.bool_)

    def _spend(self, count: int, cost: int, size: int, field: str, start: int) -> None:
        """Check that ``count`` objects of at least ``size`` bytes fit into file and budget."""
        self.need(count * size, field, at=start)
        self._budget -= count * cost
        if self._budget < 0:
            expected = f"at most {MAX_OBJECTS // cost} strings or nested arrays in all the metadata"
            raise self.error(field, expected, f"{count} more", at=start)

    def _string(self, field: str) -> str:
        start = self.pos
        size = self.u64(field)
        self.need(size, field, at=start)
        raw = self._data[self.pos : self.pos + size]
        self.pos += size
        return raw.decode("utf-8", "surrogateescape")

    def _strings(self, count: int, field: str, start: int) -> list[str]:
        """``count`` strings; bytes that are not UTF-8 become lone surrogates.

        The hot path of opening a model (half a million strings): nothing but the unavoidable.
        """
        self._spend(count, 1, 8, field, start)
        data, pos, loaded, unpack = self._data, self.pos, self._loaded, _U64.unpack_from
        strings: list[str] = []
        append = strings.append
        for index in range(count):
            body = pos + 8
            if body > loaded:
                self.pos = pos
                self.need(8, f"{field}[{index}]")
                loaded = self._loaded
            stop: int = body + unpack(data, pos)[0]
            if stop > loaded:
                self.pos = body
                self.need(stop - body, f"{field}[{index}]", at=pos)
                loaded = self._loaded
            append(data[body:stop].decode("utf-8", "surrogateescape"))
            pos = stop
        self.pos = pos
        return strings


# --- other formats --------------------------------------------------------------------------------

_OLD = "Convert the model again with a current tool"
_WEB = "The download fetched a web page: check the link, and whether it needs a login"
_DIRECTORY = "Give the directory that holds it together with config.json"

#: First bytes -> (the format, a hint).
_SIGNATURES: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"FUGG", "a byte-swapped GGUF file", "Download the little-endian file of this model"),
    (b"lmgg", "a GGML file, from before GGUF", _OLD),
    (b"fmgg", "a GGMF file, from before GGUF", _OLD),
    (b"tjgg", "a GGJT file, from before GGUF", _OLD),
    (b"algg", "a GGLA adapter, from before GGUF", _OLD),
    (b"PK\x03\x04", "a zip archive, as PyTorch checkpoints are", "Convert the model to GGUF first"),
    (b"\x80\x02", "a Python pickle", "Convert the model to GGUF first"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it first"),
    (b"version https://git-lfs", "a git-lfs pointer", "Fetch the file it stands for: git lfs pull"),
    (b"<!doctype", "an HTML page", _WEB),
    (b"<html", "an HTML page", _WEB),
    (b"<?xml", "an XML document", _WEB),
    (b"{", "a JSON document", "Check the link that it came from"),
    (
        b"\x00\x00\x00\x00",
        "zero bytes",
        "The download reserved the space and stopped: fetch it again",
    ),
)


def _resembling(start: bytes) -> tuple[str, str]:
    """The format that the first bytes of a file indicate, and a hint."""
    if start[8:9] == b"{" and len(start) > 9:
        return "a safetensors file", _DIRECTORY
    text = start.lstrip()
    for signature, what, hint in _SIGNATURES:
        if start.startswith(signature) or text[: len(signature)].lower() == signature:
            return what, hint
    return show(start[:4]), "This is no GGUF file, whatever its name: check which file it should be"
