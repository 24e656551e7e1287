"""Rooflines as JSON types, in bytes, FLOPs, seconds and tokens/s."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxrun.analysis.chips import Chip
from mlxrun.analysis.costs import Cost, ModelCost, Roof, decode_cost, limit, prefill_cost
from mlxrun.analysis.device import Device
from mlxrun.analysis.model_cost import model_cost
from mlxrun.bench.runner import OURS, Result, Results
from mlxrun.bench.workloads import Decode, Prefill, Workload
from mlxrun.config import CacheConfig
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.loader import Checkpoint, open_model
from mlxrun.model import WeightStorage
from mlxrun.models.transformer import Transformer

if TYPE_CHECKING:
    from mlxrun.llm import LLM

Facts = dict[str, Any]
# Runtimes that are measured with weights in the form of mlxrun's.
SAME_WEIGHTS = (OURS, "mlx-lm")
# GPUs hold weights in half precision; packed ones stay packed.
CHIP_DTYPE = "float16"
# Tokens of a pass from which bandwidth alone says nothing: at half a byte a weight each token is
# four FLOPs a byte, and chips whose figures are known do 26 to 420 FLOPs in the time of a byte.
MANY_TOKENS = 64


def bench_facts(
    llm: LLM,
    path: Path,
    results: Results,
    device: Device,
    policy: str | None,
    cache: CacheConfig,
    chips: Iterable[Chip],
) -> Facts:
    """Measured rates next to the limits of this device, and the limits of chips.

    Args:
        llm: the model that was measured, in its form.
        path: its source.
        policy: it was loaded with.
    """
    model, dtype = llm.model, str(llm.model.dtype).removeprefix("mlx.core.")
    modules = model.module_bytes if isinstance(model, Transformer) else {}
    storage = WeightStorage(model.nbytes, dtype, False, "as loaded", modules)
    # mlx-lm's caches are plain.
    runtimes = SAME_WEIGHTS if cache == CacheConfig() else (OURS,)
    facts = roofline(results, model_cost(llm.config, storage, cache), device, dtype, runtimes)
    source = open_model(path)
    storage = source.storage(dtype=CHIP_DTYPE, policy=policy)
    workloads = (result.workload for result in results.items)
    costs = workload_costs(workloads, model_cost(source.config, storage, cache))
    return {**facts, "elsewhere": _elsewhere(costs, storage, chips)}


def model_facts(
    source: Checkpoint,
    *,
    context: int,
    parallel: int,
    cache: CacheConfig,
    chips: Sequence[Chip],
    device: Device | None = None,
    policy: str | None = None,
) -> Facts:
    """The least cost of a token in each sequence and of a prompt, and limits of chips.

    Args:
        source: headers.
        context: tokens of each sequence.
        parallel: sequences at once.
        device: this one, where it was measured.
        policy: of a GGUF's conversion; see :func:`mlxrun.load`.
    """
    storage = source.storage(policy=policy)
    model = model_cost(source.config, storage, cache)
    costs = _token_costs(model, context, parallel)
    facts: Facts = {
        "context": context,
        "parallel": parallel,
        "held": storage.how,
        "weights": _weight_facts(model),
        "works": {name: _cost_facts(cost) for name, cost in costs.items()},
        "unknown": list(model.unknown),
        "here": None,
        "elsewhere": None,
    }
    if device:
        roof = device.roof(storage.dtype)
        facts["here"] = {**asdict(roof), "limits": _limits(costs, roof)}
    if chips:
        storage = source.storage(dtype=CHIP_DTYPE, policy=policy)
        costs = _token_costs(model_cost(source.config, storage, cache), context, parallel)
        facts["elsewhere"] = _elsewhere(costs, storage, chips)
    return facts


def _token_costs(model: ModelCost, context: int, parallel: int) -> dict[str, Cost]:
    return {
        "decode": decode_cost(model, context - 1, rows=parallel),
        "prefill": prefill_cost(model, context, chunk=PREFILL_CHUNK),
    }


def workload_costs(workloads: Iterable[Workload], model: ModelCost) -> dict[str, Cost]:
    """Costs of workloads by their names, without mixed requests, whose passes are not known."""
    costs = {}
    for workload in workloads:
        match workload:
            case Prefill(prompt, context):
                costs[workload.name] = prefill_cost(model, prompt, context, chunk=PREFILL_CHUNK)
            case Decode(predict, context, parallel):
                costs[workload.name] = decode_cost(model, context, predict, parallel)
    return costs


def roofline(
    results: Results,
    model: ModelCost,
    device: Device,
    dtype: str,
    runtimes: Sequence[str] = SAME_WEIGHTS,
) -> Facts:
    """Measured rates as fractions of this device's limits.

    Args:
        model: as it was measured.
        dtype: of activations.
        runtimes: those whose passes cost the same.
    """
    shown = [result for result in results.items if result.runtime in runtimes]
    costs = workload_costs((result.workload for result in shown), model)
    roof = device.roof(dtype)
    return {
        "device": {**asdict(device), "roof": asdict(roof)},
        "weights": _weight_facts(model),
        "tests": [
            _test(result, costs[result.workload.name], roof, device.cached)
            for result in shown
            if result.workload.name in costs
        ],
        "unknown": list(model.unknown),
    }


def _test(result: Result, cost: Cost, roof: Roof, cached: int) -> Facts:
    most, rate = limit(cost, roof), result.rate.median
    return {
        "test": result.workload.name,
        "runtime": result.runtime,
        "tokens_per_second": rate,
        **_cost_facts(cost),
        "limit": asdict(most),
        "fraction": rate / most.rate,
        "in_cache": cost.weights_read / cost.passes < cached,
    }


def _cost_facts(cost: Cost) -> Facts:
    return {**asdict(cost), "bytes": cost.nbytes, "intensity": cost.intensity}


def _weight_facts(model: ModelCost) -> Facts:
    """Bytes of weights by how much of them a pass reads."""
    weights = model.weights
    return {
        "total": weights.total,
        "always": weights.always,
        "head": weights.head,
        "row": weights.row,
        "experts": sum(each.nbytes for each in weights.experts),
    }


def _limits(costs: Mapping[str, Cost], roof: Roof) -> list[Facts]:
    """Limits by test; None where only bandwidth is known and compute would bind."""
    facts = []
    for name, cost in costs.items():
        most = limit(cost, roof)
        known = most.whole or cost.tokens < MANY_TOKENS * cost.passes
        facts.append({"test": name, "limit": asdict(most) if known else None})
    return facts


def _elsewhere(costs: Mapping[str, Cost], storage: WeightStorage, chips: Iterable[Chip]) -> Facts:
    limits = chip_limits(costs, storage.nbytes, chips)
    return {"held": storage.how, "weights": storage.nbytes, "chips": limits}


def chip_limits(costs: Mapping[str, Cost], weights: float, chips: Iterable[Chip]) -> list[Facts]:
    """Limits of chips.

    Args:
        costs: by name of the test.
        weights: bytes of the model in the form that the chip would hold it in.
    """
    return [
        {
            "chip": chip.name,
            **asdict(chip.roof),
            "memory": chip.memory * 10**9,
            "holds_weights": weights <= chip.memory * 10**9,
            "source": chip.source,
            "throughput_source": chip.tflops_source or None,
            "limits": _limits(costs, chip.roof),
        }
        for chip in chips
    ]
