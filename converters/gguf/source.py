"""A GGUF opened as a model, and as the source of a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.architectures.config import hf_config
from converters.architectures.hyperparameters import Config
from converters.architectures.mapping import (
    Mapped,
    NameMap,
    architecture_of,
    map_tensors,
    regroup,
)
from converters.convert import Converted, SourceTensor
from converters.errors import AdapterError, InexactError
from converters.gguf.reader import GGUFFile, read_gguf
from converters.gguf.types import GGMLType
from converters.quantize.affine import Arrays
from converters.quantize.encode import (
    Encoded,
    Patch,
    encode,
    least_bits,
    plain_floats,
    supported,
)
from converters.quantize.layout import dense
from converters.quantize.policy import COMPACT_GROWTH, Policy, check_policy, source_bits
from converters.report import TensorRecord

_BFLOAT_FILE = {GGMLType.BF16, GGMLType.F32}
_NUMPY_TYPES = {"float32": "f4", "float16": "f2", "bfloat16": "u2"}


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF, its names and its config worked out once.

    Attributes:
        file: as it is on disk.
        names: each tensor's parameter.
        config: ``config.json`` in Hugging Face terms, without its ``quantization`` section.
    """

    file: GGUFFile
    names: NameMap
    config: Config


def open_gguf(source: str | Path | GGUFFile) -> GGUFModel:
    """Read and map the header of a GGUF; no tensor is read.

    Raises:
        UnsupportedArchitectureError: the architecture is unknown.
        GGUFError: the header is malformed, a tensor or a hyperparameter is missing, or they
            contradict each other.
    """
    file = source if isinstance(source, GGUFFile) else read_gguf(source)
    architecture = architecture_of(file)
    grouped = regroup(file, architecture)
    config = hf_config(grouped, architecture)
    return GGUFModel(file, map_tensors(grouped, architecture), config)


def half_dtype(gguf: GGUFFile) -> str:
    """The half precision of a file's checkpoint: its own type if it has just one, else float16.

    Mixing the two halves makes MLX compute in float32.
    """
    kinds = {t.type for t in gguf.tensors if len(t.shape) > 1}
    return "bfloat16" if GGMLType.BF16 in kinds and kinds <= _BFLOAT_FILE else "float16"


def skipped(names: NameMap) -> list[dict[str, str]]:
    """The tensors that the model has no place for, each with the reason."""
    return [{"name": t.name, "type": t.type.name, "reason": why} for t, why in names.skipped]


class GGUFSource:
    """A GGUF file, or a split one, to convert; see :class:`converters.convert.Source`.

    Args:
        path: the file, or a shard of a split one.
        policy: ``exact``, ``near`` or ``compact``; see :mod:`converters.quantize.policy`.

    Raises:
        ConversionError: there is no such policy.
        GGUFError: the file is malformed.
        UnsupportedArchitectureError: the architecture is unknown.
        InexactError: no form holds the weights of some types.
    """

    def __init__(self, path: str | Path, policy: str = "near") -> None:
        check_policy(policy)
        model = open_gguf(path)
        self._file = model.file
        half = half_dtype(model.file)
        self.path = model.file.path
        self.inputs: Sequence[Path] = model.file.paths
        self.weight_files: Sequence[Path] = model.file.paths
        self.config = model.config
        self.dtype = "float32" if policy == "exact" else half
        self.spec = policy
        self.tensors: Sequence[SourceTensor] = gguf_tensors(model.names, Policy(policy, half))
        self.skipped = skipped(model.names)

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def small_files(self) -> Iterator[tuple[str, bytes | str]]:
        from converters.huggingface.tokenizer_files import tokenizer_files

        if "tokenizer.ggml.model" in self._file.metadata:
            yield from tokenizer_files(self._file).items()

    def provenance(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "format": f"GGUF v{self._file.version}",
            "architecture": self._file.architecture,
            "name": files[0]["name"],
            "sha256": files[0]["sha256"],
            "files": files,
        }


def gguf_tensors(names: NameMap, policy: Policy) -> list[SourceTensor]:
    """The tensors of a file, to be converted under a policy."""
    bad = [m.source for m in names.mapped if not supported(m.source.type)]
    if bad:
        raise InexactError(
            [(t.name, t.type.name, "no known meaning as weights") for t in bad],
            hint="Get the model in another quantization: no policy can convert these",
        )
    tensors = [_tensor(mapped, policy) for mapped in names.mapped]
    return tensors + [_zeros(target, length, policy.half) for target, length in names.zeros]


def _zeros(target: str, length: int, dtype: str) -> SourceTensor:
    """A parameter of the model that the file leaves out."""
    arrays: Arrays = {"weight": np.zeros(length, _NUMPY_TYPES[dtype])}
    converted = Converted(target, dense(dtype), arrays, None)
    return SourceTensor(target, target, (length,), 0, 0.0, lambda pool, patch: lambda: converted)


def _tensor(mapped: Mapped, policy: Policy) -> SourceTensor:
    tensor = mapped.source
    bits = least_bits(tensor.type, policy, module=len(tensor.shape) > 1)
    return SourceTensor(
        name=tensor.name,
        target=mapped.target,
        shape=mapped.shape,
        nbytes=tensor.nbytes,
        least_bytes=bits * tensor.elements / 8,
        start=lambda pool, patch: lambda: _convert(mapped, policy, pool, patch),
    )


def _convert(
    mapped: Mapped, policy: Policy, pool: ThreadPoolExecutor, patch: Patch | None
) -> Converted:
    tensor = mapped.source
    if _is_decay_rate(mapped):
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
    arrays = {}
    for name, array in encoded.arrays.items():
        if name != "factor":
            array = array if mapped.order is None else array[mapped.order]
            array = array if mapped.columns is None else _reordered_columns(mapped, array)
            array = array if mapped.shape == tensor.shape else array.reshape(mapped.shape)
        arrays[name] = array
    return Converted(mapped.target, encoded.layout, arrays, _record(mapped, encoded, policy))


def _is_decay_rate(mapped: Mapped) -> bool:
    """Rates of decay, one per head, are exact: models take their exponential twice.

    Those of Mamba, a matrix, are left to the policy: mlx-lm's class would compute everything after
    them in float32.
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
    if mapped.order is None:
        return patch
    places = np.empty(mapped.source.shape[0], np.intp)
    places[mapped.order] = np.arange(len(places))
    return lambda values, numbers: patch(values, places[numbers])


def _reordered_columns(mapped: Mapped, array: np.ndarray) -> np.ndarray:
    """An array (..., columns, or codes or scales of them), its column blocks in model order."""
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
