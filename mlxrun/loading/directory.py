"""A model directory into a transformer: ``config.json`` and safetensors, quantised or plain.

Reads what is there and casts floats to the dtype of the run. Knows files; arithmetic is elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.layout import FIXED_MODES, Layout, affine, fixed
from mlxrun.errors import CheckpointError
from mlxrun.loading.adapters import AdapterChoice, read_adapters
from mlxrun.loading.model import Loaded, build, foreign_classes
from mlxrun.loading.run import DTYPES, expands, resolve_dtype
from mlxrun.models.families import model_config
from mlxrun.weights.weight import Weight


def load_directory(path: Path, *, dtype: str | None = None, adapter: AdapterChoice = ()) -> Loaded:
    """Load a converted directory, or any mlx-lm or Hugging Face one of a supported family.

    Raises:
        AdapterError: an adapter is damaged or was made for another model.
        CheckpointError: files are missing, unreadable or contradict each other.
        UnsupportedArchitectureError: no family here has its ``model_type``.
    """
    config = read_config(path)
    tied = not foreign_classes(config) and model_config(config).tied
    adapters = read_adapters(adapter, config)
    arrays = _read_safetensors(path)
    if tied:
        arrays = {name: a for name, a in arrays.items() if not name.startswith("lm_head.")}
    layouts = _layouts(config, arrays)
    floats = {str(a.dtype) for a in arrays.values() if mx.issubdtype(a.dtype, mx.floating)}
    preferred = "bfloat16" if floats <= {"mlx.core.bfloat16", "mlx.core.float32"} else "float16"
    run = resolve_dtype(dtype, preferred)
    elements = sum(Weight(form, arrays[f"{m}.weight"]).elements for m, form in layouts.items())
    kept = any(f.mode != "affine" and arrays[f"{m}.weight"].ndim == 3 for m, f in layouts.items())
    expand = bool(layouts) and expands(elements, run, kept=kept)
    params = adapters.parameters(arrays, layouts, DTYPES[run], expand)
    return build(config, params, None, adapters)


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a directory.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} is not a model directory: it has no config.json",
            hint="Give a .gguf file, a model directory or org/repo",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return config


def _read_safetensors(path: Path) -> dict[str, mx.array]:
    files = sorted(path.glob("model*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(path / _plain_name(name) for name in names)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise CheckpointError(f"cannot read {index}: {error}") from error
    if not files:
        raise CheckpointError(
            f"{path} has no model*.safetensors", hint="Only safetensors weights are read"
        )
    arrays: dict[str, mx.array] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {file.name}", hint="Download it again")
        try:
            loaded = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
        assert isinstance(loaded, dict)
        arrays |= loaded
    return arrays


def _plain_name(name: str) -> str:
    """A file's name that does not lead out of its directory."""
    if Path(name).name != name or len(name) > 255 or "\0" in name:
        raise ValueError(f"{name[:80]!r} is no file of this directory")
    return name


def _layouts(config: dict[str, Any], arrays: dict[str, mx.array]) -> dict[str, Layout]:
    """Which modules are quantised and how, from the ``quantization`` section."""
    modules = [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]
    section = config.get("quantization") or config.get("quantization_config")
    section = section if isinstance(section, dict) else {}
    if modules and not section:
        raise CheckpointError("the weights are quantised but config.json does not say how")
    layouts = {}
    for module in modules:
        own = section.get(module)
        form = section | own if isinstance(own, dict) else section
        mode = str(form.get("mode", "affine"))
        if f"{module}.weight" not in arrays:
            raise CheckpointError(f"the weights have {module}.scales and no {module}.weight")
        if mode in FIXED_MODES:
            layouts[module] = fixed(mode)
        elif mode == "affine":
            dtype = str(arrays[f"{module}.scales"].dtype).removeprefix("mlx.core.")
            layouts[module] = affine(*_bits_and_group(form), dtype)
        else:
            raise CheckpointError(f"config.json: quantization mode {mode!r} is not known")
    return layouts


def _bits_and_group(form: dict[str, Any]) -> tuple[int, int]:
    bits, group = form.get("bits"), form.get("group_size")
    if bits not in (2, 3, 4, 5, 6, 8) or group not in (32, 64, 128):
        raise CheckpointError(
            f"config.json: quantization of {bits!r} bits in groups of {group!r} is none of MLX's"
        )
    return bits, group
