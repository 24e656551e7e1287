"""Where converted tensors go: from a stream of them to a model directory on disk.

Shared by every kind of source. Knows forms and files; knows nothing of where tensors come from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from converters.checkpoint import REPORT, CheckpointWriter, disk_errors
from converters.directory.files import CONFIG
from converters.errors import (
    CheckpointError,
    ConversionError,
    OutOfSpaceError,
    TargetExistsError,
)
from converters.quantize.affine import Arrays
from converters.quantize.layout import Layout
from converters.report import ConversionReport, TensorRecord

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Converted:
    """One parameter of the model in MLX form.

    Attributes:
        target: Hugging Face parameter name, ending in ``.weight`` or ``.bias``.
        layout: its form.
        arrays: numpy arrays by suffix: ``weight`` (or ``bias``), ``scales``, ``biases`` and
            ``factor`` (of the whole matrix). bfloat16 travels as uint16 bit patterns.
        record: its line in the report.
    """

    target: str
    layout: Layout
    arrays: Arrays
    record: TensorRecord | None

    def named_arrays(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """(full name, array, MLX dtype) of each array."""
        module, _, kind = self.target.rpartition(".")
        for suffix, array in self.arrays.items():
            name = f"{module}.{kind if suffix == 'weight' else suffix}"
            packed = suffix == "weight" and self.layout.quantized
            own = "float32" if suffix == "factor" else self.layout.dtype
            yield name, array, "uint32" if packed else own


def write_tensors(
    writer: CheckpointWriter,
    tensors: Generator[Converted, None, None],
    report: ConversionReport,
) -> dict[str, Layout]:
    """Write every tensor and record it; one is written while the next is made.

    Args:
        tensors: closed in the end, so that its threads do not outlive a failure.

    Returns:
        The layouts of quantised modules.
    """
    layouts: dict[str, Layout] = {}

    def write(converted: Converted) -> None:
        for name, array, dtype in converted.named_arrays():
            writer.add(name, array, dtype)

    # The caller's thread makes them: MLX evaluates an array where its file was opened.
    with closing(tensors), ThreadPoolExecutor(1) as pool:
        previous: Future[None] | None = None
        for converted in tensors:
            if previous:
                previous.result()
            previous = pool.submit(write, converted)
            if converted.layout.quantized:
                layouts[converted.target.removesuffix(".weight")] = converted.layout
            if converted.record:
                report.tensors.append(converted.record)
        if previous:
            previous.result()
    return layouts


def finish(writer: CheckpointWriter, config: dict[str, Any], report: ConversionReport) -> None:
    """Write the configuration and the report, and give the directory its name."""
    writer.write_file(CONFIG, json.dumps(config, indent=2))
    report.files = [*writer.files, REPORT]
    writer.write_file(REPORT, report.to_json())
    writer.commit()


def quantization(layouts: dict[str, Layout]) -> dict[str, Any]:
    """The ``quantization`` section of ``config.json``: the commonest form, and who differs."""
    if not layouts:
        return {}
    forms = {name: layout.module_config for name, layout in layouts.items()}
    common = Counter(tuple(form.items()) for form in forms.values()).most_common(1)[0][0]
    section: dict[str, Any] = dict(common)
    section |= {name: form for name, form in forms.items() if tuple(form.items()) != common}
    # Both names are in use: mlx-lm reads the first, Hugging Face's tools the second.
    return {"quantization": section, "quantization_config": section}


def target_path(dst: str | Path | None, source: Path, files: Iterable[Path] = ()) -> Path:
    """Where a conversion goes, ``~`` expanded; by default ``NAME-mlx`` in the working directory.

    Args:
        source: what is converted, named as the default target is to be.
        files: what else is read; none of it may lie in the target, which may be replaced.

    Raises:
        CheckpointError: this is no path, or there is no such home directory.
        TargetExistsError: what is converted lies in the target, or is the target.
    """
    if dst is None:
        dst = f"{source.stem if source.suffix == '.gguf' else source.name}-mlx"
    if not isinstance(dst, str | os.PathLike):
        raise CheckpointError(f"the target must be a path, not {dst!r}")
    try:
        target = Path(dst).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"cannot write {dst}: {error}") from error
    with disk_errors(target):
        inside = next((file for file in (source, *files) if _lies_in(file, target)), None)
    if inside:
        raise TargetExistsError(
            f"{target} holds {inside}, which is to be converted",
            hint="Choose another output with -o DIR, or move the source out of it",
        )
    return target


def _lies_in(file: Path, folder: Path) -> bool:
    """Whether a file, or what it links to, would go with a folder, whatever either is called."""
    if not folder.exists():
        return False
    ways = (file.parent.resolve() / file.name, file.resolve())
    return any(place.samefile(folder) for way in ways for place in (way, *way.parents))


class Hashing:
    """Names, sizes and SHA-256 of files, computed meanwhile; leaving the context gives up."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(self._run)

    def _run(self) -> list[dict[str, Any]]:
        return [self._entry(path) for path in self._paths]

    def _entry(self, path: Path) -> dict[str, Any]:
        try:
            size, digest = path.stat().st_size, self._digest(path)
        except OSError as error:  # the source has been there when the conversion began
            raise ConversionError(
                f"cannot read {path}: {error.strerror or error}",
                hint="See that it is still there, and convert it again",
            ) from error
        return {"name": path.name, "size": size, "sha256": digest}

    def _digest(self, path: Path) -> str:
        digest, part = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE))
        with path.open("rb", buffering=0) as file:
            while not self._stopped.is_set() and (size := file.readinto(part)):
                digest.update(part[:size])
        return digest.hexdigest()

    def result(self) -> list[dict[str, Any]]:
        """A dictionary of each file, in order; waits for them.

        Raises:
            ConversionError: a file cannot be read.
        """
        return self._future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown()


# Few parts: each of them has to wait for the interpreter twice.
_HASHED_AT_ONCE = 1 << 20


def check_space(needed: float, target: Path) -> None:
    """Refuse early when the disk cannot hold ``needed`` bytes.

    Raises:
        OutOfSpaceError: it cannot.
    """
    free = shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        raise OutOfSpaceError(
            f"{target.absolute().parent} has {_size(free)} free, "
            f"{target.name} needs at least {_size(needed)}",
            hint="Free some space or choose another disk with -o DIR",
        )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
