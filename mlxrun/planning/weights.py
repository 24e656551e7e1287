"""What a model's weights will take in memory here, from the headers of its files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from converters.directory.files import weight_files
from converters.directory.header import StoredArray
from converters.directory.quantization import stored_form
from converters.estimate import expected_layout
from converters.gguf.config import model_config
from converters.gguf.names import map_names
from converters.gguf.reader import GGUFFile
from converters.layout import dense
from mlxrun.kernels.dispatch import Kernels, cpu_kernels
from mlxrun.loading.gguf import BLOCKS, block_bytes, forms, lies, run_dtype
from mlxrun.loading.run import form, resolve_dtype
from mlxrun.models.families import FAMILIES

_FLOATS = ("F8_E4M3", "F16", "BF16", "F32")


@dataclass(frozen=True)
class Held:
    """Weights as a run on this machine holds them.

    Attributes:
        nbytes: of all of them.
        dtype: of activations, such as ``float32``.
        packed: some are quantised in MLX's forms.
        how: in words.
        modules: bytes of each module by the name that the source gives it.
        fused: the kernels of this package compute.
        mapped: bytes of those that stay in the file, whose pages all share that run it.
    """

    nbytes: int
    dtype: str
    packed: bool
    how: str
    modules: Mapping[str, float] = field(default_factory=dict)
    mapped: int = 0
    fused: bool = False


def of_gguf(gguf: GGUFFile, *, dtype: str | None = None, policy: str | None = None) -> Held:
    """The weights of a GGUF that is loaded with these options; see :func:`mlxrun.load`.

    Raises:
        UnsupportedArchitectureError: its tensors have no known names.
    """
    run, names = run_dtype(gguf, dtype, policy), map_names(gguf)
    ours = model_config(gguf)["model_type"] in FAMILIES
    chosen = forms(gguf, names, dtype=run, policy=policy, ours=ours)
    modules: dict[str, float] = defaultdict(float)
    packed, shared = False, 0
    for mapped in chosen.blocks:
        nbytes = block_bytes(mapped)
        modules[_module(mapped.target)] += nbytes
        shared += nbytes if chosen.step and lies(mapped) else 0
    for mapped in chosen.others.mapped:
        tensor = mapped.source
        expected = expected_layout(tensor.type, chosen.policy, module=len(tensor.shape) > 1)
        if expected:
            # Plain arrays are held in the type of the activations.
            layout = expected.layout if expected.layout.quantized else dense(run)
            packed = packed or expected.layout.quantized
            modules[_module(mapped.target)] += tensor.elements * layout.bits_per_weight / 8
    for target, length in names.zeros:
        modules[_module(target)] += length * dense(run).bits_per_weight / 8
    how = f"{BLOCKS if chosen.blocks else chosen.policy.name}, {run}"
    fused = chosen.kernels is not None
    return Held(round(sum(modules.values())), run, packed, how, modules, shared, fused)


def of_directory(
    path: Path, config: Mapping[str, Any], *, dtype: str | None = None, ours: bool = True
) -> Held:
    """The weights of a model directory; see :func:`mlxrun.load`.

    Args:
        ours: whether a class of ours runs it, whose scales stay narrow in float32.

    Raises:
        CheckpointError: files are missing or damaged, or ``config.json`` does not say how they are
            quantised.
    """
    entries = weight_files(path).entries
    packed = {name for name in entries if _is_code(name, entries)}
    kinds = {e.dtype for name, e in entries.items() if e.dtype in _FLOATS}
    preferred = "bfloat16" if kinds <= {"BF16", "F32"} else "float16"
    run = resolve_dtype(dtype, preferred)
    size = 4 if run == "float32" else 2
    forms = {name: stored_form(config, _module(name)) for name in packed}
    elements = {name: prod(entries[name].shape) * 32 // f.bits for name, f in forms.items()}
    kept = any(len(entries[name].shape) == 3 and f.mode != "affine" for name, f in forms.items())
    plain = bool(packed) and form(sum(elements.values()), run, kept=kept).plain
    modules: dict[str, float] = defaultdict(float)
    for name, entry in entries.items():
        part = _module(name) + ".weight" in packed and not name.endswith(".bias")
        narrow = ours and run == "float32" and entry.dtype == "F16"
        if name in packed:
            nbytes = elements[name] * size if plain else entry.nbytes
        elif part and plain:
            continue
        elif part and narrow:
            nbytes = entry.nbytes
        else:
            nbytes = prod(entry.shape) * size if entry.dtype in _FLOATS else entry.nbytes
        modules[_module(name)] += nbytes
    stays = bool(packed) and not plain
    how = f"{'as stored' if stays else 'plain'}, {run}"
    fused = ours and isinstance(cpu_kernels((), run), Kernels)
    return Held(round(sum(modules.values())), run, stays, how, modules, fused=fused)


def _module(name: str) -> str:
    """The module that a parameter belongs to."""
    return name.rpartition(".")[0]


def _is_code(name: str, entries: Mapping[str, StoredArray]) -> bool:
    module, _, kind = name.rpartition(".")
    return kind == "weight" and entries[name].dtype == "U32" and f"{module}.scales" in entries
