"""The weights of a model directory by name, lazily, and how the quantised ones are stored.

MLX reads an array from its file when it is first evaluated, in the thread that opened the file;
whoever evaluates it drops it when done, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.directory.files import WeightFiles, weight_files
from converters.directory.quantization import stored_form
from converters.errors import CheckpointError, MlxrunError
from converters.quantize.layout import Layout


@dataclass(frozen=True)
class Origin:
    """How a parameter is stored where that is not what its array says.

    Attributes:
        name: in the files; with ``*`` where several were stacked.
        type: such as ``float8_e4m3``; None where the array's own type says it.
        bits: stored bits per weight, if ``type`` is given.
    """

    name: str
    type: str | None = None
    bits: float = 0.0


@dataclass
class Weights:
    """What a directory holds, under whatever names.

    Attributes:
        arrays: lazily read, by full name.
        layouts: module name to layout, for quantised modules.
        origins: of parameters that were renamed, stacked or decoded.
        skipped: ``{"name", "type", "reason"}`` of what has no place in the model.
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

    def skip(self, name: str, reason: str) -> None:
        """Leave an array out and say why."""
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
    """Every array of some files, to be read when it is used.

    Raises:
        CheckpointError: a file cannot be opened, the weights are quantised in a format that is not
            read, or ``config.json`` does not say how they are.
    """
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
    """While arrays of a directory are evaluated, and so read.

    Raises:
        CheckpointError: a file has been cut short since it was opened, or the disk fails.
    """
    # MLX tells a failed read only to who asks the stream that it was on, and leaves the array as it
    # is: what was read is good if the files are whole afterwards.
    try:
        yield
    except (RuntimeError, MlxrunError) as error:
        weight_files(path)
        if "[read]" not in str(error):  # as MLX's reader begins what it says
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
                f"the weights are quantised with {str(method)[:80]}, which mlxrun does not read",
                hint="Get the unquantised original and convert it with --bits, or get a GGUF of it",
            )


def _layouts(config: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> dict[str, Layout]:
    """Which modules are quantised and how."""
    layouts = {}
    for module in [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]:
        form = stored_form(config, module)
        if f"{module}.weight" not in arrays:
            raise CheckpointError(f"the weights have {module}.scales and no {module}.weight")
        layouts[module] = form.with_dtype(dtype_name(arrays[f"{module}.scales"]))
    return layouts
