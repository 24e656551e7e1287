"""The one conversion: tensors of a source, each in its MLX form, written as a model directory.

:class:`Source` is a GGUF file (``gguf.source``) or a directory of safetensors
(``huggingface.source``). :func:`stream` encodes one tensor after the other, so that a conversion
needs the memory of a few of its largest tensors; :func:`convert` writes them, and the loader of
``mlxrun`` reads the same stream straight into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from converters.errors import CheckpointError, ConversionError, OutOfSpaceError, TargetExistsError
from converters.huggingface.reader import CONFIG
from converters.huggingface.writer import REPORT, CheckpointWriter, disk_errors
from converters.quantize.affine import Arrays
from converters.quantize.encode import Merge, Patch, PrepareMerge, workers
from converters.quantize.layout import Layout
from converters.report import ConversionReport, TensorRecord

T = TypeVar("T")
#: Called with (bytes read, bytes in all, tensor name) after each tensor.
Progress = Callable[[int, int, str], None]

# Tensors are started early, so that threads do not idle at the last chunks of one: at most three,
# two in work and one that is done, in this many bytes.
PREFETCH_BYTES = 1 << 26
_STARTED, _IN_WORK = 3, 2
# Few reads, as each waits for the interpreter's lock twice.
_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Converted:
    """One parameter of the model in MLX form.

    Attributes:
        target: Hugging Face parameter name, ending in ``.weight`` or ``.bias``.
        layout: its form.
        arrays: numpy arrays by suffix: ``weight`` (or ``bias``), ``scales``, ``biases`` and
            ``factor`` (of the whole matrix). bfloat16 travels as uint16 bit patterns.
        record: its line in the report; None for a parameter that the source does not store.
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


#: Begins in the caller's thread, where MLX reads arrays, and returns the rest of the work. Takes a
#: pool for chunks of rows, and the merge into the tensor's rows.
Start = Callable[[ThreadPoolExecutor, Patch | None], Callable[[], Converted]]


@dataclass(frozen=True)
class SourceTensor:
    """One parameter of the model that a source becomes.

    Attributes:
        name: in the source, for progress.
        target: its Hugging Face name.
        shape: of its weights, packed or not.
        nbytes: to read; 0 for a parameter that the source does not store.
        least_bytes: that its form takes at the least.
        start: its conversion.
    """

    name: str
    target: str
    shape: tuple[int, ...]
    nbytes: int
    least_bytes: float
    start: Start


class Source(Protocol):
    """A model to convert.

    Attributes:
        path: names the default target.
        inputs: all files that are read; none may lie in the target.
        weight_files: those with weights, which the report names with their SHA-256.
        config: ``config.json`` of the model that is written, without ``quantization``.
        dtype: of its floats, ``torch_dtype``.
        spec: the policy or recipe that chooses the forms, in words.
        tensors: in the order in which they are written.
        skipped: ``{"name", "type", "reason"}`` of tensors that have no place in the model.
    """

    path: Path
    inputs: Sequence[Path]
    weight_files: Sequence[Path]
    config: dict[str, Any]
    dtype: str
    spec: str
    tensors: Sequence[SourceTensor]
    skipped: list[dict[str, str]]

    def reading(self) -> AbstractContextManager[None]:
        """Turns failures to read tensors into errors with a hint."""

    def small_files(self) -> Iterable[tuple[str, bytes | str]]:
        """Names and contents of the tokenizer and other small files of the model."""

    def provenance(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        """The report's ``source``, given name, size and SHA-256 of the weight files."""


def convert(
    source: Source,
    dst: str | Path | None = None,
    *,
    overwrite: bool = False,
    merge: PrepareMerge | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a source to a model directory that mlxrun and stock mlx-lm load.

    Args:
        dst: directory to create; by default ``NAME-mlx`` in the working directory.
        overwrite: replace a directory that holds nothing but an earlier conversion, once the new
            one is complete.
        merge: prepares the merge into the weights of a model with a ``config.json``.

    Raises:
        AdapterError: the merge does not fit the model.
        ConversionError: weights cannot be read, or do not fit their form.
        TargetExistsError, OutOfSpaceError, CheckpointError: the target cannot be written.
    """
    started = time.perf_counter()
    merged = merge(source.config) if merge else None
    target = target_path(dst, source.path, source.inputs)
    report = ConversionReport({}, source.spec, skipped=source.skipped)
    tensors = source.tensors
    with (
        Hashing(source.weight_files) as hashing,
        CheckpointWriter(target, overwrite=overwrite, entries=3 * len(tensors)) as writer,
    ):
        _check_space(sum(tensor.least_bytes for tensor in tensors), target)
        with source.reading():
            layouts = _write(writer, stream(tensors, merge=merged, progress=progress), report)
        writer.flush()
        for name, data in source.small_files():
            writer.write_file(name, data)
        report.source = source.provenance(hashing.result())
        config = source.config | _quantization(layouts)
        config["torch_dtype"] = source.dtype
        writer.write_file(CONFIG, json.dumps(config, indent=2))
        report.files = [*writer.files, REPORT]
        writer.write_file(REPORT, report.to_json())
        writer.commit()
    report.path = str(target)
    report.seconds = time.perf_counter() - started
    return report


def stream(
    tensors: Sequence[SourceTensor],
    *,
    merge: Merge | None = None,
    progress: Progress | None = None,
) -> Generator[Converted, None, None]:
    """Convert tensor after tensor; close it to stop early, which ends its threads.

    Raises:
        AdapterError: the merge does not fit the model; raised before anything is converted.
        ConversionError: a tensor cannot be read, or holds values that no form can.
    """
    if merge:
        merge.check({tensor.target: tensor.shape for tensor in tensors if tensor.nbytes})
    sizes = [tensor.nbytes for tensor in tensors]
    done, total = 0, sum(sizes)
    with workers() as pool:

        def start(tensor: SourceTensor) -> Callable[[], Converted]:
            return tensor.start(pool, merge.patch(tensor.target) if merge else None)

        with closing(prefetch(map(start, tensors), sizes, PREFETCH_BYTES)) as results:
            for tensor, size, converted in zip(tensors, sizes, results, strict=True):
                yield converted
                done += size
                if progress and size:
                    progress(done, total, tensor.name)


def prefetch(
    tasks: Iterable[Callable[[], T]], sizes: Sequence[int], room: int
) -> Generator[T, None, None]:
    """Results in order; up to three tasks are started early, as long as ``room`` holds them.

    Args:
        tasks: taken one by one in the caller's thread, run in others.
        sizes: of each, in the units of ``room``. The next in turn is started whatever its size.
    """
    started: deque[tuple[int, Future[T]]] = deque()
    coming = zip(sizes, tasks, strict=True)
    following = next(coming, None)

    def fits(size: int) -> bool:
        return len(started) < _STARTED and sum(each for each, _ in started) + size <= room

    with ThreadPoolExecutor(_IN_WORK) as pool:
        try:
            while started or following:
                while following and (not started or fits(following[0])):
                    started.append((following[0], pool.submit(following[1])))
                    following = next(coming, None)
                yield started.popleft()[1].result()
        finally:
            for _, future in started:
                future.cancel()


def _write(
    writer: CheckpointWriter, tensors: Generator[Converted, None, None], report: ConversionReport
) -> dict[str, Layout]:
    """Write and record every tensor, one while the next is made; layouts of quantized modules."""
    layouts: dict[str, Layout] = {}

    def write(converted: Converted) -> None:
        for name, array, dtype in converted.named_arrays():
            writer.add(name, array, dtype)

    # Closing the stream ends its threads when a write fails. Tensors are made in this thread, as
    # MLX evaluates an array where its file was opened.
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


def _quantization(layouts: dict[str, Layout]) -> dict[str, Any]:
    """The ``quantization`` section of ``config.json``: the commonest form, and the exceptions."""
    if not layouts:
        return {}
    forms = {name: layout.module_config for name, layout in layouts.items()}
    common = Counter(tuple(form.items()) for form in forms.values()).most_common(1)[0][0]
    section: dict[str, Any] = dict(common)
    section |= {name: form for name, form in forms.items() if tuple(form.items()) != common}
    # Both names are in use: mlx-lm reads the first, Hugging Face's tools the second.
    return {"quantization": section, "quantization_config": section}


def target_path(dst: str | Path | None, source: Path, inputs: Iterable[Path] = ()) -> Path:
    """The target of a conversion, ``~`` expanded; by default ``NAME-mlx`` in the working directory.

    Args:
        source: names the default target.
        inputs: none of them may lie in the target, which may be replaced.
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
        inside = next((file for file in (source, *inputs) if _lies_in(file, target)), None)
    if inside:
        raise TargetExistsError(
            f"{target} holds {inside}, which is to be converted",
            hint="Choose another output with -o DIR, or move the source out of it",
        )
    return target


def _lies_in(file: Path, folder: Path) -> bool:
    """Whether a file, or the file that it links to, lies in a folder, whatever their names."""
    if not folder.exists():
        return False
    ways = (file.parent.resolve() / file.name, file.resolve())
    return any(place.samefile(folder) for way in ways for place in (way, *way.parents))


def _check_space(needed: float, target: Path) -> None:
    """Refuse early when the disk cannot hold ``needed`` bytes."""
    free = shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        raise OutOfSpaceError(
            f"{target.absolute().parent} has {_size(free)} free, "
            f"{target.name} needs at least {_size(needed)}",
            hint="Free some space or choose another disk with -o DIR",
        )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


class Hashing:
    """Names, sizes and SHA-256 of files, computed in a thread; leaving the context stops it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._entries = self._pool.submit(lambda files: [*map(self._entry, files)], tuple(paths))

    def _entry(self, path: Path) -> dict[str, Any]:
        digest, part = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE))
        try:
            with path.open("rb", buffering=0) as file:
                while not self._stopped.is_set() and (size := file.readinto(part)):
                    digest.update(part[:size])
            return {"name": path.name, "size": path.stat().st_size, "sha256": digest.hexdigest()}
        except OSError as error:  # the file was there when the conversion began
            raise ConversionError(
                f"cannot read {path}: {error.strerror or error}",
                hint="See that it is still there, and convert it again",
            ) from error

    def result(self) -> list[dict[str, Any]]:
        """An entry of each file, in order; ConversionError if one cannot be read."""
        return self._entries.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown()
