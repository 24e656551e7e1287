"""One tensor of a GGUF file: what its directory entry says, and its bytes in the mapped file.

Knows where the bytes are; does not know what they mean (``quants.py`` does).
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.errors import GGUFError
from converters.gguf.types import GGMLType, printable

__all__ = ["GGUFTensor"]


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor's directory entry and a zero-copy way to its data.

    Attributes:
        name: the name in the file.
        shape: numpy order, last axis contiguous (GGUF's ``ne`` reversed); 1 to 4 axes, none empty.
        type: how the elements are stored.
        nbytes: size of the stored data.
        offset: where the data begins, in bytes from the start of ``path``.
        path: the file (the shard) that holds it.
        entry: where the directory entry begins, in bytes from the start of ``path``.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    nbytes: int
    offset: int
    path: Path
    entry: int
    _map: mmap.mmap = field(repr=False, compare=False)

    @property
    def elements(self) -> int:
        """The number of elements (weights, not bytes)."""
        return prod(self.shape)

    def raw(self) -> npt.NDArray[np.uint8]:
        """The stored bytes (nbytes,): a read-only view of the mapped file, which it keeps open."""
        return np.frombuffer(self._map, np.uint8, self.nbytes, self.offset)

    def rows(self, first: int, count: int, name: str) -> GGUFTensor:
        """Rows along the first axis as a tensor of their own, over the same bytes."""
        stride = self.nbytes // self.shape[0]
        return replace(
            self,
            name=name,
            shape=(count, *self.shape[1:]),
            nbytes=count * stride,
            offset=self.offset + first * stride,
        )

    def release(self) -> None:
        """Let the system drop the pages of this tensor from resident memory.

        For streaming through a file larger than memory. Views stay valid: a page that is read again
        comes back from the disk or the page cache. Does nothing where there is no ``madvise``.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self.offset - self.offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, self.offset + self.nbytes - start)

    def error(self, *, expected: str, found: str, hint: str | None = None) -> GGUFError:
        """An error about this tensor, to raise; it points at the directory entry."""
        return GGUFError(
            self.path,
            field=printable(f"tensor {self.name}"),
            offset=self.entry,
            expected=expected,
            found=found,
            hint=hint,
        )
