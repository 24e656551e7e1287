"""Tensors of a file grouped as in its model: experts stacked, fused matrices split or joined.

Matrices are stored by rows, so a part is a slice of the bytes and nothing is decoded, unless rows
of one matrix have different types, which only plain floats can hold together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from converters.architectures import Architecture
from converters.gguf.file import GGUFTensor
from converters.gguf.reader import GGUFFile
from converters.gguf.types import GGMLType
from converters.quantize.encode import plain_floats

_ONE_EXPERT = re.compile(r"(blk\.\d{1,9}\.ffn_(?:gate|up|down))\.(\d{1,6})\.(weight|bias)")
_MODULE = re.compile(r"(blk\.\d{1,9}\.)?(.+)\.(weight|bias|scale)")


def regroup(gguf: GGUFFile, architecture: Architecture) -> GGUFFile:
    """The file with the tensors of its architecture's model."""
    tensors: dict[str, GGUFTensor] = {}
    experts: dict[str, dict[int, GGUFTensor]] = defaultdict(dict)
    for tensor in gguf.tensors:
        lone = _ONE_EXPERT.fullmatch(tensor.name)
        if lone:
            experts[f"{lone[1]}_exps.{lone[3]}"][int(lone[2])] = tensor
            continue
        inner = _MODULE.fullmatch(tensor.name)
        if inner and inner[2] in architecture.parts and inner[2] not in architecture.layer:
            split = architecture.parts[inner[2]](gguf)
            layer = inner[1] or ""
            tensors |= _split(tensor, [(f"{layer}{m}.{inner[3]}", n) for m, n in split])
        else:
            tensors[tensor.name] = tensor
    for name, found in experts.items():
        tensors[name] = _stacked(gguf, name, found)
    for module, members in architecture.joins.items():
        _join(tensors, module, members)
    for name, values in architecture.made(gguf).items():
        tensors[name] = _made(gguf, name, values)
    if list(tensors.values()) == list(gguf.tensors):
        return gguf
    return gguf.with_tensors(tuple(tensors.values()))


def _split(
    tensor: GGUFTensor, parts: Sequence[tuple[str, int | npt.NDArray[np.intp]]]
) -> dict[str, GGUFTensor]:
    if tensor.name.endswith(".scale"):  # one factor for all parts
        return {name: replace(tensor, name=name) for name, _ in parts}
    wanted = sum(rows if isinstance(rows, int) else len(rows) for _, rows in parts)
    found = tensor.shape[0]
    if not all(isinstance(rows, int) for _, rows in parts):
        found = tensor.elements // tensor.shape[-1]
    if found != wanted:
        raise tensor.error(expected=f"{wanted} rows", found=str(found))
    made: dict[str, GGUFTensor] = {}
    first = 0
    for name, rows in parts:
        if isinstance(rows, int):
            made[name] = tensor.rows(first, rows, name)
            first += rows
        else:
            made[name] = _gathered(tensor, rows, name)
    return made


def _gathered(tensor: GGUFTensor, rows: npt.NDArray[np.intp], name: str) -> GGUFTensor:
    """Some rows of a matrix, or as many of each matrix of a stack."""
    *stack, every, columns = tensor.shape
    size = tensor.nbytes * len(rows) // (tensor.elements // columns)
    return GatheredTensor(
        name=name,
        shape=(*stack, len(rows) * every * columns // tensor.elements, columns),
        type=tensor.type,
        nbytes=size,
        offset=tensor.offset,
        path=tensor.path,
        entry=tensor.entry,
        _file=tensor._file,
        source=tensor,
        indices=rows,
    )


def _made(gguf: GGUFFile, name: str, values: npt.NDArray[np.float32]) -> GGUFTensor:
    like = gguf.tensor("token_embd.weight")
    return MadeTensor(
        name=name,
        shape=values.shape,
        type=GGMLType.F32,
        nbytes=values.nbytes,
        offset=like.offset,
        path=like.path,
        entry=like.entry,
        _file=like._file,
        values=values,
    )


def _stacked(gguf: GGUFFile, name: str, found: dict[int, GGUFTensor]) -> GGUFTensor:
    count = int(gguf.key("expert_count", 0))
    if set(found) != set(range(count)):
        raise found[min(found)].error(
            expected=f"experts 0 to {count - 1}", found=f"{len(found)} of them, to {max(found)}"
        )
    members = [found[i] for i in range(count)]
    return _joined(name, members, (count, *members[0].shape))


def _join(tensors: dict[str, GGUFTensor], module: str, members: tuple[str, ...]) -> None:
    """Replace the members in each layer by their concatenation."""
    for name in [n for n in tensors if n.split(".", 2)[-1].rpartition(".")[0] == members[0]]:
        head, kind = name.split(".", 2)[:2], name.rpartition(".")[2]
        names = [".".join([*head, member, kind]) for member in members]
        whole = ".".join([*head, module, kind])
        if whole in tensors or any(n not in tensors for n in names):
            continue
        parts = [tensors.pop(n) for n in names]
        rows = sum(part.shape[0] for part in parts)
        tensors[whole] = _joined(whole, parts, (rows, *parts[0].shape[1:]))


def _joined(name: str, parts: list[GGUFTensor], shape: tuple[int, ...]) -> GGUFTensor:
    first = parts[0]
    stacked = len(shape) > len(first.shape)
    for part in parts[1:]:
        if part.shape != first.shape if stacked else part.shape[1:] != first.shape[1:]:
            raise part.error(expected=f"the shape of {first.name}", found=str(part.shape))
    same_type = all(part.type == first.type for part in parts)
    size = sum(part.nbytes if same_type else 4 * part.elements for part in parts)
    return JoinedTensor(
        name=name,
        shape=shape,
        type=first.type if same_type else GGMLType.F32,
        nbytes=size,
        offset=first.offset,
        path=first.path,
        entry=first.entry,
        _file=first._file,
        members=tuple(parts),
    )


@dataclass(frozen=True, slots=True, eq=False)
class GatheredTensor(GGUFTensor):
    """Some rows of another tensor.

    Attributes:
        indices: indices of the rows of ``source``, through a stack of matrices.
    """

    source: GGUFTensor | None = None
    indices: npt.NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))

    def raw(self) -> npt.NDArray[np.uint8]:
        assert self.source is not None
        rows = self.source.elements // self.source.shape[-1]
        return self.source.raw().reshape(rows, -1)[self.indices].reshape(-1)

    def stored_rows(self) -> npt.NDArray[np.uint8]:
        return self.raw().reshape(self.elements // self.shape[-1], -1)


@dataclass(frozen=True, slots=True)
class JoinedTensor(GGUFTensor):
    """The rows of several tensors, one after the other.

    Attributes:
        members: their common type is ``type``, else F32.
    """

    members: tuple[GGUFTensor, ...] = ()

    def raw(self) -> npt.NDArray[np.uint8]:
        if all(member.type == self.type for member in self.members):
            return np.concatenate([member.raw() for member in self.members])
        floats = [plain_floats(member).reshape(-1) for member in self.members]
        return np.concatenate(floats).view(np.uint8)

    def stored_rows(self) -> npt.NDArray[np.uint8]:
        return self.raw().reshape(self.elements // self.shape[-1], -1)


@dataclass(frozen=True, slots=True)
class MadeTensor(GGUFTensor):
    """A tensor of the model that is a key in the file."""

    values: npt.NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(0, np.float32), compare=False
    )

    def raw(self) -> npt.NDArray[np.uint8]:
        return self.values.reshape(-1).view(np.uint8)

    def stored_rows(self) -> npt.NDArray[np.uint8]:
        return self.raw().reshape(self.elements // self.shape[-1], -1)
