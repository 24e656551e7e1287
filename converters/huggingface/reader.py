"""The files of a model directory: ``config.json``, safetensors headers and the small files.

Chooses the files with weights, and gives the reason for leaving others out; no weight is read.
Formats: https://github.com/huggingface/safetensors, and mlx-lm's ``quantization`` section.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, shortened
from converters.quantize.layout import (
    BITS,
    DEFAULT_GROUP,
    FIXED_MODES,
    GROUPS,
    Layout,
    affine,
    fixed,
)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a directory and their headers, arrays by name.

    Attributes:
        left_out: ``{"name", "type", "reason"}`` of files that look like weights and are not read.
    """

    paths: tuple[Path, ...]
    headers: tuple[Mapping[str, StoredArray], ...]
    left_out: list[dict[str, str]] = field(default_factory=list)

    @property
    def entries(self) -> dict[str, StoredArray]:
        return {name: entry for header in self.headers for name, entry in header.items()}


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a directory."""
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{path} is not a model directory: it has no config.json",
            hint="Give a .gguf file, a model directory or org/repo",
        )
    return read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
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
    """The files that a directory's index names; none where there is no index."""
    index = path / INDEX
    if not index.is_file():
        return []
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
        outside = [n for n in names if Path(n).name != n or len(n) > 255 or "\0" in n]
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {index}: {error}") from error
    if outside:
        raise CheckpointError(f"{index}: {outside[0][:80]!r} is no file of this directory")
    return names


def _without_weights(path: Path) -> CheckpointError:
    """Why a directory without model*.safetensors cannot be read, and a remedy."""
    found = {file.suffix: file.name for file in sorted(path.iterdir()) if file.is_file()}
    message = f"{path} has no model*.safetensors"
    pickled = next((found[suffix] for suffix in (".bin", ".pt", ".pth") if suffix in found), None)
    if pickled:
        return CheckpointError(
            f"{message}, only PyTorch files such as {pickled}",
            hint="They can run code when they are read, so mlxrun does not read them: get a "
            "safetensors version, or save one with save_pretrained(safe_serialization=True)",
        )
    if ".safetensors" in found:
        return CheckpointError(
            f"{message}, only {found['.safetensors']}, which is of another layout",
            hint="Get the version for transformers, whose files are called model*.safetensors",
        )
    if ".gguf" in found:
        return CheckpointError(message, hint=f"Give {path / found['.gguf']} itself")
    return CheckpointError(message, hint="Only safetensors weights are read")


_OTHER_WEIGHTS = {
    ".safetensors": "not one of the files that hold the model's weights",
    **dict.fromkeys(
        (".bin", ".pt", ".pth"), "PyTorch weights are not read, the safetensors files are"
    ),
    ".gguf": "the safetensors files are read instead; name the file to convert it",
    ".py": "code is neither run nor copied",
}


def _left_out(path: Path, used: list[Path]) -> list[dict[str, str]]:
    return [
        {"name": file.name, "type": "file", "reason": _OTHER_WEIGHTS[file.suffix]}
        for file in sorted(path.iterdir())
        if file.suffix in _OTHER_WEIGHTS and file not in used
    ]


# The format's own limit on a header.
_LONGEST_HEADER = 100_000_000
# Types that MLX reads, and the bits of an element.
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64"), 64),
}


@dataclass(frozen=True)
class StoredArray:
    """One entry of a header; ``dtype`` is in the format's terms, such as ``BF16``."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> dict[str, StoredArray]:
    """The arrays of a file by name."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_LONGEST_HEADER, size):
                raise CheckpointError(
                    f"cannot read {path}: its header claims {length} bytes of {size}",
                    hint="It is damaged or no safetensors file: download it again",
                )
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: its header is not a JSON object")
    header.pop("__metadata__", None)
    return {
        name: _stored_array(path, name, entry, size - 8 - length) for name, entry in header.items()
    }


def _stored_array(path: Path, name: str, entry: Any, room: int) -> StoredArray:
    where = f"{path.name}: {shortened(name, 200)}"
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where} has a damaged header: {error!r}") from error
    if min(begin, *shape, 0) < 0 or end < begin:
        raise CheckpointError(f"{where} has a damaged header: shape {shape}, bytes {begin}-{end}")
    if end > room:
        raise CheckpointError(
            f"{where} ends at byte {end} of the data, the file has {max(room, 0)}",
            hint="The file is cut short, as a download that stopped is: fetch it again",
        )
    bits = DTYPES.get(dtype)
    if bits is not None and prod(shape) * bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where} has {end - begin} bytes, {shape} of {dtype} need {prod(shape) * bits // 8}"
        )
    return StoredArray(dtype, shape, end - begin)


@dataclass(frozen=True)
class StoredTensor:
    """A parameter as it is stored.

    Attributes:
        name: without the suffix of its parts.
        form: a type such as ``F16``, or the form of a quantized matrix.
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

    CheckpointError if a header is damaged, or ``config`` lacks the width of codes.
    """
    entries: dict[str, StoredArray] = {}
    for file in files:
        entries |= read_header(file)
    tensors = []
    for name, entry in entries.items():
        module, _, kind = name.rpartition(".")
        quantized = f"{module}.scales" in entries and f"{module}.weight" in entries
        if quantized and kind == "weight":
            form = stored_form(config, module)
            *rows, words = entry.shape or (1,)
            parts = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
            nbytes = sum(entries[part].nbytes for part in parts if part in entries)
            shape = (*rows, words * 32 // form.bits)
            tensors.append(StoredTensor(name, str(form), shape, nbytes))
        elif not (quantized and kind in ("scales", "biases")):
            tensors.append(StoredTensor(name, entry.dtype, entry.shape, entry.nbytes))
    return tensors


# Bits of affine codes where a module's own entry has none.
_DEFAULT_BITS = 4


def stored_form(config: Mapping[str, Any], module: str) -> Layout:
    """The form of a module that has scales, without the type of the scales.

    Where a module's own entry has no bits or group size, they are its mode's defaults, whatever the
    section says of other modules (as in ``mlx_lm.utils.load_model``).
    """
    section = config.get("quantization") or config.get("quantization_config")
    if not section or not isinstance(section, dict):
        raise CheckpointError("the weights are quantized but config.json does not say how")
    own = section.get(module)
    how = own if isinstance(own, dict) else section
    mode = str(how.get("mode", "affine"))
    if mode in FIXED_MODES:
        return fixed(mode)
    if mode != "affine":
        raise CheckpointError(f"config.json: quantization mode {mode!r} is not known")
    bits, group = how.get("bits"), how.get("group_size")
    if how is own:
        bits, group = bits or _DEFAULT_BITS, group or DEFAULT_GROUP
    if type(bits) is not int or bits not in BITS or type(group) is not int or group not in GROUPS:
        raise CheckpointError(
            f"config.json: quantization of {bits!r} bits in groups of {group!r} is none of MLX's"
        )
    return affine(bits, group)


# Small files that a conversion copies: tokenizers and their use. Never weights, never code.
_COPIED = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def small_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names, relative to the directory, and contents of the small files that are copied."""
    for file in small_file_paths(path):
        try:
            yield file.relative_to(path).as_posix(), file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error


def small_file_paths(path: Path) -> list[Path]:
    """The small files of a directory that a conversion copies."""
    return sorted({file for pattern in _COPIED for file in path.glob(pattern) if file.is_file()})
