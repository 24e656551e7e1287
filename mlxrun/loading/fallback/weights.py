"""The arrays of a checkpoint into an mlx-lm module: renamed by its class, checked, in one dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from typing import cast as typed

import mlx.core as mx
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten

from converters.directory.spellings import OTHER_TOWERS
from converters.layout import FIXED_MODES, Layout, affine, fixed
from mlxrun.errors import CheckpointError
from mlxrun.weights.parameters import Parameters

Arrays = dict[str, mx.array]

# Parameters of which mlx-lm takes an exponential in float32: half precision would show.
_PRECISE = "A_log"
_TOWERS = (*OTHER_TOWERS, "visual.", "audio_tower.", "embed_audio.", "embed_vision.", "mtp.")


def fill(model: Any, params: Parameters, *, precise: bool = True) -> list[str]:
    """Give a module of mlx-lm its weights.

    Args:
        params: the weights, under the names of a checkpoint or under the module's own.
        precise: leave the rates of state-space layers in float32 where they are stored so.

    Returns:
        Names that the module has no place for.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    arrays, wanted = matched(model, params)
    checked = replace(params, arrays=arrays, prefix="")
    stays = _stays(model, precise)
    given = {name: checked.array(name, cast=not stays(name)) for name in wanted}
    model.load_weights(list(given.items()), strict=False)
    model.eval()
    towers = {name for name in params.arrays if _of_a_tower(name)}
    return sorted((set(arrays) | towers) - wanted)


def cast(model: Any, dtype: mx.Dtype, *, precise: bool) -> None:
    """Give the parameters that a module was made with the types that :func:`fill` gives them.

    Args:
        dtype: of the run.
        precise: as for :func:`fill`; what stays in float32 is taken to be stored so.
    """
    stays = _stays(model, precise)
    model.load_weights(
        [
            (name, array.astype(dtype))
            for name, array in named_arrays(model).items()
            if mx.issubdtype(array.dtype, mx.floating) and not stays(name)
        ],
        strict=False,
    )


def _stays(model: Any, precise: bool) -> Callable[[str], bool]:
    """Which parameters of a module stay in the type in which they are stored."""
    keep = getattr(model, "cast_predicate", lambda name: True)
    return lambda name: not keep(name) or (precise and name.endswith(_PRECISE))


def _of_a_tower(name: str) -> bool:
    """Whether a parameter is for images or sound; the classes drop these without a word."""
    return name.removeprefix("model.").startswith(_TOWERS)


def matched(model: Any, params: Parameters) -> tuple[Arrays, set[str]]:
    """The weights under a module's own names, and which of these it asks for.

    The module becomes quantised where they are.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    arrays = _sanitized(model, dict(params.arrays))
    _quantize(model, arrays, params)
    wanted = {name: array.shape for name, array in named_arrays(model).items()}
    _check(arrays, wanted)
    return arrays, set(wanted)


def named_arrays(module: Any) -> Arrays:
    """The parameters of a module by their full names."""
    return dict(typed("list[tuple[str, mx.array]]", tree_flatten(module.parameters())))


def _sanitized(model: Any, arrays: Arrays) -> Arrays:
    """The arrays under the module's names, as mlx-lm's class makes them."""
    if not hasattr(model, "sanitize"):
        return arrays
    try:
        renamed: Arrays = model.sanitize(arrays)
    except Exception as error:  # whatever a class raises on names or shapes it does not expect
        what = f"the weights have no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"mlx-lm's {model.model_type} cannot use these weights: {what}",
            hint="Download or convert the model again",
        ) from error
    return renamed


def _quantize(model: Any, arrays: Arrays, params: Parameters) -> None:
    """Make modules quantised as their arrays are; expand what the run or the class wants plain."""
    shapes = {name: array.shape for name, array in named_arrays(model).items()}
    modules = dict(model.named_modules())
    packed: dict[str, Layout] = {}
    for path in [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]:
        if f"{path}.weight" not in shapes or f"{path}.weight" not in arrays:
            continue
        layout = _layout(path, arrays, shapes[f"{path}.weight"][-1])
        if params.expand or not hasattr(modules.get(path), "to_quantized"):
            _expand(path, arrays, layout, params.dtype)
        else:
            packed[path] = layout
    if packed:
        quantize(
            model,
            class_predicate=lambda path, _: packed[path].module_config if path in packed else False,
        )


def _layout(path: str, arrays: Arrays, columns: int) -> Layout:
    """How a module is packed; its shapes tell, whatever its name was."""
    weight, scales = arrays[f"{path}.weight"], arrays[f"{path}.scales"]
    group = columns // max(scales.shape[-1], 1)
    bits = weight.shape[-1] * 32 // columns
    if scales.dtype != mx.uint8 and bits in (2, 3, 4, 5, 6, 8) and group in (32, 64, 128):
        return affine(bits, group, str(scales.dtype).removeprefix("mlx.core."))
    for mode, form in FIXED_MODES.items():
        if scales.dtype == mx.uint8 and form == (group, bits):
            return fixed(mode)
    raise CheckpointError(
        f"{path} has codes {weight.shape} with scales {scales.shape}: packed in no way of MLX's "
        f"for rows of {columns}"
    )


def _expand(path: str, arrays: Arrays, layout: Layout, dtype: mx.Dtype) -> None:
    scales, biases = arrays.pop(f"{path}.scales"), arrays.pop(f"{path}.biases", None)
    if biases is not None:  # else the products would be rounded as the scales are
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    arrays[f"{path}.weight"] = mx.dequantize(
        arrays[f"{path}.weight"],
        scales,
        biases,
        **layout.module_config,
        dtype=dtype,
    )


def _check(arrays: Arrays, wanted: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in wanted if name not in arrays]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        left = sorted(set(arrays) - set(wanted))
        raise CheckpointError(
            f"the weights have no {', '.join(missing[:3])}{more}"
            + (f"; they have {', '.join(left[:3])} instead" if left else ""),
            hint="Download or convert the model again",
        )
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise CheckpointError(
                f"{name} has the shape {arrays[name].shape}, config.json implies {shape}"
            )
