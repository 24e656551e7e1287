"""Facts of a model from its headers, as JSON types: contents, conversions, memory, costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from converters.errors import MlxrunError
from converters.gguf.names import NameMap
from converters.gguf.reader import GGUFFile, GGUFTensor, read_gguf
from converters.gguf.source import half_dtype, skipped
from converters.huggingface.names import text_config
from converters.huggingface.reader import StoredTensor, read_config, read_object, stored_tensors
from converters.quantize.encode import expected_layout
from converters.quantize.policy import POLICIES, Policy
from mlxrun.cli.roofline import model_facts
from mlxrun.config import DEFAULT_CACHE, CacheConfig, StorageConfig
from mlxrun.engine.engine import prefill_budget
from mlxrun.errors import ParameterError
from mlxrun.kv_cache.factory import token_bytes
from mlxrun.kv_cache.options import NAMES, PER_CHANNEL, Shape
from mlxrun.llm import PREFIX_BYTES, PREFIX_SHARE
from mlxrun.loader import DTYPES, Checkpoint, GGUFCheckpoint, WeightStorage, open_model, run_dtype
from mlxrun.memory.plan import MemoryPlan, plan_source
from mlxrun.model import Model
from mlxrun.models.config import ModelConfig
from mlxrun.sampling_defaults import read_sampling_defaults
from mlxrun.text.from_directory import has_chat_template
from mlxrun.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from mlxrun.models.mlx_lm import MLXLMClasses

Facts = dict[str, Any]
Layers = Sequence[tuple[Shape, int | None]]

# Entries of a long array that are shown.
SHOWN = 6
CACHE_TYPES = {"float16": 2, "float32": 4}


def inspect_model(
    path: Path,
    *,
    context: int | None,
    parallel: int = 1,
    cache: CacheConfig = DEFAULT_CACHE,
    policy: str | None = None,
    chips: Sequence[str] = (),
) -> Facts:
    """All facts of a model from its headers.

    Args:
        path: a ``.gguf`` file (vocabulary-only and of any architecture, too) or a model directory.
        context: tokens to plan memory for; by default the model's own context length.
        parallel: sequences to plan memory for.
        policy: the one to estimate a conversion for, and to plan with; by default all are
            estimated, and the plan is for the default of loading.
        chips: names from :mod:`mlxrun.analysis.chips`, for limits.

    Raises:
        GGUFError, CheckpointError: the header is damaged or missing.
        ParameterError: a cache type that does not fit the model's heads; no such chip.
    """
    file = path if path.is_dir() else read_gguf(path)
    source, model, problem = _opened(file)
    runs = source if model else None
    if isinstance(file, Path):
        facts = _directory(file, model, context)
        storage = runs.storage() if runs and facts["tensors"] else None
    else:
        storage = runs.storage(policy=policy) if runs else None
        mapped = source.names if isinstance(source, GGUFCheckpoint) and model else None
        facts = _gguf(file, mapped, model, storage, context, policy)
    facts["problem"] = problem
    facts["sampling"] = _sampling(file)
    facts["chat_template"] = _has_chat_template(file)
    facts["tokenizer_problem"] = _tokenizer_problem(path) if path.is_dir() else None
    facts["plan"] = facts["work"] = None
    facts.setdefault("cache_types", [])
    if source and storage:
        beside = prefill_budget("batch")
        plan = plan_source(source, storage, cache=cache, prefill_tokens=beside)
        plan = replace(plan, prefix_bytes=min(PREFIX_BYTES, int(PREFIX_SHARE * plan.limit)))
        longest = facts["model"]["context_length"]
        tokens = context or longest
        facts["plan"] = plan_facts(plan, storage, tokens, parallel, longest=longest)
        facts["work"] = model_facts(
            source, policy=policy, context=tokens, parallel=parallel, cache=cache, chips=chips
        )
    return facts


def _opened(file: Path | GGUFFile) -> tuple[Checkpoint | None, Described | None, str | None]:
    """The source and its model, or why it cannot be run."""
    if isinstance(file, GGUFFile) and not file.tensors:
        return None, None, "a vocabulary without weights: it can tokenize, not generate"
    try:
        source = open_model(file)
        return source, described(source.definition, source.config), None
    except MlxrunError as error:
        return None, None, str(error)


def _sampling(source: Path | GGUFFile) -> Facts:
    """The sampling parameters that the model's files recommend."""
    defaults = read_sampling_defaults(source)
    problems = list(defaults.problems)
    return {"source": defaults.source, "values": defaults.values, "problems": problems}


def _has_chat_template(source: Path | GGUFFile) -> bool | None:
    """Whether the model has a chat template; None if its tokenizer's files are damaged."""
    if not isinstance(source, Path):
        return "tokenizer.chat_template" in source.metadata
    try:
        return has_chat_template(source)
    except MlxrunError:
        return None


def _tokenizer_problem(path: Path) -> str | None:
    """Why the tokenizer of a directory cannot be used, or None."""
    try:
        load_tokenizer(path)
    except MlxrunError as error:
        return str(error)
    return None


def _gguf(
    gguf: GGUFFile,
    names: NameMap | None,
    model: Described | None,
    storage: WeightStorage | None,
    context: int | None,
    policy: str | None,
) -> Facts:
    facts: Facts = {
        "format": f"GGUF v{gguf.version}",
        "files": [{"name": p.name, "bytes": p.stat().st_size} for p in gguf.paths],
        "architecture": gguf.architecture,
        "metadata": {key: _short(value) for key, value in gguf.metadata.items()},
        "types": _by_type((t.type.name, t.elements, t.nbytes) for t in gguf.tensors),
        "tensors": [
            {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.nbytes}
            for t in gguf.tensors
        ],
    }
    facts["model"] = model.facts if model else None
    facts["skipped"] = skipped(names) if names else []
    tensors = [mapped.source for mapped in names.mapped] if names else list(gguf.tensors)
    policies = [policy] if policy else POLICIES
    facts["policies"] = [_estimate(name, gguf, tensors) for name in policies] if tensors else []
    if model and storage:
        loaded = {"policy": f"run here ({storage.how})", "bytes": storage.nbytes}
        facts["loaded"] = loaded
        facts["memory"] = _memory(model, context, [*facts["policies"], loaded])
        facts["cache_types"] = _cache_types(model, context)
    else:
        facts["loaded"] = facts["memory"] = None
    return facts


def _short(value: Any) -> Any:
    """A metadata value as JSON; of a long array the first values and the length."""
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        values, count = value[:SHOWN].tolist(), len(value)
    elif isinstance(value, list):
        values, count = value[:SHOWN], len(value)
    else:
        return value
    values = [_short(entry) for entry in values]
    return values if count <= SHOWN else {"length": count, "first": values}


def _by_type(tensors: Iterable[tuple[str, int, int]]) -> list[Facts]:
    """(type, weights, bytes) of each tensor, summed by type, the largest first."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for kind, weights, nbytes in tensors:
        for i, value in enumerate((1, weights, nbytes)):
            sums[kind][i] += value
    rows = sorted(sums.items(), key=lambda item: -item[1][2])
    return [
        {"type": kind, "tensors": n, "weights": w, "bytes": b, "bits": 8 * b / max(1, w)}
        for kind, (n, w, b) in rows
    ]


def _estimate(name: str, gguf: GGUFFile, tensors: list[GGUFTensor]) -> Facts:
    """The expected result of a conversion."""
    policy = Policy(name, half_dtype(gguf))
    forms: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0])
    impossible = set()
    for tensor in tensors:
        expected = expected_layout(tensor.type, policy, module=len(tensor.shape) > 1)
        if expected is None:
            impossible.add(tensor.type.name)
            continue
        sums = forms[tensor.type.name, str(expected.layout), expected.fidelity]
        sums[0] += 1
        sums[1] += tensor.elements
        sums[2] += tensor.elements * expected.layout.bits_per_weight / 8
    weights, nbytes = (sum(sums[i] for sums in forms.values()) for i in (1, 2))
    return {
        "policy": name,
        "bytes": round(nbytes),
        "bits": 8 * nbytes / weights if weights else 0.0,
        "impossible": sorted(impossible),
        "forms": [
            {"type": kind, "form": form, "fidelity": fidelity, "tensors": sums[0],
             "bytes": round(sums[2])}
            for (kind, form, fidelity), sums in forms.items()
        ],
    }  # fmt: skip


def _memory(model: Described, context: int | None, policies: list[Facts]) -> Facts:
    """Bytes of the caches by type, and with the weights of each policy."""
    trained = model.facts["context_length"]
    tokens = context or trained
    cache = {name: model.cache_values(tokens) * size for name, size in CACHE_TYPES.items()}
    return {
        "context": tokens,
        "beyond_training": tokens > trained,
        "cache": cache,
        "total": {
            each["policy"]: {name: each["bytes"] + held for name, held in cache.items()}
            for each in policies
        },
    }


def _cache_types(model: Described, context: int | None) -> list[Facts]:
    """Bytes of each cache type, with this machine's default activations."""
    dtype = DTYPES[run_dtype(None, "float16")]
    return cache_facts(model.layers, dtype, context or model.facts["context_length"])


def _directory(path: Path, model: Described | None, context: int | None) -> Facts:
    config = read_config(path)
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    tensors = stored_tensors(files, text_config(config))
    facts: Facts = {
        "format": "model directory",
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
        "architecture": str(config.get("model_type")),
        "metadata": {k: _short(v) for k, v in config.items() if not k.startswith("quantization")},
        "types": _by_type((t.form, t.weights, t.nbytes) for t in tensors),
        "tensors": [_entry(tensor) for tensor in tensors],
        "model": model.facts if model else None,
        "skipped": [],
        "policies": [],
        "conversion": _conversion(path),
    }
    weights: Facts = {"policy": "as stored", "bytes": sum(t.nbytes for t in tensors)}
    facts["memory"] = _memory(model, context, [weights]) if model else None
    facts["cache_types"] = _cache_types(model, context) if model else []
    return facts


def _entry(tensor: StoredTensor) -> Facts:
    shape = list(tensor.shape)
    return {"name": tensor.name, "type": tensor.form, "shape": shape, "bytes": tensor.nbytes}


def _conversion(path: Path) -> Facts | None:
    """Source and fidelity of a converted directory, by its report."""
    file = path / "conversion.json"
    if not file.is_file():
        return None
    report = read_object(file)
    source, tensors = report.get("source"), report.get("tensors")
    counts: dict[str, int] = defaultdict(int)
    for record in tensors if isinstance(tensors, list) else []:
        if isinstance(record, Mapping):
            counts[str(record.get("fidelity"))] += 1
    return {
        "source": source.get("name") if isinstance(source, Mapping) else None,
        "policy": report.get("policy"),
        "fidelity": dict(counts),
    }


@dataclass(frozen=True)
class Described:
    """A model that can be run, by its config alone.

    Attributes:
        facts: hyperparameters; None where they do not apply.
        cache_values: numbers in its caches after so many tokens.
        layers: shape of K/V per token and window of each; empty for mlx-lm's classes.
    """

    facts: Facts
    cache_values: Callable[[int], int]
    layers: tuple[tuple[Shape, int | None], ...] = ()


def described(model: ModelConfig | MLXLMClasses, config: Mapping[str, Any]) -> Described:
    """The model of :func:`mlxrun.loader.definition`."""
    if not isinstance(model, ModelConfig):
        from mlxrun.models.mlx_lm import sketch

        made = sketch(model, config)
        return Described(_mlx_lm_facts(made), made.cache_values)
    layers = tuple((x.attention.cache_shape, x.attention.window) for x in model.layers)
    return Described(_hyperparameters(model), lambda context: cache_values(model, context), layers)


def _mlx_lm_facts(model: Model[Any]) -> Facts:
    summary = model.summary
    return {
        "family": summary.family,
        "runs": f"through {summary.through}",
        "layers": summary.layers,
        "hidden_size": summary.hidden_size or None,
        "heads": summary.heads or None,
        "kv_heads": summary.kv_heads or None,
        "vocabulary": model.vocab_size,
        "context_length": model.context_length,
    }


def _hyperparameters(model: ModelConfig) -> Facts:
    first = model.layers[0]
    windows = [layer.attention.window for layer in model.layers]
    return {
        "family": model.family,
        "runs": None,
        "layers": len(model.layers),
        "hidden_size": model.hidden_size,
        "heads": first.attention.heads,
        "kv_heads": first.attention.kv_heads,
        "head_dim": first.attention.head_dim,
        "feed_forward": first.feed_forward.size,
        "vocabulary": model.vocab_size,
        "context_length": model.context_length,
        "tied_embeddings": model.tied,
        "windows": windows if any(windows) else None,
    }


def cache_values(model: ModelConfig, context: int) -> int:
    """Numbers in the caches after ``context`` tokens."""
    total = 0
    for layer in model.layers:
        attention = layer.attention
        tokens = min(context, attention.window or context)
        shape = attention.cache_shape
        total += shape.heads * (shape.key + shape.value) * tokens
    return total


def plan_facts(
    plan: MemoryPlan, held: WeightStorage, context: int, parallel: int, *, longest: int
) -> Facts:
    """A plan as JSON types; all sizes in bytes.

    Args:
        longest: the model's context length.
    """
    terms = plan.terms(context, parallel)
    return {
        "context": context,
        "parallel": parallel,
        "held": held.how,
        "weights": terms.weights,
        "sequence": terms.sequence,
        "scratch": terms.scratch,
        "reserve": terms.reserve,
        "needed": terms.needed,
        "kept": terms.prefix_bytes,
        "total": terms.total,
        "available": terms.limit or None,
        "fits": terms.fits,
        "largest_context": min(longest, plan.context_for(parallel)) if terms.limit else None,
        "largest_parallel": plan.parallel_for(context) if terms.limit else None,
        "trained_context": longest,
    }


def cache_facts(layers: Layers, dtype: mx.Dtype, context: int) -> list[Facts]:
    """Bytes of each cache type, for keys and values alike; those by channel are for keys only.

    Args:
        layers: shape of K/V per token, and window.
        dtype: of activations and scales.
        context: tokens.
    """
    if not layers:
        return []
    return [_cache_type_facts(name, layers, dtype, context) for name in (*NAMES, *PER_CHANNEL)]


def _cache_type_facts(name: str, layers: Layers, dtype: mx.Dtype, context: int) -> Facts:
    """Of one type; None if the model cannot have it."""
    facts: Facts = {"type": name, "keys": None, "values": None, "bits": None, "context": None}
    of_values = None if name in PER_CHANNEL else name
    if of_values is None and any(window for _, window in layers):
        return facts
    try:
        config = StorageConfig.of_types(name, of_values)
        each = [token_bytes([shape], dtype, config) for shape, _ in layers]
    except ParameterError:
        return facts
    numbers = sum(shape.heads * shape.key for shape, _ in layers)
    held = [min(context, window or context) for _, window in layers]
    facts["keys"] = sum(keys for keys, _ in each)
    facts["bits"] = 8 * facts["keys"] / numbers
    if of_values is not None:
        facts["values"] = sum(values for _, values in each)
        facts["context"] = sum(sum(both) * n for both, n in zip(each, held, strict=True))
    return facts
