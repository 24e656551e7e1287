"""The weights of a model directory by name, lazily read, and how the quantized ones are stored.

MLX reads an array from its file when it is first evaluated, in the thread that opened the file;
drop it when done, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from converters.errors import CheckpointError, MlxrunError
from converters.huggingface.reader import WeightFiles, stored_form, weight_files
from converters.quantize.layout import Layout, fixed

FLOAT_TYPES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Origin:
    """Name and type of a parameter in the files, where they are others than its array's.

    Attributes:
        name: in the files; with ``*`` where several were stacked.
        type: such as ``float8_e4m3``; None for the array's own type.
        bits: stored bits per weight, if ``type`` is given.
    """

    name: str
    type: str | None = None
    bits: float = 0.0


@dataclass
class Weights:
    """The arrays of a directory, which may be renamed.

    Attributes:
        arrays: lazily read, by full name.
        layouts: module name to layout, for quantized modules.
        origins: of parameters that were renamed, stacked or decoded.
        skipped: ``{"name", "type", "reason"}`` of arrays that the model has no place for.
    """

    arrays: dict[str, mx.array]
    layouts: dict[str, Layout]
    origins: dict[str, Origin] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def origin(self, name: str) -> Origin:
        """Where a parameter comes from and how it is stored there."""
        known = self.origins.get(name, Origin(name))
        if known.type is not None:
            return known
        layout = self.layouts.get(name.removesuffix(".weight"))
        if layout is None:
            array = self.arrays[name]
            return Origin(known.name, dtype_name(array), 8.0 * array.itemsize)
        return Origin(known.name, str(layout), layout.bits_per_weight)

    def layout(self, name: str) -> Layout | None:
        """How a parameter is packed; None for plain arrays."""
        module, _, kind = name.rpartition(".")
        return self.layouts.get(module) if kind == "weight" else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter's weights, packed or not."""
        array, stored = self.arrays[name], self.layout(name)
        if stored is None:
            return array.shape
        return (*array.shape[:-1], array.shape[-1] * 32 // stored.bits)

    def parts(self, name: str) -> list[str]:
        """The arrays of a parameter: codes, scales and (affine) biases, or the one that it is."""
        stored, module = self.layout(name), name.removesuffix(".weight")
        if stored is None:
            return [name]
        kinds = ("scales", "biases") if stored.mode == "affine" else ("scales",)
        return [name, *(f"{module}.{kind}" for kind in kinds)]

    def skip(self, name: str, reason: str) -> None:
        """Leave an array out, with the reason for the report."""
        array = self.arrays.pop(name)
        if name.endswith(".weight"):
            self.layouts.pop(name.removesuffix(".weight"), None)
        self.skipped.append({"name": name, "type": dtype_name(array), "reason": reason})

    def move(self, name: str, target: str) -> None:
        """Give an array another name, and its module's layout with it."""
        self.part(name, {target: self.arrays[name]})

    def part(self, name: str, parts: dict[str, mx.array]) -> None:
        """Replace an array by views of it, each made contiguous; a layout is theirs as well.

        MLX copies most strided matrices at each product, and multiplies the others with other
        kernels than those that a converted directory gets.
        """
        clash = next((target for target in parts if target in self.arrays and target != name), None)
        if clash:
            raise CheckpointError(f"the weights have both {name} and {clash}, which are the same")
        known = self.origins.pop(name, Origin(name))
        del self.arrays[name]
        layout = self.layouts.get(name.removesuffix(".weight"))
        if name.endswith(".weight") and layout is not None:
            del self.layouts[name.removesuffix(".weight")]
            self.layouts |= {target.removesuffix(".weight"): layout for target in parts}
        self.arrays |= {target: mx.contiguous(array) for target, array in parts.items()}
        self.origins |= dict.fromkeys(parts, known)

    def stack(self, names: list[str], target: str) -> None:
        """Replace arrays of one shape by their stack."""
        if target in self.arrays:
            raise CheckpointError(f"the weights have both {names[0]} and {target}")
        first = self.arrays[names[0]]
        for name in names:
            if (self.arrays[name].shape, self.arrays[name].dtype) != (first.shape, first.dtype):
                raise CheckpointError(f"{name} and {names[0]} differ in shape or type")
        origin = self.origin(names[0])
        module = names[0].removesuffix(".weight")
        if names[0].endswith(".weight") and module in self.layouts:
            self.layouts[target.removesuffix(".weight")] = self.layouts[module]
            for name in names:
                self.layouts.pop(name.removesuffix(".weight"), None)
        self.arrays[target] = mx.stack([self.arrays.pop(name) for name in names])
        self.origins[target] = Origin(_starred(names[0], names[-1]), origin.type, origin.bits)


def _starred(first: str, last: str) -> str:
    """What two names share, with ``*`` for the part that differs."""
    pairs = zip(first.split("."), last.split("."), strict=True)
    return ".".join(a if a == b else "*" for a, b in pairs)


def dtype_name(array: mx.array) -> str:
    """``float16`` and so on."""
    return str(array.dtype).removeprefix("mlx.core.")


def read_weights(files: WeightFiles, config: Mapping[str, Any]) -> Weights:
    """Every array of some files, to be read when it is used."""
    _refuse_foreign(config)
    arrays: dict[str, mx.array] = {}
    for file in files.paths:
        try:
            loaded = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
        assert isinstance(loaded, dict)
        arrays |= loaded
    return Weights(arrays, _layouts(config, arrays))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """While arrays of a directory are evaluated, and so read: failures become CheckpointError."""
    # MLX reports a failed read only on the stream of that read, and leaves the array as it is: what
    # was read is good if the files are whole afterwards.
    try:
        yield
    except (RuntimeError, MlxrunError) as error:
        weight_files(path)
        if "[read]" not in str(error):  # the prefix of errors of MLX's reader
            raise
        raise CheckpointError(f"cannot read the weights in {path}: the disk fails") from error
    weight_files(path)


# Formats of config.json's quantization_config that are read; None is MLX's own.
_READ = (None, "fp8", "mxfp4")


def _refuse_foreign(config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        how = section.get("quantization_config")
        method = how.get("quant_method") if isinstance(how, dict) else None
        if method not in _READ:
            raise CheckpointError(
                f"the weights are quantized with {str(method)[:80]}, which mlxrun does not read",
                hint="Get the unquantized original and convert it with --bits, or get a GGUF of it",
            )


def _layouts(config: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> dict[str, Layout]:
    """Which modules are quantized and how."""
    layouts = {}
    for module in [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]:
        form = stored_form(config, module)
        if f"{module}.weight" not in arrays:
            raise CheckpointError(f"the weights have {module}.scales and no {module}.weight")
        layouts[module] = form.with_dtype(dtype_name(arrays[f"{module}.scales"]))
    return layouts


def to_numpy(array: mx.array) -> npt.NDArray[np.generic]:
    """The data of an array without a copy; bfloat16 as uint16 bit patterns."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array, copy=False)


def dequantized(parts: list[mx.array], layout: Layout) -> mx.array:
    """The float32 weights of packed codes, scales and (affine) biases."""
    weight, scales, *biases = parts
    return mx.dequantize(
        weight,
        scales.astype(mx.float32) if biases else scales,
        biases[0].astype(mx.float32) if biases else None,
        group_size=layout.group_size,
        bits=layout.bits,
        mode=layout.mode,
        dtype=mx.float32,
    )


# fp8: eight-bit floats (E4M3) with a scale per block, DeepSeek-V3, arXiv:2412.19437, section 3.3.
_BLOCK = (128, 128)


def decode_prequantized(config: dict[str, Any], weights: Weights) -> None:
    """Eight-bit floats become bfloat16, gpt-oss's four-bit blocks MLX's mxfp4, in place."""
    section = config.get("quantization_config")
    block = section.get("weight_block_size") if isinstance(section, dict) else None
    size = (int(block[0]), int(block[1])) if block else _BLOCK
    for name in [name for name in weights.arrays if name.endswith(".weight_scale_inv")]:
        target = name.removesuffix("_scale_inv")
        codes, scale = weights.arrays[target], weights.arrays.pop(name)
        weights.arrays[target] = _eight_bits(target, codes, scale, size)
        weights.origins[target] = Origin(weights.origin(target).name, "float8_e4m3", 8.0)
    for name in [name for name in weights.arrays if name.endswith("_blocks")]:
        module = name.removesuffix("_blocks")
        _four_bits(module, weights)


def _eight_bits(name: str, codes: mx.array, scale: mx.array, block: tuple[int, int]) -> mx.array:
    """Floats of one byte, times their scale: one for all, or one for each block."""
    if codes.dtype != mx.uint8:
        raise CheckpointError(f"{name} has scales of eight-bit floats and holds {codes.dtype}")
    floats = mx.from_fp8(codes, dtype=mx.float32)
    if scale.size > 1:
        rows, columns = codes.shape
        expected = (-(-rows // block[0]), -(-columns // block[1]))
        if scale.shape != expected:
            raise CheckpointError(f"{name}_scale_inv has the shape {scale.shape}, not {expected}")
        scale = mx.repeat(mx.repeat(scale, block[0], 0)[:rows], block[1], 1)[:, :columns]
    return (floats * scale.astype(mx.float32)).astype(mx.bfloat16)


def _four_bits(module: str, weights: Weights) -> None:
    """``_blocks`` (..., rows, groups, 16) and ``_scales`` (..., rows, groups), both bytes."""
    blocks, scales = weights.arrays[f"{module}_blocks"], weights.arrays.get(f"{module}_scales")
    if scales is None or blocks.dtype != mx.uint8 or scales.shape != blocks.shape[:-1]:
        raise CheckpointError(f"{module}_blocks has no scales that fit it")
    weights.move(f"{module}_blocks", f"{module}.weight")
    weights.move(f"{module}_scales", f"{module}.scales")
    # Both keep neighbors in one byte, the first in its lower half.
    weights.arrays[f"{module}.weight"] = blocks.view(mx.uint32).flatten(-2)
    weights.layouts[module] = fixed("mxfp4")
