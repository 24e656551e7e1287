"""LoRA adapters: files of mlx-lm, Hugging Face PEFT and llama.cpp, fitted to a model or merged.

Three readers give updates and new parameters by the Hugging Face names of the model. A load applies
the updates to products (:mod:`mlxrun.weights.lora`); a conversion merges them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from converters.errors import shortened
from converters.gguf.lora import read_adapter
from converters.huggingface.names import EXPERT_PROJECTIONS, naming_of, text_name
from converters.quantize.encode import Patch, PrepareMerge, Rows
from converters.quantize.layout import Layout
from converters.quantize.packing import Floats
from mlxrun.config import AdapterChoice
from mlxrun.errors import AdapterError, ParameterError
from mlxrun.models.config import Attention, FeedForward, ModelConfig
from mlxrun.models.families import FAMILIES, model_config
from mlxrun.weights.lora import OTHER_MODEL, LoRA
from mlxrun.weights.parameters import Parameters

Config = Mapping[str, Any]
#: Updates by module and new parameters by name.
Changes = tuple[dict[str, LoRA], dict[str, mx.array]]

# Modules that turn tokens into rows: adapters store their matrices for looking up rows.
EMBEDDINGS = ("embed_tokens", "embeddings", "embedding", "wte")
DAMAGED = "The adapter is damaged: download or train it again"
# Beyond it nothing is left of the model; whole numbers may be too large for any float.
_LARGEST = 1e30


@dataclass(frozen=True)
class Adapters:
    """The changes of all adapters of a load, or of a conversion (``quantize.encode.Merge``).

    Attributes:
        updates: by module, e.g. ``model.layers.0.mlp.up_proj``, in the order of the adapters.
        replaced: whole new parameters by name, e.g. ``model.norm.weight``.
    """

    updates: Mapping[str, Sequence[LoRA]] = field(default_factory=dict)
    replaced: Mapping[str, mx.array] = field(default_factory=dict)

    def applied(self, params: Parameters) -> Parameters:
        """A model's weights with the changes."""
        if not self.replaced:
            return replace(params, updates=self.updates)
        arrays, layouts, blocks = params.arrays, params.layouts, params.blocks
        shapes = {name: _shape(name, arrays, layouts) for name in arrays}
        self._check_replaced(shapes | {name: matrix.shape for name, matrix in blocks.items()})
        modules = {name.rpartition(".")[0] for name in self.replaced if name.endswith(".weight")}
        packing = {f"{module}.{part}" for module in modules for part in ("scales", "biases")}
        arrays = {name: array for name, array in arrays.items() if name not in packing}
        return replace(
            params,
            arrays={**arrays, **self.replaced},
            layouts={name: layout for name, layout in layouts.items() if name not in modules},
            blocks={name: own for name, own in blocks.items() if name not in self.replaced},
            updates=self.updates,
        )

    def check_applied(self, used: Iterable[str], *, modules: bool = True) -> None:
        """Refuse changes of parameters that the model did not use.

        Args:
            used: full names of the parameters that it used.
            modules: check the modules of updates, too.
        """
        used = set(used)
        updates = self.updates.items() if modules else ()
        lost = [own[0].origin for module, own in updates if f"{module}.weight" not in used]
        lost += sorted(set(self.replaced) - used)
        if lost:
            more = f" ({len(lost)} of its tensors)" if len(lost) > 1 else ""
            raise AdapterError(f"{lost[0]}: the model has no such module{more}", hint=OTHER_MODEL)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse changes of parameters that a model of these parameters does not have."""
        self._check_replaced(shapes)
        self.check_applied(shapes)
        for module, updates in self.updates.items():
            for update in updates:
                update.check(module, shapes[f"{module}.weight"])

    def _check_replaced(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, array in self.replaced.items():
            if name not in shapes:
                raise AdapterError(f"the model has no {name} to replace", hint=OTHER_MODEL)
            if array.shape != shapes[name]:
                raise AdapterError(
                    f"{name} has the shape {array.shape} in the adapter, {shapes[name]} in the "
                    "model",
                    hint=OTHER_MODEL,
                )

    def patch(self, name: str) -> Patch | None:
        """The change of some rows of a parameter, or None for none."""
        module = name.removesuffix(".weight")
        updates = self.updates.get(module, ()) if name.endswith(".weight") else ()
        new = self.replaced.get(name)
        if new is None and not updates:
            return None
        whole = None if new is None else _numpy(new).reshape(-1, new.shape[-1])
        stacks = [_as_stack(update) for update in updates]

        def patch(values: Floats, rows: Rows) -> Floats:
            plain = values if whole is None else whole[rows]
            merged = plain.copy()
            for stack in stacks:
                _merge(stack, plain, rows, merged)
            return merged

        return patch


def _shape(
    name: str, arrays: Mapping[str, mx.array], layouts: Mapping[str, Layout]
) -> tuple[int, ...]:
    layout, shape = layouts.get(name.removesuffix(".weight")), arrays[name].shape
    return (*shape[:-1], shape[-1] * 32 // layout.bits) if layout else shape


def read_adapters(choice: AdapterChoice, config: Config, model: ModelConfig | None) -> Adapters:
    """Read adapters for a model.

    Args:
        choice: as :func:`mlxrun.load` takes it.
        config: the model's ``config.json``.
        model: the same for our transformer; None for a class of mlx-lm.

    Raises:
        AdapterError: one is missing, damaged, or made for another model.
        ParameterError: a strength that is no finite number.
    """
    updates: dict[str, list[LoRA]] = defaultdict(list)
    replaced: dict[str, mx.array] = {}
    for path, strength in listed(choice):
        changes, new = _read(path, config)
        if strength == 0:
            continue
        if new and strength != 1:
            raise AdapterError(
                f"{path.name} replaces weights, which has no strength between none and whole",
                hint="Use it with strength 1",
            )
        replaced |= new
        fitted = {module: [update] for module, update in changes.items()}
        if model is not None:
            _fit_fused(fitted, model)
        for module, own in fitted.items():
            updates[module] += [replace(update, strength=strength) for update in own]
    return Adapters(dict(updates), replaced)


def listed(choice: AdapterChoice) -> list[tuple[Path, float]]:
    """Paths with strengths."""
    allowed = "a path, or a list of paths and (path, strength)"
    if isinstance(choice, str | Path):
        choice = [choice]
    if not isinstance(choice, Sequence) or isinstance(choice, bytes):
        raise ParameterError("adapter", choice, allowed)
    found = []
    for entry in choice:
        pair = (entry, 1.0) if isinstance(entry, str | Path) else entry
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], str | Path):
            raise ParameterError("adapter", entry, allowed)
        strength = pair[1]
        real = isinstance(strength, int | float) and not isinstance(strength, bool)
        if not real or not abs(strength) < _LARGEST:
            raise ParameterError("the strength of an adapter", strength, "a finite number")
        found.append((_located(Path(pair[0])), float(strength)))
    return found


def _located(path: Path) -> Path:
    """The path, ``~`` expanded, if there is something."""
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


def _read(path: Path, config: Config) -> Changes:
    """The adapter at a path, in whichever format it is."""
    if path.is_file() and path.suffix != ".safetensors":
        return _read_gguf(path, config)
    folder = path if path.is_dir() else path.parent
    settings = _settings(folder / "adapter_config.json")
    peft = "peft_type" in settings
    name = "adapter_model.safetensors" if peft else "adapters.safetensors"
    file = path / name if path.is_dir() else path
    return _read_peft(file, settings, config) if peft else _read_mlx_lm(file, settings)


def _settings(file: Path) -> dict[str, Any]:
    """``adapter_config.json``."""
    if not file.is_file():
        raise AdapterError(
            f"{file.parent} is no adapter: it has no {file.name}",
            hint="Give a directory with adapter_config.json, or a GGUF file",
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {file}: {error}", hint=DAMAGED) from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{file} is not a JSON object", hint=DAMAGED)
    return settings


def _tensors(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file."""
    if not file.is_file():
        raise AdapterError(
            f"{file.parent} has no {file.name}",
            hint="Only safetensors are read; save the adapter as such",
        )
    try:
        arrays = mx.load(str(file), format="safetensors")
        assert isinstance(arrays, dict)
        mx.eval(list(arrays.values()))
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"cannot read {file}: {error}", hint=DAMAGED) from error
    if not arrays:
        raise AdapterError(f"{file} holds no tensors", hint=DAMAGED)
    return arrays


def _number(settings: Config, key: str, where: str) -> float:
    """A finite number of an adapter's configuration."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        found = "nothing" if value is None else shortened(repr(value), 60)
        raise AdapterError(f"{where}: {key} must be a number, found {found}", hint=DAMAGED)
    return float(value)


def _check_numbers(origin: str, array: mx.array) -> None:
    """Refuse arrays of anything but finite floats."""
    if not mx.issubdtype(array.dtype, mx.floating):
        raise AdapterError(f"{origin}: expected floats, found {array.dtype}", hint=DAMAGED)
    if not mx.isfinite(array.astype(mx.float32)).all().item():
        raise AdapterError(f"{origin}: holds infinite numbers or no numbers (NaN)", hint=DAMAGED)


def _lora(
    origin: str,
    a: mx.array | None,
    b: mx.array | None,
    scale: float,
    *,
    magnitude: mx.array | None = None,
    rank: int | None = None,
) -> LoRA:
    """A checked update from the tensors of a file; ``rank``: as the configuration has it."""
    if a is None or b is None:
        missing = "first (A)" if a is None else "second (B)"
        raise AdapterError(f"{origin}: the {missing} of the two matrices is missing", hint=DAMAGED)
    for array in (a, b) if magnitude is None else (a, b, magnitude):
        _check_numbers(origin, array)
    if a.ndim not in (2, 3) or a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2]:
        raise AdapterError(
            f"{origin}: expected two matrices or two equal stacks of them, "
            f"found shapes {a.shape} and {b.shape}",
            hint=DAMAGED,
        )
    found = a.shape[-2]
    if not found or found != b.shape[-1] or rank not in (None, found):
        expected = "above 0" if rank is None else str(rank)
        raise AdapterError(
            f"{origin}: expected one rank {expected}, found {found} and {b.shape[-1]}",
            hint=DAMAGED,
        )
    return LoRA(origin, a, b, scale, magnitude=magnitude)


def _updates(
    name: str,
    modules: Mapping[str, Mapping[str, mx.array]],
    numbers: Callable[[str, str], tuple[float, int | None]],
    *,
    dora: bool,
) -> dict[str, LoRA]:
    """The updates of an adapter by module.

    Args:
        modules: ``A``, ``B`` and, of DoRA, ``M`` of each.
        numbers: scale, and rank as the configuration has it, of an origin and its module.
    """
    updates = {}
    for module, parts in modules.items():
        origin = f"{name}: {module}"
        if dora and "M" not in parts:
            raise AdapterError(f"{origin}: the magnitudes are missing", hint=DAMAGED)
        a, b = parts.get("A"), parts.get("B")
        if module.endswith(EMBEDDINGS):
            a, b = b, a
        scale, rank = numbers(origin, module)
        updates[module] = _lora(origin, a, b, scale, magnitude=parts.get("M"), rank=rank)
    return updates


# --- llama.cpp ------------------------------------------------------------------------------------


def _read_gguf(path: Path, config: Config) -> Changes:
    adapter = read_adapter(path, config)
    norms = {name: mx.array(weight) for name, weight in adapter.norms.items()}
    for name, weight in norms.items():
        _check_numbers(f"{path.name}: {name}", weight)
    updates = {}
    for module, pair in adapter.pairs.items():
        a, b = (None if part is None else mx.array(part) for part in (pair.a, pair.b))
        updates[module] = _lora(f"{path.name}: {pair.source}", a, b, pair.scale)
    return updates, norms


# --- mlx-lm ---------------------------------------------------------------------------------------


def _read_mlx_lm(file: Path, settings: Config) -> Changes:
    """As mlx-lm's trainer saves it (LORA.md there): kinds ``lora``, ``dora`` and ``full``.

    Parameters have the names of mlx-lm's model, which are those of a converted checkpoint.
    """
    kind, name = settings.get("fine_tune_type", "lora"), file.parent.name
    if kind not in ("lora", "dora", "full"):
        raise AdapterError(
            f"{name}: fine_tune_type {shortened(repr(kind), 60)} is none of lora, dora and full"
        )
    arrays = _tensors(file)
    if kind == "full":
        for key, array in arrays.items():
            _check_numbers(f"{name}: {key}", array)
        return {}, arrays
    parameters = settings.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterError(f"{name}: adapter_config.json has no lora_parameters", hint=DAMAGED)
    scale = _number(parameters, "scale", name)
    rank = int(_number(parameters, "rank", name)) if "rank" in parameters else None
    known = {"lora_a": "A", "lora_b": "B"} | ({"m": "M"} if kind == "dora" else {})
    modules: dict[str, dict[str, mx.array]] = defaultdict(dict)
    for key, array in arrays.items():
        module, _, part = key.rpartition(".")
        if part not in known:
            raise AdapterError(f"{name}: {key} is no tensor of a {kind} adapter", hint=DAMAGED)
        # Those of experts and of embeddings are not stored transposed.
        transposed = array.ndim == 2 and not module.endswith(EMBEDDINGS)
        modules[module][known[part]] = array.T if transposed else array
    return _updates(name, modules, lambda *_: (scale, rank), dora=kind == "dora"), {}


# --- PEFT -----------------------------------------------------------------------------------------

# ``default`` is the name of an adapter without one; files have it or not.
_PART = re.compile(r"(.+)\.lora_(embedding_)?(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?")
_SAVED = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)")
# Ways to start training that move weights from the base model to the adapter.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
# A stranger's pattern against a stranger's names: repeats within repeats take exponential time, and
# each repeat next to others multiplies it by the length of a name.
_REPEAT, _REPEATED_GROUP, _REPEATS = re.compile(r"[*+{]"), re.compile(r"\)[*+{]"), 3
_EXPERT = re.compile(r"(model\.layers\.\d+\.).+\.experts\.(\d{1,6})\.(\w+)")


def _read_peft(file: Path, settings: Config, config: Config) -> Changes:
    """As PEFT's ``save_pretrained`` writes it: LoRA, DoRA and rank-stabilized ones.

    Parameters have the names of transformers' model below ``base_model.model``.
    """
    name, naming = file.parent.name, naming_of(config)
    _check_peft(name, settings)
    modules: dict[str, dict[str, mx.array]] = defaultdict(dict)
    replaced = {}
    for key, array in _tensors(file).items():
        inner = key.removeprefix("base_model.model.")
        if found := _PART.fullmatch(inner):
            part = "M" if found[3] == "magnitude_vector" else found[3]
            modules[found[1]][part] = array.T if found[2] and array.ndim == 2 else array
        elif (found := _SAVED.fullmatch(inner)) and "lora_" not in inner:
            _check_numbers(f"{name}: {key}", array)
            replaced[text_name(f"{found[1]}.{found[2]}", naming)] = array
        else:
            raise AdapterError(f"{name}: {shortened(key, 200)} is no tensor of a LoRA adapter")

    def numbers(origin: str, module: str) -> tuple[float, int]:
        rank = _by_pattern(origin, settings, "r", "rank_pattern", module)
        alpha = _by_pattern(origin, settings, "lora_alpha", "alpha_pattern", module)
        # Rank-stabilized: Kalajdzievski, 2023, arXiv:2312.03732.
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank) if rank > 0 else 0.0
        return scale, int(rank)

    updates = _updates(name, modules, numbers, dora=bool(settings.get("use_dora")))
    named = {text_name(module, naming): update for module, update in updates.items()}
    return _stacked(name, named, config), replaced


def _check_peft(name: str, settings: Config) -> None:
    kind, start = settings.get("peft_type"), settings.get("init_lora_weights")
    if kind != "LORA":
        raise AdapterError(
            f"{name}: peft_type {shortened(repr(kind), 60)} is not known",
            hint="Only LORA is; merge others with PEFT's merge_and_unload",
        )
    if settings.get("fan_in_fan_out") or settings.get("layer_replication"):
        raise AdapterError(f"{name}: fan_in_fan_out and layer_replication are not known")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise AdapterError(
            f"{name} began as {start}, which changes the base model too",
            hint="Save it with PEFT's path_initial_model_for_weight_conversion",
        )


def _by_pattern(origin: str, settings: Config, key: str, patterns: str, module: str) -> float:
    """A number for a module: that of the first pattern which its name ends with, or the common."""
    own = settings.get(patterns) or {}
    if not isinstance(own, dict):
        raise AdapterError(f"{origin}: {patterns} is no object", hint=DAMAGED)
    for pattern in own:
        if len(_REPEAT.findall(pattern)) > _REPEATS or _REPEATED_GROUP.search(pattern):
            raise AdapterError(
                f"{origin}: {patterns} has a pattern that could be matched for ever: "
                f"{shortened(repr(pattern), 60)}",
                hint="Name the modules",
            )
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise AdapterError(f"{origin}: {patterns}: {error}", hint=DAMAGED) from error
        if matches:
            return _number(own, pattern, origin)
    return _number(settings, key, origin)


def _stacked(name: str, updates: Mapping[str, LoRA], config: Config) -> dict[str, LoRA]:
    """The updates, those of single experts joined to one of the stack."""
    home = naming_of(config).experts
    found: dict[str, LoRA] = {}
    stacks: dict[str, dict[int, LoRA]] = defaultdict(dict)
    for module, update in updates.items():
        expert = _EXPERT.fullmatch(module)
        if home and expert and expert[3] in EXPERT_PROJECTIONS:
            stacks[f"{expert[1]}{home}.{EXPERT_PROJECTIONS[expert[3]]}"][int(expert[2])] = update
        else:
            found[module] = update
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((int(config[key]) for key in keys if config.get(key)), 0)
    for module, members in stacks.items():
        found[module] = _stack(f"{name}: {module}", members, count)
    return found


def _stack(origin: str, members: Mapping[int, LoRA], count: int) -> LoRA:
    """Experts without an adapter of their own get one of zeros."""
    first = members[min(members)]
    kinds = {(m.a.shape, m.b.shape, m.scale, m.magnitude is None) for m in members.values()}
    if len(kinds) > 1 or first.magnitude is not None or max(members) >= count:
        raise AdapterError(
            f"{origin}: expected adapters of one shape and scale (and no DoRA) for experts 0 to "
            f"{count - 1}, found {len(kinds)} kinds, up to expert {max(members)}",
            hint=OTHER_MODEL,
        )
    zeros = replace(first, a=mx.zeros_like(first.a), b=mx.zeros_like(first.b))
    each = [members.get(number, zeros) for number in range(count)]
    return LoRA(origin, mx.stack([m.a for m in each]), mx.stack([m.b for m in each]), first.scale)


# --- fused projections ----------------------------------------------------------------------------


def _fit_fused(updates: dict[str, list[LoRA]], config: ModelConfig) -> None:
    """Move updates between fused projections and their parts, as the model has them.

    A fused projection has the rows of its parts below each other, so an update of a part is one of
    some of its rows, and each part takes its own rows of an update of the whole.
    """
    for module, parts, fused in _fusions(config):
        whole, first = updates.pop(module, []) if not fused else [], 0
        for update in whole:
            _check_rows(update, module, sum(parts.values()))
        for part, rows in parts.items():
            own = slice(first, first + rows)
            if fused:
                for update in updates.pop(part, []):
                    _check_rows(update, part, rows)
                    updates.setdefault(module, []).append(replace(update, first=first))
            for update in whole:
                magnitude = None if update.magnitude is None else update.magnitude[own]
                cut = replace(update, b=update.b[own], magnitude=magnitude)
                updates.setdefault(part, []).append(cut)
            first += rows


def _fusions(config: ModelConfig) -> Iterator[tuple[str, dict[str, int], bool]]:
    """Projections that may be fused: the module, rows of its parts, whether the model fuses it."""
    for i, layer in enumerate(config.layers):
        place, attention, inner = f"model.layers.{i}", layer.attention, layer.feed_forward
        if isinstance(attention, Attention):
            at, keys = f"{place}.self_attn", attention.kv_heads * attention.head_dim
            queries = attention.heads * attention.head_dim
            rows = {f"{at}.q_proj": queries, f"{at}.k_proj": keys, f"{at}.v_proj": keys}
            yield f"{at}.qkv_proj", rows, attention.fused
        if isinstance(inner, FeedForward):
            at = f"{place}.{layer.mlp}"
            rows = {f"{at}.gate_proj": inner.size, f"{at}.up_proj": inner.size}
            yield f"{at}.gate_up_proj", rows, inner.fused


def _check_rows(update: LoRA, module: str, rows: int) -> None:
    if update.b.ndim != 2 or update.b.shape[0] != rows:
        raise AdapterError(
            f"{update.origin}: expected {rows} rows for {module}, found {update.b.shape[0]}",
            hint=OTHER_MODEL,
        )


# --- merging --------------------------------------------------------------------------------------


def merging(choice: AdapterChoice) -> PrepareMerge | None:
    """A reader of adapters for a conversion, once its model is known; None without adapters."""
    if isinstance(choice, list | tuple) and not choice:
        return None

    def merger(config: Config) -> Adapters:
        model = model_config(dict(config)) if config.get("model_type") in FAMILIES else None
        return read_adapters(choice, config, model)

    return merger


def _as_stack(update: LoRA) -> LoRA:
    """The update with NumPy's arrays (matrices, ...), of one matrix or of a stack."""
    lead = (1,) if update.a.ndim == 2 else ()
    a, b, magnitude = (
        None if part is None else _numpy(part).reshape(*lead, *part.shape)
        for part in (update.a, update.b, update.magnitude)
    )
    return replace(update, a=a, b=b, magnitude=magnitude)


def _merge(stack: LoRA, plain: Floats, rows: Rows, merged: Floats) -> None:
    """Add an update of some rows ``plain`` (n, columns) to ``merged``.

    Args:
        rows: their numbers; rows of a stack are numbered through.
    """
    height = stack.b.shape[1]
    # A stack has no fused projections.
    numbers = np.divmod(rows, height) if len(stack.a) > 1 else (0 * rows, rows - (stack.first or 0))
    matrix, row = numbers
    for each in np.unique(matrix):
        here = np.flatnonzero((matrix == each) & (row >= 0) & (row < height))
        own = row[here]
        magnitude = None if stack.magnitude is None else stack.magnitude[each, own]
        part = replace(stack, a=stack.a[each], b=stack.b[each, own], magnitude=magnitude)
        before = plain[here]
        b, scale = part.factors(lambda before=before: before, np)  # type: ignore[misc]
        # Not a matrix product: a BLAS would start threads of its own within the pool's.
        product = np.einsum("nr,rc->nc", b, part.a)
        merged[here] += product if scale is None else product + scale[:, None] * before


def _numpy(array: mx.array) -> Floats:
    """A float32 copy."""
    return np.array(array.astype(mx.float32))
