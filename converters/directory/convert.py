"""A model directory into another: every matrix in the form that a recipe asks for.

``convert_directory`` reads tensor by tensor and writes as it reads, so that a conversion needs the
memory of a few of its largest tensors. Knows nothing of model classes: whoever calls it says how
the weights are called (``Prepare``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.checkpoint import CheckpointWriter
from converters.directory.companions import companions
from converters.directory.encode import Recoded, dequantised, keep_packed, recode
from converters.directory.files import read_config, weight_files
from converters.directory.weights import Weights, dtype_name, read_weights, reading
from converters.errors import ConversionError
from converters.quantize.encode import Merge, Patch, PrepareMerge, workers
from converters.quantize.layout import Layout, dense
from converters.quantize.recipe import EIGHT_BITS, Recipe
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


@dataclass(frozen=True)
class Plan:
    """A directory's weights under the names of the model that is written.

    Attributes:
        config: ``config.json`` of that model, without what it says of quantisation.
        weights: its parameters.
        form: what a module takes where a form is asked for; None where it can only be floats.
        stays: whether a parameter keeps its own type of floats.
    """

    config: dict[str, Any]
    weights: Weights
    form: Callable[[str, Layout], Layout | None]
    stays: Callable[[str], bool] = lambda name: False


Prepare = Callable[[dict[str, Any], Weights], Plan]


@dataclass(frozen=True)
class Choice:
    """The form chosen for a parameter, why it is not the one asked for, and whether one was."""

    name: str
    layout: Layout
    note: str = ""
    explicit: bool = False


def convert_directory(
    src: Path,
    dst: str | Path | None,
    recipe: Recipe,
    prepare: Prepare,
    *,
    merge: PrepareMerge | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a directory of safetensors to one that mlxrun and stock mlx-lm load.

    Args:
        src: the directory.
        dst: directory to create; by default ``NAME-mlx`` in the working directory.
        recipe: what becomes of the matrices.
        prepare: gives the weights the names of the model, and says what the model can hold.
        merge: gives what is merged into the weights of a model with a ``config.json``.
        overwrite: replace a directory that holds nothing but an earlier conversion, once the new
            one is complete.
        progress: called with (bytes read, bytes in all, tensor name).

    Raises:
        AdapterError: what is to be merged does not fit the model.
        CheckpointError: the source is damaged or incomplete, or the target cannot be written.
        ConversionError: the recipe does not fit the model, or weights do not fit their form.
        TargetExistsError, OutOfSpaceError: there is no place for the target.
    """
    started = time.perf_counter()
    config, files = read_config(src), weight_files(src)
    plan = prepare(config, read_weights(files, config))
    dtype = recipe.dtype or half_dtype(plan)
    choices = list(_choose(plan, recipe, dtype))
    merged = merge(plan.config) if merge else None
    if merged:
        merged.check({choice.name: _shape(choice.name, plan.weights) for choice in choices})
    target = target_path(dst, src.resolve(), (src, *src.iterdir()))
    report = ConversionReport({}, str(recipe))
    report.skipped = files.left_out + plan.weights.skipped
    with (
        Hashing(files.paths) as hashing,
        CheckpointWriter(target, overwrite=overwrite, entries=3 * len(choices)) as writer,
    ):
        check_space(_size(choices, plan.weights), target)
        with reading(src):
            tensors = _stream(plan.weights, choices, merged, progress)
            layouts = write_tensors(writer, tensors, report)
        for name, data in companions(src):
            writer.write_file(name, data)
        report.source = _source(src, config, hashing.result())
        written = plan.config | {"torch_dtype": dtype} | quantization(layouts)
        finish(writer, written, report)
    report.path = str(target)
    report.seconds = time.perf_counter() - started
    return report


def half_dtype(plan: Plan) -> str:
    """The half precision of a checkpoint: that of its weights, else the one that it declares."""
    kinds = {dtype_name(array) for array in plan.weights.arrays.values()}
    halves = kinds & {"float16", "bfloat16"}
    if len(halves) == 1:
        return halves.pop()
    declared = str(plan.config.get("torch_dtype") or plan.config.get("dtype")).removeprefix(
        "torch."
    )
    return declared if declared in ("float16", "bfloat16") else "float16"


def _choose(plan: Plan, recipe: Recipe, dtype: str) -> Iterator[Choice]:
    """The form of every parameter, in the order in which they are stored."""
    weights = plan.weights
    modules = {
        name.removesuffix(".weight")
        for name, array in weights.arrays.items()
        if name.endswith(".weight") and array.ndim > 1
    }
    modules = {module for module in modules if plan.form(module, EIGHT_BITS)}
    kept = recipe.kept(modules)
    for name, array in weights.arrays.items():
        module, _, kind = name.rpartition(".")
        if kind in ("scales", "biases") and module in weights.layouts:
            continue
        stored = weights.layouts.get(module) if kind == "weight" else None
        own = dtype_name(array) if stored is None and plan.stays(name) else dtype
        as_is = dense(own) if stored is None else _scaled(stored, recipe.dtype)
        if kind != "weight" or module not in modules:
            yield Choice(name, as_is)
            continue
        asked = kept.get(module) or (recipe.form and plan.form(module, recipe.form))
        layout = None if asked is None else asked.with_dtype(dtype)
        width = columns(array, stored)
        explicit = module in kept
        chosen, note = _fitting(width, as_is, layout, explicit=explicit)
        yield Choice(name, chosen, note, explicit)


def columns(array: mx.array, layout: Layout | None) -> int:
    """Weights in a row of a stored array."""
    return int(array.shape[-1]) if layout is None else int(array.shape[-1]) * 32 // layout.bits


def _scaled(stored: Layout, dtype: str | None) -> Layout:
    """A stored layout, its scales in a type that is asked for."""
    return replace(stored, dtype=dtype) if dtype and stored.mode == "affine" else stored


def _fitting(
    width: int, as_is: Layout, asked: Layout | None, *, explicit: bool
) -> tuple[Layout, str]:
    """What a matrix becomes, and why that is not what is asked for.

    Args:
        width: its columns.
        as_is: how it is stored.
        explicit: whether the form is asked of this very module.
    """
    if asked is None or asked.module_config == as_is.module_config:
        return as_is, ""
    if as_is.quantized and as_is.mode != "affine" and not explicit and asked.bits >= as_is.bits:
        return as_is, f"stored as {as_is}, which more bits would not improve"
    if asked.quantized and width % asked.group_size:
        return as_is, f"{width} columns do not divide into groups of {asked.group_size}"
    return asked, ""


def _size(choices: list[Choice], weights: Weights) -> float:
    """Bytes of the converted weights."""
    return sum(
        choice.layout.bits_per_weight * math.prod(_shape(choice.name, weights)) / 8
        for choice in choices
    )


def _shape(name: str, weights: Weights) -> tuple[int, ...]:
    """Of a parameter's weights, packed or not."""
    array = weights.arrays[name]
    stored = weights.layouts.get(name.removesuffix(".weight")) if name.endswith("weight") else None
    return (*array.shape[:-1], columns(array, stored)) if array.ndim else ()


def _stream(
    weights: Weights, choices: list[Choice], merge: Merge | None, progress: Progress | None
) -> Generator[Converted, None, None]:
    """Convert parameter after parameter, dropping each when it is done."""
    total = sum(array.nbytes for array in weights.arrays.values())
    done = 0
    with workers() as pool:
        for choice in choices:
            patch = merge.patch(choice.name) if merge else None
            record, recoded, nbytes = _convert_one(weights, choice, pool, patch)
            mx.clear_cache()
            yield Converted(choice.name, recoded.layout, recoded.arrays, record)
            done += nbytes
            if progress:
                progress(done, total, choice.name)


def _convert_one(
    weights: Weights, choice: Choice, pool: ThreadPoolExecutor, patch: Patch | None
) -> tuple[TensorRecord, Recoded, int]:
    name, layout = choice.name, choice.layout
    module = name.removesuffix(".weight")
    origin, elements = weights.origin(name), math.prod(_shape(name, weights))
    stored = weights.layouts.get(module) if name.endswith(".weight") else None
    parts = [weights.arrays.pop(name)]
    if stored is not None:
        kinds = ("scales", "biases") if stored.mode == "affine" else ("scales",)
        parts += [weights.arrays.pop(f"{module}.{kind}") for kind in kinds]
    nbytes = sum(part.nbytes for part in parts)
    same = stored is not None and stored.module_config == layout.module_config and not patch
    if stored is not None and same:
        recoded = keep_packed(parts, stored, layout)
    elif stored is not None:
        recoded = recode(dequantised(parts, stored), layout, pool, patch)
    else:
        recoded = recode(parts[0], layout, pool, patch)
    _check(choice, recoded)
    kept = same or not layout.quantized
    exact = "exact" if recoded.error.equal else "rounded" if kept else "requantized"
    record = TensorRecord(
        name=origin.name,
        target=name,
        type=str(origin.type),
        form=str(recoded.layout),
        fidelity="merged" if patch else exact,
        rmse=recoded.error.rmse,
        max_error=recoded.error.maximum,
        bits_before=origin.bits,
        bits_after=recoded.layout.bits_per_weight,
        elements=elements,
        note=choice.note,
    )
    return record, recoded, nbytes


def _check(choice: Choice, recoded: Recoded) -> None:
    """Refuse what would make a model of infinities, unless it is asked for."""
    name, error, layout = choice.name, recoded.error, recoded.layout
    if not math.isfinite(error.squared_weight) and (layout.quantized or not choice.explicit):
        keep = f"--keep {name.removesuffix('.weight')}=float"
        raise ConversionError(
            f"{name} holds infinite or not-a-number weights",
            hint=f"The source is damaged: get it again; a matrix is kept as it is with {keep}",
        )
    if math.isinf(error.maximum) or (layout.quantized and not math.isfinite(error.rmse)):
        raise ConversionError(
            f"{name} holds weights that {layout} cannot", hint="Choose --dtype bfloat16"
        )


def _source(src: Path, config: dict[str, Any], files: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": "safetensors",
        "architecture": str(config.get("model_type")),
        "name": src.resolve().name,
        "files": files,
    }
