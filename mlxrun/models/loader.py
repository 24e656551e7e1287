"""Weights from a GGUF file or a model directory into a transformer, in one dtype.

Reads what is there and casts floats to the dtype of the run; a GGUF goes through the converter's
stream, tensor by tensor, and nothing is written. Knows files and names; arithmetic is elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from converters.convert import Converted, check_policy, half_dtype, skipped, stream
from converters.gguf.config import model_config as gguf_config
from converters.gguf.names import map_names
from converters.gguf.reader import GGUFFile
from converters.layout import FIXED_MODES, Layout, affine, fixed
from converters.policy import Policy
from converters.report import ConversionReport
from mlxrun.errors import CheckpointError, ParameterError
from mlxrun.models.families import model_config
from mlxrun.models.parameters import Parameters
from mlxrun.models.transformer import Transformer
from mlxrun.models.weights import Weight

Progress = Callable[[int, int, str], None]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Share of the free memory that plain float32 weights may take on the CPU.
PLAIN_SHARE = 0.5


@dataclass(frozen=True)
class Loaded:
    """A model in memory and what is known of where it came from.

    Attributes:
        model: ready to run.
        config: ``config.json`` in Hugging Face terms.
        report: the conversion's report for a GGUF; None for a directory.
        unused: parameters of the source that the model has no place for.
    """

    model: Transformer
    config: dict[str, Any]
    report: ConversionReport | None
    unused: list[str]


def on_cpu() -> bool:
    """Whether MLX computes on the CPU by default."""
    return bool(mx.default_device() == mx.cpu)


def resolve_dtype(dtype: str | None, preferred: str) -> str:
    """The dtype of activations: float32 on the CPU, else half precision as the weights prefer."""
    if dtype is None:
        return "float32" if on_cpu() else preferred
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ParameterError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    return dtype


def load_gguf(
    gguf: GGUFFile,
    *,
    dtype: str | None = None,
    policy: str | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Convert a GGUF straight into memory.

    Args:
        dtype: of activations and scales; by default float32 on the CPU and with policy ``exact``
            (half precision rounds what the policy keeps), half precision elsewhere.
        policy: ``exact``, ``near`` or ``compact``. By default plain float32 (exact) on the CPU
            where memory allows, and near elsewhere.

    Raises:
        UnsupportedArchitectureError, GGUFError, InexactError: as the converter raises them.
    """
    names = map_names(gguf)
    config = gguf_config(gguf)
    run = resolve_dtype(dtype or ("float32" if policy == "exact" else None), half_dtype(gguf))
    bound = run_policy(gguf, policy, run)
    arrays: dict[str, mx.array] = {}
    layouts: dict[str, Layout] = {}
    report = ConversionReport({"name": gguf.path.name}, bound.name, skipped=skipped(names))
    for converted in stream(gguf, names, bound, progress=progress):
        arrays |= _to_mlx(converted)
        if converted.layout.quantized:
            layouts[converted.target.removesuffix(".weight")] = converted.layout
        if converted.record:
            report.tensors.append(converted.record)
    return _build(config, Parameters(arrays, layouts, DTYPES[run]), report)


def run_policy(gguf: GGUFFile, name: str | None, dtype: str) -> Policy:
    """The policy that a file is loaded with on this machine, for activations of a dtype."""
    if name is None:
        plain = expands(sum(tensor.elements for tensor in gguf.tensors), dtype)
        return Policy("exact", dtype, packed=False) if plain else Policy("near", dtype)
    # Compact counts bits: float32 scales would leave none for the codes.
    return Policy(check_policy(name), half_dtype(gguf) if name == "compact" else dtype)


def expands(elements: int, dtype: str) -> bool:
    """Whether quantised weights are held as plain float32.

    On the CPU that is exact and, where memory allows, several times faster than packed codes: MLX's
    packed product there runs on one core (docs/architecture.md has the figures).
    """
    return dtype == "float32" and on_cpu() and 4 * elements < PLAIN_SHARE * free_memory()


def free_memory() -> int:
    """Bytes of physical memory that are free or can be freed; 0 where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError):
        return 0


def _to_mlx(converted: Converted) -> dict[str, mx.array]:
    arrays = {}
    for name, array, dtype in converted.named_arrays():
        made = mx.array(np.ascontiguousarray(array))
        arrays[name] = made.view(mx.bfloat16) if dtype == "bfloat16" else made
    return arrays


def load_directory(path: Path, *, dtype: str | None = None) -> Loaded:
    """Load a converted directory, or any mlx-lm or Hugging Face one of a supported family.

    Raises:
        CheckpointError: files are missing, unreadable or contradict each other.
        UnsupportedArchitectureError: no family here has its ``model_type``.
    """
    config = read_config(path)
    family = model_config(config)
    arrays = _read_safetensors(path)
    if family.tied:
        arrays = {name: a for name, a in arrays.items() if not name.startswith("lm_head.")}
    layouts = _layouts(config, arrays)
    floats = {str(a.dtype) for a in arrays.values() if mx.issubdtype(a.dtype, mx.floating)}
    preferred = "bfloat16" if floats <= {"mlx.core.bfloat16", "mlx.core.float32"} else "float16"
    run = resolve_dtype(dtype, preferred)
    elements = sum(Weight(form, arrays[f"{m}.weight"]).elements for m, form in layouts.items())
    expand = bool(layouts) and expands(elements, run)
    return _build(config, Parameters(arrays, layouts, DTYPES[run], expand), None)


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


def _build(config: dict[str, Any], params: Parameters, report: ConversionReport | None) -> Loaded:
    model = Transformer(model_config(config), params)
    # Files are read lazily: a damaged one must fail here, not at the first token.
    mx.eval(params.handed)
    return Loaded(model, config, report, params.unused())
