"""The stream of converted tensors, and the sink that writes it to disk.

``stream`` yields one tensor at a time, so that a conversion needs the memory of a few of its
largest tensors. ``convert`` writes a checkpoint; the loader of ``mlxrun`` reads the same stream
straight into memory. Knows nothing of generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from converters.ahead import ahead
from converters.checkpoint import CheckpointWriter
from converters.errors import AdapterError, ConversionError, InexactError
from converters.gguf.names import Mapped, NameMap
from converters.gguf.reader import GGUFFile
from converters.gguf.source import open_gguf
from converters.gguf.types import GGMLType
from converters.quantize.encode import (
    Encoded,
    Merge,
    Patch,
    PrepareMerge,
    encode,
    in_order,
    least_bits,
    plain_floats,
    supported,
    workers,
)
from converters.quantize.layout import dense
from converters.quantize.policy import COMPACT_GROWTH, POLICIES, Policy, source_bits
from converters.report import ConversionReport, TensorRecord
from converters.sink import (
    Converted,
    Hashing,
    Progress,
    check_space,
    finish,
    quantization,
    target_path,
    write_tensors,
)


def half_dtype(gguf: GGUFFile) -> str:
    """The half-precision type that suits a file: its own if it has just one, else float16.

    Mixing the two halves makes MLX compute in float32, so one type serves the whole checkpoint.
    """
    kinds = {t.type for t in gguf.tensors if len(t.shape) > 1}
    return "bfloat16" if GGMLType.BF16 in kinds and kinds <= _BFLOAT_FILE else "float16"


# Tensors that are begun before the one in turn is done: threads do not wait for its last chunks.
AHEAD_BYTES = 1 << 26
_BFLOAT_FILE = {GGMLType.BF16, GGMLType.F32}


def stream(
    names: NameMap,
    policy: Policy,
    *,
    merge: Merge | None = None,
    progress: Progress | None = None,
) -> Generator[Converted, None, None]:
    """Convert tensor after tensor; whoever stops early closes it, for its threads to end.

    Args:
        merge: what is merged into the parameters on the way.
        progress: called with (bytes read, bytes in all, tensor name) after each tensor.

    Raises:
        InexactError: tensors are of types that no form can hold; raised before anything is
            converted.
        AdapterError: what is to be merged does not fit the model; raised as early.
        GGUFError: a tensor holds values that no form can keep.
    """
    _refuse(names)
    if merge:
        merge.check({mapped.target: mapped.shape for mapped in names.mapped})
    total = sum(m.source.nbytes for m in names.mapped)
    done = 0
    with workers() as pool:

        def start(mapped: Mapped) -> Callable[[], Converted]:
            patch = merge.patch(mapped.target) if merge else None
            return partial(_convert_one, mapped, policy, pool, patch)

        sizes = [mapped.source.nbytes for mapped in names.mapped]
        with closing(ahead(map(start, names.mapped), sizes, AHEAD_BYTES)) as results:
            for mapped, converted in zip(names.mapped, results, strict=True):
                yield converted
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
    mapped: Mapped, policy: Policy, pool: ThreadPoolExecutor, patch: Patch | None
) -> Converted:
    tensor = mapped.source
    if _is_rate(mapped):
        policy = replace(policy, name="exact")
    encoded = encode(
        tensor,
        policy,
        module=len(tensor.shape) > 1,
        pool=pool,
        change=mapped.change,
        factor=None if mapped.factor is None else plain_floats(mapped.factor).reshape(-1),
        patch=None if patch is None else _in_file_order(patch, mapped),
    )
    own = {name: array for name, array in encoded.arrays.items() if name == "factor"}
    arrays = {name: array for name, array in encoded.arrays.items() if name not in own}
    if mapped.order is not None:
        arrays = {name: array[mapped.order] for name, array in arrays.items()}
    if mapped.columns is not None:
        arrays = {name: _in_blocks(mapped, array) for name, array in arrays.items()}
    if mapped.shape != tensor.shape:
        arrays = {name: array.reshape(mapped.shape) for name, array in arrays.items()}
    arrays |= own
    return Converted(mapped.target, encoded.layout, arrays, _record(mapped, encoded, policy))


def _is_rate(mapped: Mapped) -> bool:
    """Whether these are rates of decay, one for each head: models take exponentials of them twice.

    Those of Mamba, a matrix, are left to the policy: its class of mlx-lm would compute everything
    after them in float32.
    """
    return mapped.target.endswith(".A_log") and len(mapped.shape) != 2


def _in_file_order(patch: Patch, mapped: Mapped) -> Patch:
    """The patch for the rows as the file has them."""
    if mapped.columns is not None:
        raise AdapterError(
            f"{mapped.target} is stored with its columns in another order: nothing can be merged "
            "into it",
            hint="Apply the adapter when the model is loaded instead",
        )
    return in_order(patch, mapped.order, mapped.source.shape[0])


def _in_blocks(mapped: Mapped, array: np.ndarray) -> np.ndarray:
    """An array (..., columns, or codes or scales of them) with its blocks in the model's order."""
    assert mapped.columns is not None
    blocks = len(mapped.columns)
    if array.shape[-1] % blocks:
        raise mapped.source.error(
            expected=f"columns that share no scale between {blocks} blocks",
            found=mapped.source.type.name,
        )
    parts = array.reshape(*array.shape[:-1], blocks, -1)
    return parts[..., mapped.columns, :].reshape(array.shape)


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
    merge: PrepareMerge | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a GGUF file to a model directory that mlxrun and stock mlx-lm load.

    Args:
        src: a ``.gguf`` file, or a shard of a split one.
        dst: directory to create; by default ``NAME-mlx`` in the working directory.
        policy: ``exact``, ``near`` or ``compact``; see :mod:`converters.quantize.policy`.
        overwrite: replace a directory that holds nothing but an earlier conversion, once the new
            one is complete.
        merge: gives what is merged into the weights of a model with a ``config.json``.
        progress: called with (bytes read, bytes in all, tensor name).

    Raises:
        GGUFError: the file is malformed.
        AdapterError: what is to be merged does not fit the model.
        UnsupportedArchitectureError: the architecture is unknown.
        InexactError: tensors are of types that no form can hold.
        TargetExistsError, OutOfSpaceError, CheckpointError: the target cannot be written.
    """
    started = time.perf_counter()
    policy = check_policy(policy)
    model = open_gguf(src)
    gguf, names, config = model.file, model.names, model.config
    merged = merge(config) if merge else None
    target = target_path(dst, gguf.path, gguf.paths)
    bound = Policy(policy, half_dtype(gguf))
    with (
        Hashing(gguf.paths) as hashing,
        CheckpointWriter(target, overwrite=overwrite, entries=3 * len(gguf.tensors)) as writer,
    ):
        check_space(_least_bytes(names, bound), target)
        tensors = stream(names, bound, merge=merged, progress=progress)
        report = _write(writer, gguf, names, bound, config, hashing, tensors)
    report.path = str(target)
    report.seconds = time.perf_counter() - started
    return report


def _least_bytes(names: NameMap, policy: Policy) -> float:
    """Bytes that the weights will take at the least."""
    kinds = [(m.source.type, len(m.source.shape) > 1, m.source.elements) for m in names.mapped]
    return sum(least_bits(kind, policy, module=module) * n / 8 for kind, module, n in kinds)


def _write(
    writer: CheckpointWriter,
    gguf: GGUFFile,
    names: NameMap,
    policy: Policy,
    config: dict[str, Any],
    hashing: Hashing,
    tensors: Generator[Converted, None, None],
) -> ConversionReport:
    report = ConversionReport({}, policy.name)
    layouts = write_tensors(writer, tensors, report)
    writer.flush()
    report.skipped = skipped(names)
    from converters.gguf.tokenizer import tokenizer_files

    tokens = tokenizer_files(gguf) if "tokenizer.ggml.model" in gguf.metadata else {}
    for name, data in tokens.items():
        writer.write_file(name, data)
    config |= quantization(layouts)
    config["torch_dtype"] = policy.half if policy.name != "exact" else "float32"
    report.source = _source(gguf, hashing.result())
    finish(writer, config, report)
    return report


def skipped(names: NameMap) -> list[dict[str, str]]:
    """The tensors without a place in the model, each with the reason."""
    return [{"name": t.name, "type": t.type.name, "reason": why} for t, why in names.skipped]


def _source(gguf: GGUFFile, files: list[dict[str, Any]]) -> dict[str, Any]:
    """What was read: names, sizes and SHA-256 of the files."""
    return {
        "format": f"GGUF v{gguf.version}",
        "architecture": gguf.architecture,
        "name": files[0]["name"],
        "sha256": files[0]["sha256"],
        "files": files,
    }


__all__ = ["Converted", "Progress", "convert", "half_dtype", "skipped", "stream"]
