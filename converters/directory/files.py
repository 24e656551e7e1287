"""The files of a model directory: its configuration, its weights, and what else is there.

Decides which files hold the weights and says why others do not count. Knows nothing of what the
weights mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.directory.header import DTYPES, StoredArray, read_header
from converters.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights of a directory are.

    Attributes:
        paths: safetensors files, in order.
        headers: arrays by name, for each file.
        left_out: ``{"name", "type", "reason"}`` of files that look like weights and are not read.
    """

    paths: tuple[Path, ...]
    headers: tuple[Mapping[str, StoredArray], ...]
    left_out: list[dict[str, str]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for header in self.headers for entry in header.values())

    @property
    def entries(self) -> dict[str, StoredArray]:
        return {name: entry for header in self.headers for name, entry in header.items()}


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a directory.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{path} is not a model directory: it has no config.json",
            hint="Give a .gguf file, a model directory or org/repo",
        )
    return read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value


def weight_files(path: Path) -> WeightFiles:
    """The safetensors files of a directory, their headers read and checked.

    Raises:
        CheckpointError: there are none, one is missing or damaged, or two hold the same array.
    """
    paths = [path / name for name in indexed_names(path)] or sorted(path.glob("model*.safetensors"))
    if not paths:
        raise _without_weights(path)
    for file in paths:
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {file.name}", hint="Download it again")
    headers = tuple(read_header(file) for file in paths)
    homes: dict[str, str] = {}
    for file, header in zip(paths, headers, strict=True):
        for name, entry in header.items():
            if name in homes:
                raise CheckpointError(
                    f"{path}: both {homes[name]} and {file.name} hold {name}",
                    hint="Files of two versions are mixed: remove those that do not belong",
                )
            homes[name] = file.name
            if entry.dtype not in DTYPES:
                raise CheckpointError(f"{file.name}: {name} is stored as {entry.dtype}")
    return WeightFiles(tuple(paths), headers, _left_out(path, paths))


def indexed_names(path: Path) -> list[str]:
    """The files that a directory's index names; none where there is no index.

    Raises:
        CheckpointError: the index is damaged.
    """
    index = path / INDEX
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(_plain_name(name) for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"cannot read {index}: {error}") from error


def _plain_name(name: str) -> str:
    """A file's name that does not lead out of its directory."""
    if Path(name).name != name or len(name) > 255 or "\0" in name:
        raise ValueError(f"{name[:80]!r} is no file of this directory")
    return name


def _without_weights(path: Path) -> CheckpointError:
    """Why a directory without model*.safetensors cannot be read, and what to do."""
    found = {file.suffix: file.name for file in sorted(path.iterdir()) if file.is_file()}
    message = f"{path} has no model*.safetensors"
    for suffix in (".bin", ".pt", ".pth"):
        if suffix in found:
            return CheckpointError(
                f"{message}, only PyTorch files such as {found[suffix]}",
                hint="They can run code when they are read, so mlxrun does not read them: get a "
                "safetensors version, or save one with save_pretrained(safe_serialization=True)",
            )
    if ".safetensors" in found:
        return CheckpointError(
            f"{message}, only {found['.safetensors']}, which is of another layout",
            hint="Get the version for transformers, whose files are called model*.safetensors",
        )
    if ".gguf" in found:
        return CheckpointError(f"{message}", hint=f"Give {path / found['.gguf']} itself")
    return CheckpointError(message, hint="Only safetensors weights are read")


_OTHER_WEIGHTS = {
    ".safetensors": "not one of the files that hold the model's weights",
    ".bin": "PyTorch weights are not read, the safetensors files are",
    ".pt": "PyTorch weights are not read, the safetensors files are",
    ".pth": "PyTorch weights are not read, the safetensors files are",
    ".gguf": "the safetensors files are read instead; name the file to convert it",
    ".py": "code is neither run nor copied",
}


def _left_out(path: Path, used: list[Path]) -> list[dict[str, str]]:
    return [
        {"name": file.name, "type": "file", "reason": _OTHER_WEIGHTS[file.suffix]}
        for file in sorted(path.iterdir())
        if file.suffix in _OTHER_WEIGHTS and file not in used
    ]
