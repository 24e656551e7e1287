"""An open GGUF file: metadata, tensors, and errors about them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from converters.errors import GGUFError
from converters.gguf.tensor import GGUFTensor
from converters.gguf.types import Value, printable, show

__all__ = ["GGUFFile", "Shard"]

_MISSING: Final[Any] = object()


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: a whole model, or one part of a split one.

    Attributes:
        offsets: of the value of each key.
        metadata_end: offset of the tensor directory.
    """

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Value]
    offsets: dict[str, int]
    metadata_end: int
    tensors: tuple[GGUFTensor, ...]


class GGUFFile:
    """An open GGUF file, with the shards of a split one joined.

    The files stay open for as long as the tensors are alive.

    Attributes:
        path: the file, the first shard of a split one.
        paths: all shards in order.
        version: of the format, 2 or 3.
        alignment: of the tensors' data in the first shard, in bytes.
        metadata: the first shard's keys in file order; see ``types.Value`` for what values are.
        tensors: in file order, shard by shard.
    """

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        first = shards[0]
        self.path: Path = first.path
        self.paths: tuple[Path, ...] = tuple(shard.path for shard in shards)
        self.version: int = first.version
        self.alignment: int = first.alignment
        self.metadata: Mapping[str, Value] = MappingProxyType(first.metadata)
        self.tensors: tuple[GGUFTensor, ...] = tuple(t for shard in shards for t in shard.tensors)
        self._offsets = first.offsets
        self._metadata_end = first.metadata_end
        self._by_name = {tensor.name: tensor for tensor in self.tensors}

    @property
    def architecture(self) -> str:
        """``general.architecture``, the prefix of the model's own keys."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(key, default)

    def key(self, suffix: str, default: Any = _MISSING) -> Any:
        """The value of the architecture's own key, e.g. ``key("block_count")``."""
        value = self.metadata.get(f"{self.architecture}.{suffix}", default)
        if value is _MISSING:
            raise self.key_error(suffix, expected="a value")
        return value

    def tensor(self, name: str) -> GGUFTensor:
        """The tensor of that name; GGUFError if there is none."""
        if name in self._by_name:
            return self._by_name[name]
        raise GGUFError(
            self.path,
            field=printable(f"tensor {name}"),
            offset=self._metadata_end,
            expected="an entry in the tensor directory",
            found="none",
        )

    def with_tensors(self, tensors: tuple[GGUFTensor, ...]) -> GGUFFile:
        """The same file with other tensors, e.g. parts of its own."""
        other = copy.copy(self)
        other.tensors = tensors
        other._by_name = {tensor.name: tensor for tensor in tensors}
        return other

    def with_keys(self, keys: Mapping[str, Value]) -> GGUFFile:
        """The same file with other values for some of the architecture's own keys."""
        other = copy.copy(self)
        own = {f"{self.architecture}.{suffix}": value for suffix, value in keys.items()}
        other.metadata = MappingProxyType({**self.metadata, **own})
        return other

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def field_offset(self, key: str) -> int:
        """Offset of a key's value in bytes, or of the end of the metadata."""
        return self._offsets.get(key, self._metadata_end)

    def error(
        self, key: str, *, expected: str, found: str | None = None, hint: str | None = None
    ) -> GGUFError:
        """An error about a metadata key; ``found`` defaults to its value."""
        if found is None:
            found = show(self.metadata[key]) if key in self.metadata else "no such key"
        return GGUFError(
            self.path,
            field=printable(key),
            offset=self.field_offset(key),
            expected=expected,
            found=found,
            hint=hint,
        )

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
