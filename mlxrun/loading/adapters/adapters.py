"""The adapters that a user names, read and fitted to one model.

Knows which file is in which format, and that a change must apply to something.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.layout import Layout
from mlxrun.errors import AdapterError, ParameterError
from mlxrun.loading.adapters.adapter import DAMAGED, OTHER_MODEL, Adapter
from mlxrun.loading.adapters.fuse import spread
from mlxrun.loading.adapters.gguf import read_gguf_adapter
from mlxrun.loading.adapters.mlx_lm import read_mlx_lm
from mlxrun.loading.adapters.peft import read_peft
from mlxrun.models.config import ModelConfig
from mlxrun.weights.low_rank import Update
from mlxrun.weights.parameters import Parameters

#: A path, or paths, each alone or with a strength.
AdapterChoice = str | Path | Sequence[str | Path | tuple[str | Path, float]]


@dataclass(frozen=True)
class Adapters:
    """What all adapters of a load change together, by the parameters' Hugging Face names.

    Attributes:
        updates: by module; what several adapters add to it, in their order.
        replaced: whole new parameters.
    """

    updates: Mapping[str, Sequence[Update]] = field(default_factory=dict)
    replaced: Mapping[str, mx.array] = field(default_factory=dict)

    def applied(self, params: Parameters) -> Parameters:
        """A model's weights with the changes.

        Raises:
            AdapterError: a new parameter is none of the model's.
        """
        if not self.replaced:
            return replace(params, updates=self.updates)
        arrays, layouts, blocks = params.arrays, params.layouts, params.blocks
        shapes = {name: _shape(name, arrays, layouts) for name in arrays}
        self.check_replaced(shapes | {name: matrix.shape for name, matrix in blocks.items()})
        modules = {name.rpartition(".")[0] for name in self.replaced if name.endswith(".weight")}
        arrays = {k: v for k, v in arrays.items() if not _belongs(k, modules)}
        return replace(
            params,
            arrays={**arrays, **self.replaced},
            layouts={k: v for k, v in layouts.items() if k not in modules},
            blocks={k: v for k, v in blocks.items() if k not in self.replaced},
            updates=self.updates,
        )

    def check_replaced(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse new parameters that a model with these ones has no place for.

        Raises:
            AdapterError: there is no such parameter, or it has another shape.
        """
        for name, array in self.replaced.items():
            if name not in shapes:
                raise AdapterError(f"the model has no {name} to replace", hint=OTHER_MODEL)
            if array.shape != shapes[name]:
                raise AdapterError(
                    f"{name} has the shape {array.shape} in the adapter, {shapes[name]} in the "
                    "model",
                    hint=OTHER_MODEL,
                )

    def check_applied(self, used: Iterable[str], *, modules: bool = True) -> None:
        """Refuse changes of what the model did not ask for.

        Args:
            used: full names of the parameters that the model asked for.
            modules: whether updates may still be of modules that the model does not have.

        Raises:
            AdapterError: there are such; the first is named.
        """
        used = set(used)
        updates = self.updates.items() if modules else ()
        lost = [u[0].origin for m, u in updates if f"{m}.weight" not in used]
        lost += sorted(set(self.replaced) - used)
        if lost:
            more = f" ({len(lost)} of its tensors)" if len(lost) > 1 else ""
            raise AdapterError(f"{lost[0]}: the model has no such module{more}", hint=OTHER_MODEL)


def _shape(
    name: str, arrays: Mapping[str, mx.array], layouts: Mapping[str, Layout]
) -> tuple[int, ...]:
    """Of a parameter, whatever form it has."""
    layout, shape = layouts.get(name.removesuffix(".weight")), arrays[name].shape
    return (*shape[:-1], shape[-1] * 32 // layout.bits) if layout else shape


def _belongs(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter says how a module's matrix is packed."""
    module, _, kind = name.rpartition(".")
    return kind in ("scales", "biases") and module in modules


def read_adapters(
    choice: AdapterChoice, config: Mapping[str, Any], model: ModelConfig | None
) -> Adapters:
    """Read adapters for a model.

    Args:
        choice: as :func:`mlxrun.load` takes it.
        config: the model's ``config.json``.
        model: the same for our transformer; None for a class of mlx-lm.

    Raises:
        AdapterError: one is missing, damaged, or made for another model.
        ParameterError: a strength that is no finite number.
    """
    updates: dict[str, list[Update]] = defaultdict(list)
    replaced: dict[str, mx.array] = {}
    for path, strength in listed(choice):
        adapter = _read(path, config)
        if strength == 0:
            continue
        if adapter.replaced and strength != 1:
            raise AdapterError(
                f"{adapter.name} replaces weights, which has no strength between none and whole",
                hint="Use it with strength 1",
            )
        replaced |= adapter.replaced
        fitted = (
            {module: [update] for module, update in adapter.updates.items()}
            if model is None
            else spread(adapter.updates, model)
        )
        for module, changes in fitted.items():
            updates[module] += [replace(change, strength=strength) for change in changes]
    return Adapters(dict(updates), replaced)


def listed(choice: AdapterChoice) -> list[tuple[Path, float]]:
    """Paths with strengths, whatever way they were given.

    Raises:
        ParameterError: what was given are no paths and strengths.
    """
    if isinstance(choice, str | Path):
        choice = [choice]
    if not isinstance(choice, Sequence) or isinstance(choice, bytes):
        raise ParameterError("adapter", choice, _CHOICES)
    listed = []
    for entry in choice:
        pair = (entry, 1.0) if isinstance(entry, str | Path) else entry
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], str | Path):
            raise ParameterError("adapter", entry, _CHOICES)
        strength = pair[1]
        real = isinstance(strength, int | float) and not isinstance(strength, bool)
        if not real or not abs(strength) < _STRONGEST:
            raise ParameterError("the strength of an adapter", strength, "a finite number")
        listed.append((_located(Path(pair[0])), float(strength)))
    return listed


# Beyond it nothing is left of the model; whole numbers may be too large for any float.
_STRONGEST = 1e30
_CHOICES = "a path, or a list of paths and (path, strength)"


def _located(path: Path) -> Path:
    """The path, ``~`` expanded, if there is something.

    Raises:
        AdapterError: there is nothing, or the system does not say.
    """
    try:
        path = path.expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:
        raise AdapterError(f"cannot open the adapter {path}: {error}") from error
    raise AdapterError(
        f"there is no adapter at {path}",
        hint="Give a directory with adapter_config.json, or a GGUF file; those of the hub are to "
        "be downloaded first",
    )


def _read(path: Path, config: Mapping[str, Any]) -> Adapter:
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix != ".safetensors":
        return read_gguf_adapter(path, config)
    said = _read_config(folder / "adapter_config.json")
    if "peft_type" in said:
        return read_peft(
            path / "adapter_model.safetensors" if path.is_dir() else path, said, config
        )
    return read_mlx_lm(path / "adapters.safetensors" if path.is_dir() else path, said)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise AdapterError(
            f"{file.parent} is no adapter: it has no {file.name}",
            hint="Give a directory with adapter_config.json, or a GGUF file",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {file}: {error}", hint=DAMAGED) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} is not a JSON object", hint=DAMAGED)
    return config
