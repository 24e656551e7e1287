"""Measured rates beside the limits of this device.

Puts together what was measured, what the device can do and what the work is; as JSON types, in
bytes, FLOPs, seconds and tokens a second. Measures nothing itself and knows no terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlxrun.bench.results import OURS, Result, Results
from mlxrun.bench.workload import Decode, Prefill, Workload
from mlxrun.planning.limits import weight_facts, work_facts
from mlxrun.planning.roof import Roof, limit
from mlxrun.planning.work import Counts, Work, decode, prefill

if TYPE_CHECKING:
    from mlxrun.bench.device import Device

Facts = dict[str, Any]
# Runtimes that are measured with weights in the form in which we hold them.
SAME_WEIGHTS = (OURS, "mlx-lm")


def works(workloads: Iterable[Workload], counts: Counts, piece: int) -> dict[str, Work]:
    """What workloads must do at least, by their names.

    Those of requests that are mixed are left out: it depends on how they are.

    Args:
        piece: the most tokens of a prompt in one pass.
    """
    found = {}
    for workload in workloads:
        match workload:
            case Prefill(prompt, context):
                found[workload.name] = prefill(counts, prompt, context, piece=piece)
            case Decode(predict, context, parallel):
                found[workload.name] = decode(counts, context, predict, parallel)
    return found


def roofline(
    results: Results,
    counts: Counts,
    device: Device,
    dtype: str,
    piece: int,
    runtimes: Sequence[str] = SAME_WEIGHTS,
) -> Facts:
    """Every rate as a fraction of what this device could do at most.

    Args:
        counts: of the model as it is held.
        dtype: of activations.
        piece: the most tokens of a prompt in one pass.
        runtimes: whose rates, which did that very work.
    """
    shown = [result for result in results.items if result.runtime in runtimes]
    done = works((result.workload for result in shown), counts, piece)
    roof = device.roof(dtype)
    return {
        "device": {**asdict(device), "roof": asdict(roof)},
        "weights": weight_facts(counts),
        "tests": [
            _test(result, done[result.workload.name], roof, device.cached)
            for result in shown
            if result.workload.name in done
        ],
        "unknown": list(counts.unknown),
    }


def _test(result: Result, work: Work, roof: Roof, cached: int) -> Facts:
    """One measured rate beside its limit."""
    most, rate = limit(work, roof), result.rate.median
    return {
        "test": result.workload.name,
        "runtime": result.runtime,
        "tokens_per_second": rate,
        **work_facts(work),
        "limit": asdict(most),
        "fraction": rate / most.rate,
        "in_cache": work.weights / work.passes < cached,
    }
