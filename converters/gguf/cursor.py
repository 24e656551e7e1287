"""A bounds-checked cursor over the header of one GGUF file.

Every length is compared with the bytes left before anything is allocated, so a hostile file costs
no more than its own header.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from converters.errors import GGUFError
from converters.gguf.tensor import OpenFile
from converters.gguf.types import SCALARS, Value, ValueType, printable, show

__all__ = ["MAX_HEADER", "PARTIAL", "Cursor"]

#: Bounds far above real files (the largest headers are some 30 MB: vocabularies of 260,000 tokens
#: with twice as many merges) that keep the worst hostile file within a second.
MAX_HEADER: Final = 1 << 27
MAX_OBJECTS: Final = 1_500_000  # strings and, at NESTED_COST each, nested arrays
MAX_DEPTH: Final = 4
NESTED_COST: Final = 16

PARTIAL: Final = "The file is cut short, as a download that stopped is: fetch it again"

_READ_AT_ONCE: Final = 1 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


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
        return GGUFError(
            self.path,
            field=printable(field),
            offset=offset,
            expected=expected,
            found=found,
            hint=hint,
        )

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
