"""Open a GGUF file: metadata, tensor directory, and access to the tensors' bytes.

The reader is bounded: opening any file takes well under a second and memory in proportion to its
header, and ends in a ``GGUFFile`` or in a ``GGUFError`` with the field, the byte offset, the
expected and the found value.
"""

from __future__ import annotations

from pathlib import Path

from converters.gguf.checks import check
from converters.gguf.file import GGUFFile
from converters.gguf.splits import read_shards
from converters.gguf.tensor import GGUFTensor
from converters.gguf.types import BLOCKS, GGMLType, Value

__all__ = ["BLOCKS", "GGMLType", "GGUFFile", "GGUFTensor", "Value", "read_gguf"]


def read_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file, or all shards of a split one given any of them.

    Args:
        path: a ``.gguf`` file of version 2 or 3, little-endian, of one model or vocabulary.

    Raises:
        GGUFError: the file cannot be read, is malformed, or its metadata says something impossible.
    """
    file = GGUFFile(read_shards(Path(path)))
    check(file)
    return file
