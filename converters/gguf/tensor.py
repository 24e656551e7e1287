"""One tensor of a GGUF file: its directory entry and its bytes.

Files are read, never mapped: touching the map of a truncated file ends the process (SIGBUS), while
a short read is an error. It costs no more: a few rows at a time stay in a core's cache.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.errors import GGUFError
from converters.gguf.types import GGMLType, printable

__all__ = ["GGUFTensor", "OpenFile", "StoredRows"]

# Bytes; macOS refuses to read 2 GiB or more in one call.
_READ_AT_ONCE = 1 << 30


class OpenFile:
    """A file for positioned reads by any thread; closed when it is collected.

    Attributes:
        descriptor: owned by this object.
        size: in bytes, when it was opened.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.size = os.fstat(descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from an offset; returns the bytes read, fewer at the end of the file."""
        done = 0
        while done < len(buffer):
            part = buffer[done : done + _READ_AT_ONCE]
            count = os.preadv(self.descriptor, [part], offset + done)
            if not count:
                break
            done += count
        return done


@dataclass(frozen=True, slots=True)
class StoredRows:
    """The stored rows of a tensor, read by slices.

    ``rows[a:b]`` is uint8 (b - a, bytes per row); the slice has no step.
    """

    tensor: GGUFTensor
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> npt.NDArray[np.uint8]:
        first, stop, _ = part.indices(self.count)
        width = self.tensor.nbytes // self.count
        return self.tensor.read(first * width, (stop - first) * width).reshape(-1, width)


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor's directory entry, and access to its data.

    Attributes:
        name: the name in the file.
        shape: numpy order, last axis contiguous (GGUF's ``ne`` reversed); 1 to 4 axes, none empty.
        type: how the elements are stored.
        nbytes: size of the stored data.
        path: the file (the shard).
        offset: of the data in ``path``, in bytes.
        entry: offset of the directory entry in ``path``, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    nbytes: int
    offset: int
    path: Path
    entry: int
    _file: OpenFile = field(repr=False, compare=False)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def descriptor(self) -> int:
        """Of the file; open as long as the tensor exists."""
        return self._file.descriptor

    def raw(self) -> npt.NDArray[np.uint8]:
        """The stored bytes (nbytes,); GGUFError if the file has been truncated meanwhile."""
        return self.read(0, self.nbytes)

    def stored_rows(self) -> StoredRows | npt.NDArray[np.uint8]:
        """The stored bytes by rows along the last axis, (rows, bytes per row), read by slices."""
        return StoredRows(self, self.elements // self.shape[-1])

    def read(self, start: int, size: int) -> npt.NDArray[np.uint8]:
        """Some of the stored bytes (size,)."""
        made = np.empty(size, np.uint8)
        begin = self.offset + start
        try:
            done = self._file.read_into(made.data, begin)
        except OSError as error:
            raise self.error(
                expected="data that can be read", found=error.strerror or str(error)
            ) from error
        if done < size:
            raise self.error(
                expected=f"{size} bytes from byte {begin} on",
                found=f"the end of the file at byte {begin + done}",
                hint="The file has been cut short since it was opened: fetch it again",
            )
        return made

    def rows(self, first: int, count: int, name: str) -> GGUFTensor:
        """Rows along the first axis as a tensor of its own."""
        stride = self.nbytes // self.shape[0]
        return replace(
            self,
            name=name,
            shape=(count, *self.shape[1:]),
            nbytes=count * stride,
            offset=self.offset + first * stride,
        )

    def error(self, *, expected: str, found: str, hint: str | None = None) -> GGUFError:
        """An error about this tensor, at its directory entry."""
        return GGUFError(
            self.path,
            field=printable(f"tensor {self.name}"),
            offset=self.entry,
            expected=expected,
            found=found,
            hint=hint,
        )
