"""An open GGUF file: its metadata, its tensors and their bytes, and errors about them.

Files are read, never mapped: touching the map of a truncated file ends the process (SIGBUS), while
a short read is an error. It costs no more: a few rows at a time stay in a core's cache.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from converters.errors import GGUFError
from converters.gguf.types import GGMLType, Value, printable, show

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
        field = printable(f"tensor {self.name}")
        return GGUFError(self.path, field, self.entry, expected, found, hint)


_REQUIRED: Final[Any] = object()


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open GGUF file: a whole one, a shard, or the joined shards of a split one.

    The files stay open for as long as the tensors are alive.

    Attributes:
        paths: all shards in order.
        version: of the format, 2 or 3.
        alignment: of the tensors' data in the first shard, in bytes.
        metadata: the first shard's keys in file order; see ``types.Value`` for the types of values.
        tensors: in file order, shard by shard.
        offsets: byte offset of each key's value in the first shard.
        metadata_end: byte offset of the first shard's tensor directory.
    """

    paths: tuple[Path, ...]
    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: tuple[GGUFTensor, ...]
    offsets: Mapping[str, int]
    metadata_end: int

    @property
    def path(self) -> Path:
        return self.paths[0]

    @property
    def architecture(self) -> str:
        """``general.architecture``, the prefix of the model's own keys."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(key, default)

    def key(self, suffix: str, default: Any = _REQUIRED) -> Any:
        """The value of the architecture's own key, e.g. ``key("block_count")``."""
        value = self.metadata.get(f"{self.architecture}.{suffix}", default)
        if value is _REQUIRED:
            raise self.key_error(suffix, expected="a value")
        return value

    def tensor(self, name: str) -> GGUFTensor:
        """The tensor of that name; GGUFError if there is none."""
        if name in self:
            return self._by_name[name]
        raise self.error(
            f"tensor {name}", expected="an entry in the tensor directory", found="none"
        )

    @cached_property
    def _by_name(self) -> dict[str, GGUFTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def with_keys(self, keys: Mapping[str, Value]) -> GGUFFile:
        """The same file with other values for some of the architecture's own keys."""
        own = {f"{self.architecture}.{suffix}": value for suffix, value in keys.items()}
        return replace(self, metadata=MappingProxyType({**self.metadata, **own}))

    def error(
        self, key: str, *, expected: str, found: str | None = None, hint: str | None = None
    ) -> GGUFError:
        """An error about a metadata key; ``found`` defaults to its value."""
        if found is None:
            found = show(self.metadata[key]) if key in self.metadata else "no such key"
        offset = self.offsets.get(key, self.metadata_end)
        return GGUFError(self.path, printable(key), offset, expected, found, hint)

    def key_error(
        self, suffix: str, *, expected: str, found: str | None = None, hint: str | None = None
    ) -> GGUFError:
        """:meth:`error` about the architecture's own key, e.g. ``block_count``."""
        return self.error(
            f"{self.architecture}.{suffix}", expected=expected, found=found, hint=hint
        )

    def __repr__(self) -> str:
        files = f"{len(self.paths)} file{'s' if len(self.paths) > 1 else ''}"
        return (
            f"GGUFFile({self.path.name!r}, {self.architecture!r}, {len(self.metadata)} keys, "
            f"{len(self.tensors)} tensors, {files})"
        )
