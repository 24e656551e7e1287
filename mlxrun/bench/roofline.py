"""Measured rates beside the limits of this device.

Puts together what was measured, what the device can do and what the work is; as JSON types, in
bytes, FLOPs, seconds and tokens a second. Measures nothing itself and knows no terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlxrun.bench.results import OURS, Results
from mlxrun.bench.workload import Decode, Prefill, Workload
from mlxrun.planning.limits import weight_facts, work_facts
from mlxrun.planning.roof import limit
from mlxrun.planning.work import Counts, Work, decode, prefill

if TYPE_CHECKING:
    from mlxrun.bench.device import Device

Facts = dict[str, Any]


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


def roofline(results: Results, counts: Counts, device: Device, dtype: str, piece: int) -> Facts:
    """Every rate of ours as a fraction of what this device could do at most.

    Args:
        counts: of the model as it is held.
        dtype: of activations.
        piece: the most tokens of a prompt in one pass.
    """
    roof = device.roof(dtype)
    ours = {r.workload.name: r for r in results.items if r.runtime == OURS}
    tests = []
    for name, work in works((r.workload for r in ours.values()), counts, piece).items():
        most, rate = limit(work, roof), ours[name].rate.median
        tests.append(
            {
                "test": name,
                "tokens_per_second": rate,
                **work_facts(work),
                "limit": asdict(most),
                "fraction": rate / most.rate,
                "in_cache": work.weights / work.passes < device.cached,
            }
        )
    return {
        "device": {**asdict(device), "roof": asdict(roof)},
        "weights": weight_facts(counts),
        "tests": tests,
        "unknown": list(counts.unknown),
    }
