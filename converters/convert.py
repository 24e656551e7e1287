"""The stream of converted tensors, and the sink that writes it to disk.

``stream`` yields one tensor at a time, so that a conversion needs the memory of a few of its
largest tensors. ``convert`` writes a checkpoint; the loader of ``mlxrun`` reads the same stream
straight into memory. Knows nothing of generation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import CheckpointWriter
from converters.encode import Encoded, encode, supported
from converters.errors import CheckpointError, ConversionError, InexactError, OutOfSpaceError
from converters.forms import Arrays
from converters.gguf.config import model_config
from converters.gguf.names import Mapped, NameMap, map_names
from converters.gguf.reader import GGUFFile, read_gguf
from converters.gguf.types import GGMLType
from converters.layout import Layout, dense
from converters.policy import COMPACT_GROWTH, POLICIES, Policy, source_bits
from converters.report import ConversionReport, TensorRecord

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Converted:
    """One parameter of the model in MLX form.

    Attributes:
        target: Hugging Face parameter name, ending in ``.weight`` or ``.bias``.
        layout: its form.
        arrays: numpy arrays by suffix: ``weight`` (or ``bias``), ``scales``, ``biases``. bfloat16
            travels as uint16 bit patterns.
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
            yield name, array, "uint32" if packed else self.layout.dtype


def half_dtype(gguf: GGUFFile) -> str:
    """The half-precision type that suits a file: its own if it has just one, else float16.

    Mixing the two halves makes MLX compute in float32, so one type serves the whole checkpoint.
    """
    kinds = {t.type for t in gguf.tensors if len(t.shape) > 1}
    return "bfloat16" if GGMLType.BF16 in kinds and kinds <= _BFLOAT_FILE else "float16"


_BFLOAT_FILE = {GGMLType.BF16, GGMLType.F32}


def stream(
    gguf: GGUFFile,
    names: NameMap,
    policy: Policy,
    *,
    progress: Progress | None = None,
) -> Iterator[Converted]:
    """Convert tensor after tensor.

    Args:
        progress: called with (bytes read, bytes in all, tensor name) after each tensor.

    Raises:
        InexactError: tensors are of types that no form can hold; raised before anything is
            converted.
        GGUFError: a tensor holds values that no form can keep.
    """
    _refuse(names)
    total = sum(m.source.nbytes for m in names.mapped)
    done = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for mapped in names.mapped:
            yield _convert_one(gguf, mapped, policy, pool)
            mapped.source.release()
            done += mapped.source.nbytes
            if progress:
                progress(done, total, mapped.source.name)
    for target, length in names.zeros:
        zeros = {"weight": np.zeros(length, _numpy_dtype(policy.half))}
        yield Converted(target, dense(policy.half), zeros, None)


def _numpy_dtype(dtype: str) -> str:
    return {"float32": "f4", "float16": "f2", "bfloat16": "u2"}[dtype]


def _refuse(names: NameMap) -> None:
    bad = [m.source for m in names.mapped if not supported(m.source.type)]
    if bad:
        raise InexactError(
            [(t.name, t.type.name, "no known meaning as weights") for t in bad],
            hint="Get the model in another quantisation: no policy can convert these",
        )


def _convert_one(
    gguf: GGUFFile, mapped: Mapped, policy: Policy, pool: ThreadPoolExecutor
) -> Converted:
    tensor = mapped.source
    module = len(tensor.shape) > 1
    encoded = encode(tensor, policy, module=module, pool=pool, subtract=mapped.subtract)
    arrays = encoded.arrays
    if mapped.permuted:
        order = _split_halves(tensor.shape[0], _head_dim(gguf))
        arrays = {name: array[order] for name, array in arrays.items()}
    if mapped.as_row:
        arrays = {name: array.reshape(1, -1) for name, array in arrays.items()}
    return Converted(mapped.target, encoded.layout, arrays, _record(mapped, encoded, policy))


def _head_dim(gguf: GGUFFile) -> int:
    heads = int(np.max(gguf.key("attention.head_count")))
    return int(gguf.key("attention.key_length", gguf.key("embedding_length") // heads))


def _split_halves(rows: int, head_dim: int) -> np.ndarray:
    """Row order that turns interleaved rotary pairs (2i, 2i+1) into halves (i, i + d/2)."""
    pairs = np.arange(rows).reshape(-1, head_dim // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _record(mapped: Mapped, encoded: Encoded, policy: Policy) -> TensorRecord:
    tensor = mapped.source
    before, after = source_bits(tensor.type), encoded.layout.bits_per_weight
    note = ""
    if policy.name == "compact" and after > before + COMPACT_GROWTH:
        note = f"MLX has no form below {after:g} bits a weight"
    return TensorRecord(
        name=tensor.name,
        target=mapped.target,
        type=tensor.type.name,
        form=str(encoded.layout),
        fidelity=encoded.fidelity,
        rmse=encoded.error.rmse,
        max_error=encoded.error.maximum,
        bits_before=before,
        bits_after=after,
        elements=tensor.elements,
        note=note,
    )


def check_policy(policy: str) -> str:
    """The policy's name, if it is one."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ConversionError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    return policy


def convert(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    policy: str = "near",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a GGUF file to a model directory that mlxrun and stock mlx-lm load.

    Args:
        src: a ``.gguf`` file, or a shard of a split one.
        dst: directory to create; by default ``NAME-mlx`` in the working directory.
        policy: ``exact``, ``near`` or ``compact``; see :mod:`converters.policy`.
        overwrite: replace an existing model directory once the new one is complete.
        progress: called with (bytes read, bytes in all, tensor name).

    Raises:
        GGUFError: the file is malformed.
        UnsupportedArchitectureError: the architecture is unknown.
        InexactError: tensors are of types that no form can hold.
        TargetExistsError, OutOfSpaceError, CheckpointError: the target cannot be written.
    """
    started = time.perf_counter()
    policy = check_policy(policy)
    gguf = read_gguf(src)
    names, config = map_names(gguf), model_config(gguf)
    target = _expanded(dst) if dst is not None else default_target(gguf.path)
    bound = Policy(policy, half_dtype(gguf))
    with (
        ThreadPoolExecutor(1) as hasher,
        CheckpointWriter(target, overwrite=overwrite, entries=3 * len(gguf.tensors)) as writer,
    ):
        _check_space(gguf, target)
        source = hasher.submit(_source, gguf)
        report = _write(writer, gguf, names, bound, config, source, progress)
        writer.commit()
    report.path = str(target)
    report.seconds = time.perf_counter() - started
    return report


def _expanded(dst: str | Path) -> Path:
    """The path, with ``~`` in front replaced by the home directory."""
    if not isinstance(dst, str | os.PathLike):
        raise CheckpointError(f"the target must be a path, not {dst!r}")
    try:
        return Path(dst).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"cannot write {dst}: {error}") from error


def _write(
    writer: CheckpointWriter,
    gguf: GGUFFile,
    names: NameMap,
    policy: Policy,
    config: dict[str, Any],
    source: Future[dict[str, Any]],
    progress: Progress | None,
) -> ConversionReport:
    report = ConversionReport({}, policy.name)
    layouts: dict[str, Layout] = {}
    for converted in _one_ahead(stream(gguf, names, policy, progress=progress)):
        for name, array, dtype in converted.named_arrays():
            writer.add(name, array, dtype)
        if converted.layout.quantized:
            layouts[converted.target.removesuffix(".weight")] = converted.layout
        if converted.record:
            report.tensors.append(converted.record)
    report.skipped = skipped(names)
    report.source = source.result()
    from converters.gguf.tokenizer import tokenizer_files

    tokens = tokenizer_files(gguf) if "tokenizer.ggml.model" in gguf.metadata else {}
    for name, data in tokens.items():
        writer.write_file(name, data)
    config |= quantization(layouts)
    config["torch_dtype"] = policy.half if policy.name != "exact" else "float32"
    writer.write_file("config.json", json.dumps(config, indent=2))
    writer.write_file("conversion.json", report.to_json())
    return report


def _one_ahead(items: Iterator[Converted]) -> Iterator[Converted]:
    """The same items, the next one being made while the caller writes this one."""
    with ThreadPoolExecutor(1) as maker:
        upcoming = maker.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = maker.submit(next, items, None)
            yield item


def skipped(names: NameMap) -> list[dict[str, str]]:
    """The tensors without a place in the model, each with the reason."""
    return [{"name": t.name, "type": t.type.name, "reason": why} for t, why in names.skipped]


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


def default_target(path: Path) -> Path:
    """Where a conversion goes when nobody says: ``NAME-mlx`` in the working directory."""
    return Path(f"{path.stem}-mlx")


def _source(gguf: GGUFFile) -> dict[str, Any]:
    """Names, sizes and SHA-256 of the files that are read."""
    files = []
    for path in gguf.paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append({"name": path.name, "size": path.stat().st_size, "sha256": digest})
    return {
        "format": f"GGUF v{gguf.version}",
        "architecture": gguf.architecture,
        "name": files[0]["name"],
        "sha256": files[0]["sha256"],
        "files": files,
    }


def _check_space(gguf: GGUFFile, target: Path) -> None:
    """Refuse early when the disk cannot even hold what the file itself takes."""
    needed = sum(t.nbytes for t in gguf.tensors)
    free = shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        raise OutOfSpaceError(
            f"{target.absolute().parent} has {free / 1e9:.1f} GB free, "
            f"{target.name} needs at least {needed / 1e9:.1f} GB",
            hint="Free some space or choose another disk with -o DIR",
        )


__all__ = ["Converted", "Progress", "convert", "half_dtype", "skipped", "stream"]
