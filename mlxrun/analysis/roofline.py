"""Rooflines as JSON types, in bytes, FLOPs, seconds and tokens/s: measured rates and chips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlxrun.analysis.chips import Chip
from mlxrun.analysis.costs import Cost, ModelCost, Roof, decode_cost, limit, prefill_cost
from mlxrun.bench.runner import OURS, Result, Results
from mlxrun.bench.workloads import Decode, Prefill, Workload

if TYPE_CHECKING:
    from mlxrun.analysis.device import Device

Facts = dict[str, Any]
# Runtimes that are measured with weights in the form of mlxrun's.
SAME_WEIGHTS = (OURS, "mlx-lm")
# Tokens of a pass from which bandwidth alone says nothing: at half a byte a weight each token is
# four FLOPs a byte, and chips whose figures are known do 26 to 420 FLOPs in the time of a byte.
MANY_TOKENS = 64


def limit_facts(cost: Cost, roof: Roof) -> Facts | None:
    """The limit; None where only bandwidth is known and compute would bind."""
    most = limit(cost, roof)
    if not most.whole and cost.tokens >= MANY_TOKENS * cost.passes:
        return None
    return asdict(most)


def cost_facts(cost: Cost) -> Facts:
    return {
        "passes": cost.passes,
        "tokens": cost.tokens,
        "bytes": cost.nbytes,
        "weights_read": cost.weights,
        "cache_read": cost.cache_read,
        "cache_written": cost.cache_written,
        "operations": cost.operations,
        "intensity": cost.intensity,
    }


def weight_facts(model: ModelCost) -> Facts:
    """Bytes of weights by how much of them a pass reads."""
    weights = model.weights
    return {
        "total": weights.total,
        "always": weights.always,
        "head": weights.head,
        "row": weights.row,
        "experts": sum(each.nbytes for each in weights.experts),
    }


def chip_limits(costs: Mapping[str, Cost], weights: float, chips: Iterable[Chip]) -> list[Facts]:
    """Limits of chips.

    Args:
        costs: by name of the test.
        weights: bytes of the model in the form that the chip would hold it in.
        chips: to be compared.
    """
    return [
        {
            "chip": chip.name,
            "bandwidth": chip.roof.bandwidth,
            "throughput": chip.roof.throughput,
            "memory": chip.memory * 10**9,
            "holds_weights": weights <= chip.memory * 10**9,
            "source": chip.source,
            "throughput_source": chip.tflops_source or None,
            "limits": [
                {"test": name, "limit": limit_facts(cost, chip.roof)}
                for name, cost in costs.items()
            ],
        }
        for chip in chips
    ]


def workload_costs(workloads: Iterable[Workload], model: ModelCost, chunk: int) -> dict[str, Cost]:
    """Costs of workloads by their names, without mixed requests, whose passes are not known.

    Args:
        chunk: tokens of a prefill pass at most.
    """
    costs = {}
    for workload in workloads:
        match workload:
            case Prefill(prompt, context):
                costs[workload.name] = prefill_cost(model, prompt, context, chunk=chunk)
            case Decode(predict, context, parallel):
                costs[workload.name] = decode_cost(model, context, predict, parallel)
    return costs


def roofline(
    results: Results,
    model: ModelCost,
    device: Device,
    dtype: str,
    chunk: int,
    runtimes: Sequence[str] = SAME_WEIGHTS,
) -> Facts:
    """Measured rates as fractions of this device's limits.

    Args:
        model: as it was measured.
        dtype: of activations.
        chunk: tokens of a prefill pass at most.
        runtimes: those whose passes cost the same.
    """
    shown = [result for result in results.items if result.runtime in runtimes]
    costs = workload_costs((result.workload for result in shown), model, chunk)
    roof = device.roof(dtype)
    return {
        "device": {**asdict(device), "roof": asdict(roof)},
        "weights": weight_facts(model),
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
        **cost_facts(cost),
        "limit": asdict(most),
        "fraction": rate / most.rate,
        "in_cache": cost.weights / cost.passes < cached,
    }
