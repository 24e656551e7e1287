"""The tensors of a model directory, from the headers of its safetensors files.

Reads headers only; knows how MLX stores a quantised matrix as codes, scales and biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.directory.header import StoredArray, read_header
from converters.directory.quantization import stored_form
from converters.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """A parameter as it is stored.

    Attributes:
        name: without the suffix of its parts.
        form: a type such as ``F16``, or the form of a quantised matrix.
        shape: of the weights, not of the codes.
        nbytes: of all its parts.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def weights(self) -> int:
        return prod(self.shape)


def stored_tensors(files: Sequence[Path], config: Mapping[str, Any]) -> list[StoredTensor]:
    """The parameters in some files, codes and scales put together.

    Args:
        config: ``config.json``, whose ``quantization`` says how wide codes are.

    Raises:
        CheckpointError: a header is damaged, or ``config.json`` does not say how wide codes are.
    """
    entries: dict[str, StoredArray] = {}
    for file in files:
        entries |= read_header(file)
    try:
        return [_tensor(name, entries, config) for name in entries if not _is_part(name, entries)]
    except LookupError as error:
        raise CheckpointError(f"a safetensors header is damaged: {error}") from error


def _is_part(name: str, entries: Mapping[str, StoredArray]) -> bool:
    module, _, kind = name.rpartition(".")
    quantised = f"{module}.scales" in entries and f"{module}.weight" in entries
    return quantised and kind in ("scales", "biases")


def _tensor(
    name: str, entries: Mapping[str, StoredArray], config: Mapping[str, Any]
) -> StoredTensor:
    entry = entries[name]
    shape = entry.shape
    module, _, kind = name.rpartition(".")
    if kind != "weight" or f"{module}.scales" not in entries:
        return StoredTensor(name, entry.dtype, shape, entry.nbytes)
    form = stored_form(config, module)
    parts = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
    return StoredTensor(
        name,
        str(form),
        (*shape[:-1], shape[-1] * 32 // form.bits),
        sum(entries[part].nbytes for part in parts if part in entries),
    )
