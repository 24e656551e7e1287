"""Write a model directory: sharded safetensors, their index, and small files, all or nothing.

Everything goes to a hidden sibling directory that takes the final name when it is complete
(``staging``): a killed conversion leaves the final name as it was.

Format: https://github.com/huggingface/safetensors (a little-endian header length, a JSON header,
the arrays one after another).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from converters.errors import CheckpointError, OutOfSpaceError, TargetExistsError
from converters.huggingface.reader import (
    CONFIG,
    INDEX,
    indexed_names,
    read_object,
    small_file_paths,
)
from converters.staging import follow, publish, staged, sync_folder

# A conversion's report, which lists the files that it wrote.
REPORT = "conversion.json"
SHARD_BYTES = 5 << 30
# Room kept for a shard's header; it is written last, when the offsets are known, and padded.
_HEADER_STEP = 1 << 20
_FLUSHED_AT_ONCE = 1 << 27
# Linux backs a longer write by longer runs of memory, which are rarer: 5 MB at a time took three
# times as long.
_WRITTEN_AT_ONCE = 1 << 18

_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "uint8": "U8",
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's failures to write into errors with a hint."""
    try:
        yield
    except ValueError as error:  # a path with a null byte
        raise CheckpointError(f"cannot write {str(path)!r}: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpaceError(
                f"the disk is full while writing {path}", hint="Free some space or choose -o DIR"
            ) from error
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


class _Shard:
    """One safetensors file being written; its header has a fixed room at the front."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path = path
        self.header_bytes = header_bytes
        self.entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        self.size = 0
        self.file: BinaryIO = path.open("wb")
        self.file.seek(8 + header_bytes)
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []
        self._flush_at = _FLUSHED_AT_ONCE

    def add(self, name: str, array: npt.NDArray[np.generic], dtype: str) -> None:
        begin, self.size = self.size, self.size + array.nbytes
        self.entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, self.size],
        }
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, len(data), _WRITTEN_AT_ONCE):
            self.file.write(data[start : start + _WRITTEN_AT_ONCE].data)
        if self.size >= self._flush_at:
            if all(flush.done() for flush in self._flushes):
                self.flush_behind()
            self._flush_at = self.size + _FLUSHED_AT_ONCE

    def flush_behind(self) -> None:
        """Flush the bytes so far in a thread of its own."""
        self._flushes.append(self._flusher.submit(os.fsync, self.file.fileno()))

    def abandon(self) -> None:
        """Close the file as it is."""
        self._flusher.shutdown()
        self.file.close()

    def close(self) -> None:
        for flush in self._flushes:  # the system reports a failed flush only once
            flush.result()
        header = json.dumps(self.entries, separators=(",", ":")).encode()
        if len(header) > self.header_bytes:
            raise CheckpointError(f"{self.path.name}: the header outgrew {self.header_bytes} bytes")
        self.file.seek(0)
        self.file.write(self.header_bytes.to_bytes(8, "little"))
        self.file.write(header.ljust(self.header_bytes))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.abandon()


class CheckpointWriter:
    """A context manager that writes one model directory.

    Args:
        path: the directory to create.
        overwrite: replace a directory that holds nothing but an earlier conversion, once the new
            one is complete.
        entries: how many arrays will be added at most; sizes the header's room.

    Attributes:
        files: names of the small files written so far.

    Raises:
        TargetExistsError: ``path`` exists, and ``overwrite`` is false or it holds something else.
        OutOfSpaceError: the disk is full.
        CheckpointError: the directory cannot be written.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, entries: int = 10_000) -> None:
        self.path = path.absolute()
        self.overwrite = overwrite
        self.files: list[str] = []
        self._header_bytes = -(-max(1, entries) * 256 // _HEADER_STEP) * _HEADER_STEP
        self._shards: list[_Shard] = []
        with disk_errors(self.path):  # a name that the file system does not take
            if self.path.is_symlink():
                self.path = follow(self.path)
            self._check_target()

    def _check_target(self) -> None:
        if not self.path.exists():
            return
        if self.overwrite and (reason := _not_ours(self.path)):
            raise TargetExistsError(
                f"{self.path} was not replaced: {reason}",
                hint="Choose another output with -o DIR, or move that elsewhere",
            )
        if not self.overwrite:
            raise TargetExistsError(
                f"{self.path} already exists",
                hint="Choose another output with -o DIR, or replace it with --overwrite",
            )

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                self._partial = stack.enter_context(staged(self.path, directory=True))
                self._check_target()  # a model that was set aside may be back
                self._staged = stack.pop_all()
        return self

    def add(self, name: str, array: npt.NDArray[np.generic], dtype: str) -> None:
        """Append one array; ``dtype`` is its MLX type (bfloat16 travels as uint16)."""
        with disk_errors(self.path):
            full = self._shards and self._shards[-1].size + array.nbytes > SHARD_BYTES > 0
            if full and self._shards[-1].size:
                self._shards[-1].close()
            if not self._shards or self._shards[-1].file.closed:
                path = self._partial / f"shard-{len(self._shards)}"
                self._shards.append(_Shard(path, self._header_bytes))
            self._shards[-1].add(name, array, dtype)

    def flush(self) -> None:
        """Flush the last arrays while small files are made."""
        if self._shards:
            self._shards[-1].flush_behind()

    def write_file(self, name: str, data: bytes | str) -> None:
        """Write one small file into the directory, or into a folder of it."""
        path = self._partial / name
        if ".." in path.parts or not path.is_relative_to(self._partial):
            raise CheckpointError(f"{name!r} is no file of a model directory")
        with disk_errors(self.path):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        self.files.append(name)

    def commit(self) -> None:
        """Finish the shards, write their index, and give the directory its name."""
        with disk_errors(self.path):
            if self._shards:
                self._shards[-1].close()
            total, count = sum(s.size for s in self._shards), len(self._shards)
            weight_map: dict[str, str] = {}
            for number, shard in enumerate(self._shards, 1):
                part = f"-{number:05}-of-{count:05}" if count > 1 else ""
                name = f"model{part}.safetensors"
                shard.path.rename(self._partial / name)
                weight_map |= {k: name for k in shard.entries if k != "__metadata__"}
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            self.write_file(INDEX, json.dumps(index, indent=1))
            self._sync_files()
            self._check_target()  # another process may have made it meanwhile
            publish(self._partial, self.path)

    def _sync_files(self) -> None:
        """Have the small files outlast a power failure; shards do already."""
        paths = [self._partial / name for name in self.files]
        for path in paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for folder in {self._partial, *(path.parent for path in paths)}:
            sync_folder(folder)

    def __exit__(self, *_: object) -> None:
        for shard in self._shards:
            with contextlib.suppress(OSError):
                shard.abandon()
        self._staged.close()


def _not_ours(path: Path) -> str | None:
    """Why a conversion may not replace a path; None where an earlier one wrote all of it."""
    if not path.is_dir():
        return "it is no directory"
    if not any(path.iterdir()):
        return None
    if not (path / REPORT).is_file():
        return f"it has no {REPORT}, which every conversion writes"
    other = next(_other_files(path, _written(path)), None)
    return f"it holds {other}, which no conversion wrote" if other else None


def _written(path: Path) -> set[str]:
    """The files of a directory that a conversion wrote, by its report and its index."""
    weights: list[str] = []
    listed = None
    with contextlib.suppress(CheckpointError):
        listed = read_object(path / REPORT).get("files")
    with contextlib.suppress(CheckpointError):
        weights = indexed_names(path)
    if not isinstance(listed, list):  # before reports listed them
        listed = [CONFIG, *(file.relative_to(path).as_posix() for file in small_file_paths(path))]
    return {REPORT, INDEX, *weights, *map(str, listed)}


def _other_files(path: Path, known: set[str]) -> Iterator[str]:
    """Other files in a directory, at any depth."""
    known = known | {Path(name).parent.as_posix() for name in known}
    for folder, directories, files in os.walk(path):
        for name in sorted([*directories, *files]):
            own = (Path(folder) / name).relative_to(path)
            # Files of macOS's Finder, in folders that it has shown and next to files elsewhere.
            finder = (
                name == ".DS_Store" or own.with_name(name.removeprefix("._")).as_posix() in known
            )
            if own.as_posix() not in known and not finder:
                yield own.as_posix()
