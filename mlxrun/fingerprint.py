"""A cheap fingerprint of a model, for session files.

Metadata, configs, tokenizers, templates and headers are hashed whole, of each tensor only its size
and bytes at its start, middle and end: a model of 10 GB takes some tens of milliseconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from converters.gguf.reader import read_gguf
from converters.huggingface.reader import read_header
from mlxrun.config import AdapterChoice
from mlxrun.errors import CacheError, MlxrunError
from mlxrun.model import Model
from mlxrun.weights.adapters import listed

# Bytes read of a tensor in each of three places, and of a file that is neither tensors nor text.
_SAMPLE = 4096
# Files of a directory besides its weights.
_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")


class ModelFingerprint:
    """The fingerprint of a model, computed at the first call.

    Args:
        paths: the files of a GGUF, or a model directory.
        adapter: applied to it.
        model: as loaded; its dtype and its size count as well.
        products: the option of that name, where it matters; see ``mlxrun.products``.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        adapter: AdapterChoice,
        model: Model[Any],
        products: str | None = None,
    ) -> None:
        adapters = listed(adapter)
        self._paths = [*paths, *(path for path, _ in adapters)]
        self._facts = [str(model.dtype), model.nbytes, [strength for _, strength in adapters]]
        self._facts += [products] if products else []
        self._stamps = [_stamp(file) for file in self._files()]
        self._digest: str | None = None

    def __call__(self) -> str:
        """The fingerprint, in hexadecimal.

        Raises:
            CacheError: the files have changed since the model was loaded, or cannot be read.
        """
        if self._digest is None:
            try:
                files = self._files()
                if [_stamp(file) for file in files] != self._stamps:
                    raise CacheError(
                        f"{self._paths[0]} has changed since it was loaded",
                        hint="Load the model again",
                    )
                self._digest = _hash(files, self._facts)
            except (OSError, MlxrunError) as error:
                raise CacheError(f"cannot compute the fingerprint of the model: {error}") from error
        return self._digest

    def _files(self) -> list[Path]:
        return [file for path in self._paths for file in _files_of(path)]


def _files_of(path: Path) -> list[Path]:
    """The files of a model or an adapter, in an order that does not depend on the system."""
    if not path.is_dir():
        return [path]
    patterns = ("*.safetensors", *_TEXTS)
    return sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _hash(files: list[Path], facts: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps(["mlxrun model", 1, facts]).encode())
    for file in files:
        size = file.stat().st_size
        name = file.name if file.suffix != ".gguf" else ""  # a file may be renamed
        digest.update(json.dumps([name, size]).encode())
        with file.open("rb") as data:
            for start, length in _ranges(file, size):
                data.seek(start)
                digest.update(data.read(length))
    return digest.hexdigest()


def _ranges(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """Starts and lengths of the bytes to hash: everything but the inside of tensors."""
    tensors = sorted(_tensors(file))
    if not tensors:
        yield 0, size
        return
    yield 0, tensors[0][0]
    for start, length in tensors:
        middle = start + max(0, length - _SAMPLE) // 2
        for begin in (start, middle, start + max(0, length - _SAMPLE)):
            yield begin, min(length, _SAMPLE)


def _tensors(file: Path) -> Iterator[tuple[int, int]]:
    """Start and length of each tensor of a file."""
    if file.suffix == ".gguf":
        own = file.resolve()
        for tensor in read_gguf(file).tensors:
            if tensor.path.resolve() == own:
                yield tensor.offset, tensor.nbytes
    elif file.suffix == ".safetensors":
        with file.open("rb") as data:
            start = 8 + int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(start - 8))
        for name in read_header(file):  # checks the header
            first, end = header[name]["data_offsets"]
            yield start + first, end - first
