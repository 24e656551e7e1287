"""Write a model directory: sharded safetensors, their index, and small files, all or nothing.

Everything goes to a hidden sibling directory that takes the final name only when it is complete, so
a killed conversion leaves nothing under that name. Knows files; knows nothing of models.

Format: https://github.com/huggingface/safetensors (a little-endian header length, a JSON header,
the arrays one after another).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from converters.errors import CheckpointError, OutOfSpaceError, TargetExistsError

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
    """Turn the operating system's refusals to write into errors that say what to do."""
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
        """Let the disk begin: what is written so far is flushed while more is made."""
        self._flushes.append(self._flusher.submit(os.fsync, self.file.fileno()))

    def abandon(self) -> None:
        """Close the file as it is."""
        self._flusher.shutdown()
        self.file.close()

    def close(self) -> None:
        for flush in self._flushes:  # the system tells what a flush failed with only once
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
        overwrite: replace an existing directory (only when the new one is complete).
        entries: how many arrays will be added at most; sizes the header's room.

    Raises:
        TargetExistsError: ``path`` exists and ``overwrite`` is false.
        OutOfSpaceError: the disk is full.
        CheckpointError: the directory cannot be written.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, entries: int = 10_000) -> None:
        self.path = path.absolute()
        self.overwrite = overwrite
        self._header_bytes = -(-max(1, entries) * 256 // _HEADER_STEP) * _HEADER_STEP
        self._shards: list[_Shard] = []
        with disk_errors(self.path):  # a name that the file system does not take
            if self.path.is_symlink():
                self.path = self.path.resolve()
            self._check_target()
            self._partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")

    def _check_target(self) -> None:
        if not self.path.exists():
            return
        if self.overwrite and (strange := _strange(self.path)):
            raise TargetExistsError(
                f"{self.path} exists and is not a model directory: {strange}",
                hint="Choose another output; only a converted model is ever replaced",
            )
        if not self.overwrite:
            raise TargetExistsError(
                f"{self.path} already exists",
                hint="Choose another output with -o DIR, or replace it with --overwrite",
            )

    def __enter__(self) -> CheckpointWriter:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.path)
            self._check_target()
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir()
        return self

    def add(self, name: str, array: npt.NDArray[np.generic], dtype: str) -> None:
        """Append one array; ``dtype`` is its MLX type (bfloat16 travels as uint16)."""
        with disk_errors(self.path):
            if not self._shards or self._shards[-1].size + array.nbytes > SHARD_BYTES > 0:
                self._next_shard()
            self._shards[-1].add(name, array, dtype)

    def flush(self) -> None:
        """Let the disk begin with the last arrays, while small files are made."""
        if self._shards:
            self._shards[-1].flush_behind()

    def _next_shard(self) -> None:
        if self._shards and not self._shards[-1].size:
            return
        if self._shards:
            self._shards[-1].close()
        path = self._partial / f"shard-{len(self._shards)}"
        self._shards.append(_Shard(path, self._header_bytes))

    def write_file(self, name: str, data: bytes | str) -> None:
        """Write one small file into the directory, or into a folder of it."""
        path = self._partial / name
        if ".." in path.parts or not path.is_relative_to(self._partial):
            raise CheckpointError(f"{name!r} is no file of a model directory")
        with disk_errors(self.path):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data.encode() if isinstance(data, str) else data)

    def commit(self) -> None:
        """Finish the shards, write their index, and give the directory its name."""
        with disk_errors(self.path):
            if self._shards:
                self._shards[-1].close()
            total, count = sum(s.size for s in self._shards), len(self._shards)
            weight_map: dict[str, str] = {}
            for number, shard in enumerate(self._shards, 1):
                name = (
                    "model.safetensors"
                    if count == 1
                    else f"model-{number:05}-of-{count:05}.safetensors"
                )
                shard.path.rename(self._partial / name)
                weight_map |= {k: name for k in shard.entries if k != "__metadata__"}
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            self.write_file("model.safetensors.index.json", json.dumps(index, indent=1))
            self._publish()

    def _publish(self) -> None:
        old = self._partial.with_name(self._partial.name + "-old")
        if self.path.exists():
            self._check_target()  # somebody else may have made it meanwhile
            self.path.rename(old)
        try:
            self._partial.rename(self.path)
        except BaseException:
            if old.exists() and not self.path.exists():
                old.rename(self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for shard in self._shards:
            with contextlib.suppress(OSError):
                shard.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)


# What model directories have, other tools' among them; adapters are somebody's work.
_PARTS = re.compile(
    r"(?!adapter).+\.(json|safetensors|jinja|model|tiktoken)|(merges|vocab|added_tokens)\.txt"
    r"|(README|LICENSE|USE_POLICY)(\.\w+)?|\.gitattributes|additional_chat_templates",
    re.IGNORECASE,
)


def _strange(path: Path) -> str | None:
    """Why a path is no model, or not only one; None of a model, or where there is nothing."""
    if not any_entries(path):
        return None
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if "config.json" not in names:
        return "it has no config.json"
    found = next((name for name in names if not _PARTS.fullmatch(name)), None)
    return f"it holds {found}" if found else None


def any_entries(path: Path) -> bool:
    """Whether a path is a file or a directory with something in it."""
    return not path.is_dir() or any(path.iterdir())


def _sweep(path: Path) -> None:
    """Remove what killed conversions to the same target left behind.

    A model that was being replaced when its conversion was killed gets its name back.
    """
    prefix = f".{path.name}.partial-"
    for stale in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        pid = stale.name.removeprefix(prefix).removesuffix("-old")
        if not pid.isdecimal() or _alive(int(pid)):
            continue
        if stale.name.endswith("-old") and not path.exists():
            stale.rename(path)
        else:
            shutil.rmtree(stale, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or more than a process is ever called
        return True
    return True
