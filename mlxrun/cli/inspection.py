"""Facts of a model from its headers, as JSON types: contents, conversions, memory, costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.architectures.mapping import NameMap
from converters.errors import MlxrunError
from converters.gguf.reader import GGUFFile, GGUFTensor, read_gguf
from converters.gguf.source import half_dtype, skipped
from converters.huggingface.names import text_config
from converters.huggingface.reader import read_config, read_object, stored_tensors
from converters.quantize.encode import expected_layout
from converters.quantize.policy import POLICIES, Policy
from mlxrun.analysis.chips import chips_named
from mlxrun.analysis.roofline import model_facts
from mlxrun.cli.roofline import HERE, measured_device
from mlxrun.config import DEFAULT_CACHE, CacheConfig, StorageConfig
from mlxrun.engine.engine import prefill_budget
from mlxrun.errors import ParameterError
from mlxrun.kv_cache.factory import token_bytes
from mlxrun.kv_cache.options import NAMES, PER_CHANNEL, Shape
from mlxrun.llm import PREFIX_BYTES, PREFIX_SHARE
from mlxrun.loader import DTYPES, Checkpoint, GGUFCheckpoint, open_model, run_dtype
from mlxrun.memory.plan import MemoryPlan, plan_source
from mlxrun.model import WeightStorage
from mlxrun.models.config import ModelConfig
from mlxrun.sampling_params import read_sampling_defaults
from mlxrun.tokenizer.parts import has_chat_template
from mlxrun.tokenizer.tokenizer import load_tokenizer

Facts = dict[str, Any]
Layers = Sequence[tuple[Shape, int | None]]

# Entries of a long array that are shown.
SHOWN = 6


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
    """
    file = path if path.is_dir() else read_gguf(path)
    source, model, problem = _opened(file)
    defaults = read_sampling_defaults(file)
    if isinstance(file, Path):
        facts = _directory(file)
    else:
        facts = _gguf(file, source.names if isinstance(source, GGUFCheckpoint) else None, policy)
    facts |= {
        "problem": problem,
        "sampling": {
            "source": defaults.source,
            "values": defaults.values,
            "problems": list(defaults.problems),
        },
        "chat_template": _has_chat_template(file),
        "tokenizer_problem": _tokenizer_problem(path) if path.is_dir() else None,
        "model": model,
        **dict.fromkeys(("context", "plan", "work")),
        "cache_types": [],
    }
    if source is None or model is None:
        return facts
    longest = model["context_length"]
    tokens = facts["context"] = context or longest
    if isinstance(source.definition, ModelConfig):
        layers = [(x.attention.cache_shape, x.attention.window) for x in source.definition.layers]
        dtype, names = DTYPES[run_dtype(None, "float16")], (*NAMES, *PER_CHANNEL)
        facts["cache_types"] = [_cache_type(name, layers, dtype, tokens) for name in names]
    if facts["tensors"]:
        storage = source.storage(policy=policy)
        plan = plan_source(source, storage, cache=cache, prefill_tokens=prefill_budget("batch"))
        plan = replace(plan, prefix_bytes=min(PREFIX_BYTES, int(PREFIX_SHARE * plan.limit)))
        facts["plan"] = _plan(plan, storage, tokens, parallel, longest=longest)
        facts["work"] = model_facts(
            source,
            context=tokens,
            parallel=parallel,
            cache=cache,
            chips=chips_named(name for name in chips if name != HERE),
            device=measured_device() if HERE in chips else None,
            policy=policy,
        )
    return facts


def _opened(file: Path | GGUFFile) -> tuple[Checkpoint | None, Facts | None, str | None]:
    """The source and its hyperparameters, or why it cannot be run."""
    if isinstance(file, GGUFFile) and not file.tensors:
        return None, None, "a vocabulary without weights: it can tokenize, not generate"
    try:
        source = open_model(file)
        return source, _model_facts(source), None
    except MlxrunError as error:
        return None, None, str(error)


def _has_chat_template(source: Path | GGUFFile) -> bool | None:
    """None if the tokenizer's files are damaged."""
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


def _gguf(gguf: GGUFFile, names: NameMap | None, policy: str | None) -> Facts:
    tensors = [mapped.source for mapped in names.mapped] if names else list(gguf.tensors)
    policies = ([policy] if policy else POLICIES) if tensors else ()
    return {
        "format": f"GGUF v{gguf.version}",
        "files": [{"name": p.name, "bytes": p.stat().st_size} for p in gguf.paths],
        "architecture": gguf.architecture,
        "metadata": {key: _short(value) for key, value in gguf.metadata.items()},
        **_tensors([(t.name, t.type.name, t.shape, t.elements, t.nbytes) for t in gguf.tensors]),
        "skipped": skipped(names) if names else [],
        "policies": [_estimate(name, gguf, tensors) for name in policies],
    }


def _directory(path: Path) -> Facts:
    config = read_config(path)
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    stored = stored_tensors(files, text_config(config))
    return {
        "format": "model directory",
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
        "architecture": str(config.get("model_type")),
        "metadata": {k: _short(v) for k, v in config.items() if not k.startswith("quantization")},
        **_tensors([(t.name, t.form, t.shape, t.weights, t.nbytes) for t in stored]),
        "skipped": [],
        "policies": [],
        "conversion": _conversion(path),
    }


def _tensors(tensors: Sequence[tuple[str, str, Sequence[int], int, int]]) -> Facts:
    """Tensors by name, type, shape, number of weights and bytes; and by type, the largest first."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for _, kind, _, weights, nbytes in tensors:
        sums[kind] = [old + new for old, new in zip(sums[kind], (1, weights, nbytes), strict=True)]
    return {
        "types": [
            {"type": kind, "tensors": n, "weights": w, "bytes": b, "bits": 8 * b / max(1, w)}
            for kind, (n, w, b) in sorted(sums.items(), key=lambda item: -item[1][2])
        ],
        "tensors": [
            {"name": name, "type": kind, "shape": list(shape), "bytes": nbytes}
            for name, kind, shape, _, nbytes in tensors
        ],
    }


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
    counts = dict.fromkeys(("exact", "rounded", "requantized"), 0)
    for (_, _, fidelity), sums in forms.items():
        counts[fidelity] += int(sums[0])
    return {
        "policy": name,
        "bytes": round(nbytes),
        "bits": 8 * nbytes / weights if weights else 0.0,
        **counts,
        "impossible": sorted(impossible),
        "forms": [
            {"type": kind, "form": form, "fidelity": fidelity, "tensors": sums[0],
             "bytes": round(sums[2])}
            for (kind, form, fidelity), sums in forms.items()
        ],
    }  # fmt: skip


def _conversion(path: Path) -> Facts | None:
    file = path / "conversion.json"
    if not file.is_file():
        return None
    report = read_object(file)
    source, tensors = report.get("source"), report.get("tensors")
    records = [r for r in tensors if isinstance(r, Mapping)] if isinstance(tensors, list) else []
    return {
        "source": source.get("name") if isinstance(source, Mapping) else None,
        "policy": report.get("policy"),
        "fidelity": Counter(str(record.get("fidelity")) for record in records),
    }


def _model_facts(source: Checkpoint) -> Facts:
    """Hyperparameters; None where they do not apply."""
    model = source.definition
    if not isinstance(model, ModelConfig):
        from mlxrun.models.mlx_lm import sketch

        made = sketch(model, source.config)
        return {
            "family": made.summary.family,
            "runs": f"through {made.summary.through}",
            "layers": made.summary.layers,
            "hidden_size": made.summary.hidden_size or None,
            "heads": made.summary.heads or None,
            "kv_heads": made.summary.kv_heads or None,
            "vocabulary": made.vocab_size,
            "context_length": made.context_length,
        }
    first = model.layers[0]
    windows = [layer.attention.window for layer in model.layers]
    return {
        "family": model.family,
        "runs": None,
        "layers": len(windows),
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


def _plan(
    plan: MemoryPlan, storage: WeightStorage, context: int, parallel: int, *, longest: int
) -> Facts:
    """Terms in bytes; ``longest`` is the model's context length."""
    terms = plan.terms(context, parallel)
    return {
        "context": context,
        "parallel": parallel,
        "held": storage.how,
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


def _cache_type(name: str, layers: Layers, dtype: mx.Dtype, context: int) -> Facts:
    """Bytes of one type for keys and for values; None if the model cannot have it.

    Args:
        dtype: of activations and scales.
    """
    facts: Facts = {"type": name, "keys": None, "values": None, "bits": None, "context": None}
    of_values = None if name in PER_CHANNEL else name
    if of_values is None and any(window for _, window in layers):
        return facts
    try:
        config = StorageConfig.of_types(name, of_values)
        each = [token_bytes([shape], dtype, config) for shape, _ in layers]
    except ParameterError:
        return facts
    facts["keys"] = sum(keys for keys, _ in each)
    facts["bits"] = 8 * facts["keys"] / sum(shape.heads * shape.key for shape, _ in layers)
    if of_values is not None:
        slots = [min(context, window or context) for _, window in layers]
        facts["values"] = sum(values for _, values in each)
        facts["context"] = sum(sum(both) * n for both, n in zip(each, slots, strict=True))
    return facts
