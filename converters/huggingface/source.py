"""A directory of safetensors as the source of a conversion: every matrix in the form of a recipe.

The caller of :class:`DirectorySource` maps the weights to the parameters of a model class
(``Prepare``), of which nothing is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from converters.convert import Converted, SourceTensor
from converters.errors import ConversionError
from converters.huggingface.reader import read_config, small_files, weight_files
from converters.huggingface.weights import (
    FLOAT_TYPES,
    Weights,
    dequantized,
    dtype_name,
    read_weights,
    reading,
    to_numpy,
)
from converters.quantize.affine import Arrays, ErrorStats, Packed
from converters.quantize.encode import CHUNK_WEIGHTS, Patch, chunks, fidelity, gather, pack
from converters.quantize.layout import FIXED_MODES, Layout, dense
from converters.quantize.packing import Floats, from_float
from converters.quantize.recipe import EIGHT_BITS, Recipe
from converters.report import TensorRecord

Recoded = tuple[Arrays, ErrorStats]


@dataclass(frozen=True)
class Plan:
    """A directory's weights under the names of the model that is written.

    Attributes:
        config: ``config.json`` of that model, without its ``quantization``.
        weights: its parameters.
        form: the form of a module where one is asked for; None where it can only be floats.
        stays: whether a parameter keeps its own type of floats.
    """

    config: dict[str, Any]
    weights: Weights
    form: Callable[[str, Layout], Layout | None]
    stays: Callable[[str], bool] = lambda name: False


#: Gives the weights the names of the model, with the forms that it can hold.
Prepare = Callable[[dict[str, Any], Weights], Plan]


class DirectorySource:
    """A directory of safetensors to convert; see :class:`converters.convert.Source`.

    Args:
        path: the directory.
        recipe: the forms of its matrices.

    Raises:
        CheckpointError: the directory is damaged or incomplete.
        ConversionError: the recipe does not fit the model.
    """

    def __init__(self, path: Path, recipe: Recipe, prepare: Prepare) -> None:
        config, files = read_config(path), weight_files(path)
        plan = prepare(config, read_weights(files, config))
        self._directory, self._family = path, str(config.get("model_type"))
        self.path = path.resolve()
        self.inputs: Sequence[Path] = (path, *path.iterdir())
        self.weight_files: Sequence[Path] = files.paths
        self.dtype = recipe.dtype or half_dtype(plan)
        self.config = plan.config | {"torch_dtype": self.dtype}
        self.spec = str(recipe)
        self.tensors: Sequence[SourceTensor] = list(_tensors(plan, recipe, self.dtype))
        self.skipped = files.left_out + plan.weights.skipped

    def reading(self) -> AbstractContextManager[None]:
        return reading(self._directory)

    def small_files(self) -> Iterator[tuple[str, bytes | str]]:
        return small_files(self._directory)

    def provenance(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "format": "safetensors",
            "architecture": self._family,
            "name": self.path.name,
            "files": files,
        }


def half_dtype(plan: Plan) -> str:
    """The half precision of a checkpoint: that of its weights, else the one that it declares."""
    kinds = {dtype_name(array) for array in plan.weights.arrays.values()}
    halves = kinds & {"float16", "bfloat16"}
    if len(halves) == 1:
        return halves.pop()
    declared = str(plan.config.get("torch_dtype") or plan.config.get("dtype"))
    declared = declared.removeprefix("torch.")
    return declared if declared in ("float16", "bfloat16") else "float16"


def _tensors(plan: Plan, recipe: Recipe, dtype: str) -> Iterator[SourceTensor]:
    """Every parameter with its form, in the order in which they are stored."""
    weights = plan.weights
    modules = {
        name.removesuffix(".weight")
        for name, array in weights.arrays.items()
        if name.endswith(".weight") and array.ndim > 1
    }
    modules = {module for module in modules if plan.form(module, EIGHT_BITS)}
    named = recipe.named(modules)
    for name, array in weights.arrays.items():
        module, _, kind = name.rpartition(".")
        if kind in ("scales", "biases") and module in weights.layouts:
            continue
        stored = weights.layout(name)
        if stored is None:
            layout = dense(dtype_name(array) if plan.stays(name) else dtype)
        else:
            layout = stored.with_dtype(recipe.dtype) if recipe.dtype else stored
        note, explicit = "", False
        if kind == "weight" and module in modules:
            explicit = module in named
            asked = named.get(module) or (recipe.form and plan.form(module, recipe.form))
            if asked is not None:
                width, asked = weights.shape(name)[-1], asked.with_dtype(dtype)
                layout, note = _fitting(width, layout, asked, explicit=explicit)
        shape = weights.shape(name)
        yield SourceTensor(
            name=name,
            target=name,
            shape=shape,
            nbytes=sum(weights.arrays[part].nbytes for part in weights.parts(name)),
            least_bytes=layout.bits_per_weight * math.prod(shape) / 8,
            start=partial(_start, weights, name, layout, note, explicit),
        )


def _fitting(width: int, as_is: Layout, asked: Layout, *, explicit: bool) -> tuple[Layout, str]:
    """The form of a matrix, and why it is not the one that is asked for.

    Args:
        width: its columns.
        as_is: its form in the source.
        explicit: the form is asked of this very module.
    """
    if asked.module_config == as_is.module_config:
        return as_is, ""
    if as_is.mode in FIXED_MODES and not explicit and asked.bits >= as_is.bits:
        return as_is, f"stored as {as_is}, which more bits would not improve"
    if asked.quantized and width % asked.group_size:
        return as_is, f"{width} columns do not divide into groups of {asked.group_size}"
    return asked, ""


def _start(
    weights: Weights,
    target: str,
    layout: Layout,
    note: str,
    explicit: bool,
    pool: ThreadPoolExecutor,
    patch: Patch | None,
) -> Callable[[], Converted]:
    """Read a parameter's arrays, which are dropped, and return the rest of its conversion.

    Args:
        layout: the form that it gets.
        note: why this is not the one that is asked for.
        explicit: a pattern asks for it.
    """
    origin, stored = weights.origin(target), weights.layout(target)
    elements = math.prod(weights.shape(target))
    parts = [weights.arrays.pop(name) for name in weights.parts(target)]
    same = stored is not None and stored.module_config == layout.module_config and not patch
    if stored is not None and same:
        form, encode = _same_codes(parts, stored, layout)
    else:
        form = layout
        array = parts[0] if stored is None else dequantized(parts, stored)
        encode = recode(array, layout, pool, patch)
    mx.clear_cache()

    def finish() -> Converted:
        arrays, error = encode()
        _check(target, layout, error, explicit=explicit)
        record = TensorRecord(
            name=origin.name,
            target=target,
            type=str(origin.type),
            form=str(form),
            fidelity=fidelity(
                error, own_codes=same or not layout.quantized, merged=patch is not None
            ),
            rmse=error.rmse,
            max_error=error.maximum,
            bits_before=origin.bits,
            bits_after=form.bits_per_weight,
            elements=elements,
            note=note,
        )
        return Converted(target, form, arrays, record)

    return finish


def _check(target: str, layout: Layout, error: ErrorStats, *, explicit: bool) -> None:
    """Refuse infinite weights, unless they are asked for."""
    if not math.isfinite(error.squared_weight) and (layout.quantized or not explicit):
        keep = f"--keep {target.removesuffix('.weight')}=float"
        raise ConversionError(
            f"{target} holds infinite or not-a-number weights",
            hint=f"The source is damaged: get it again; a matrix is kept as it is with {keep}",
        )
    if math.isinf(error.maximum) or (layout.quantized and not math.isfinite(error.rmse)):
        raise ConversionError(
            f"{target} holds weights that {layout} cannot", hint="Choose --dtype bfloat16"
        )


def recode(
    array: mx.array, layout: Layout, pool: ThreadPoolExecutor, patch: Patch | None = None
) -> Callable[[], Recoded]:
    """Floats of any shape in another form, quantized along the last axis.

    Reads the array at once, as MLX does so where its file was opened; the rest of the work, which
    is returned, may run in any thread.

    Args:
        patch: merge into its rows; the error is against the result.
    """
    shape = array.shape
    columns = shape[-1] if shape else 1
    stored, dtype = to_numpy(mx.contiguous(array)).reshape(-1, columns), dtype_name(array)
    rows, parts = len(stored), chunks(len(stored), columns, CHUNK_WEIGHTS)

    def work(part: slice) -> Packed:
        with np.errstate(invalid="ignore", over="ignore"):  # the error shows it
            values = np.ascontiguousarray(from_float(stored[part], dtype))
            return _pack(patch(values, np.arange(rows)[part]) if patch else values, layout)

    def shaped(arrays: Arrays, error: ErrorStats) -> Recoded:
        return {name: a.reshape(*shape[:-1], -1) for name, a in arrays.items()}, error

    if layout.mode in FIXED_MODES:  # MLX packs these, in this thread
        result = shaped(*gather(work, parts, map))
        return lambda: result
    return lambda: shaped(*gather(work, parts, pool.map))


def _pack(values: Floats, layout: Layout) -> Packed:
    """Rows (n, columns) of float32 in any layout."""
    if layout.mode not in FIXED_MODES:
        packed = pack(values, layout)
        if not layout.quantized and layout.dtype == "float32":
            packed.error.add(values, values)  # nothing is lost; this sums the weights
        return packed
    weight, scales = mx.quantize(
        mx.array(values), group_size=layout.group_size, bits=layout.bits, mode=layout.mode
    )[:2]
    back = dequantized([weight, scales], layout)
    packed = Packed(layout, {"weight": np.array(weight), "scales": np.array(scales)})
    packed.error.add(values, np.array(back, copy=False))
    return packed


def _same_codes(
    parts: list[mx.array], stored: Layout, asked: Layout
) -> tuple[Layout, Callable[[], Recoded]]:
    """The same codes, with scales and biases in the type that is asked for."""
    error = ErrorStats() if _finite(parts, stored) else ErrorStats(squared_weight=math.nan)
    if stored.mode == "affine" and stored.dtype != asked.dtype:
        dtype = next(kind for kind, name in FLOAT_TYPES.items() if name == asked.dtype)
        cast = [parts[0], *(part.astype(dtype) for part in parts[1:])]
        before, after = (to_numpy(dequantized(each, stored)) for each in (parts, cast))
        error.add(before.astype(np.float32), after.astype(np.float32))
        parts = cast
    names = ("weight", "scales", "biases")
    arrays = {name: to_numpy(part) for name, part in zip(names, parts, strict=False)}
    return asked if stored.mode == "affine" else stored, lambda: (arrays, error)


def _finite(parts: list[mx.array], stored: Layout) -> bool:
    """Whether scales, biases and codes stand for finite numbers."""
    if stored.mode == "affine":
        return all(bool(mx.isfinite(part).all().item()) for part in parts[1:])
    # E4M3 has one not-a-number of each sign; E8M0 only this one (OCP Microscaling Formats 1.0).
    floats = {"mxfp4": [], "mxfp8": parts[:1], "nvfp4": parts[1:]}[stored.mode]
    powers = [] if stored.mode == "nvfp4" else parts[1:]
    bad = [(part.view(mx.uint8) & 0x7F) == 0x7F for part in floats]
    bad += [part == 0xFF for part in powers]
    return not any(bool(each.any().item()) for each in bad)
