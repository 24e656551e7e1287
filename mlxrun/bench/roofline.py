"""Measured rates beside their limits: on this device, and what the limits of other chips are.

Puts together what was measured, what the device can do and what the work is; all as JSON types, in
bytes, FLOPs, seconds and tokens a second. Measures nothing itself and knows no terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mlxrun.bench.device import Device
from mlxrun.bench.results import OURS, Results
from mlxrun.bench.workload import Decode, Prefill, Workload
from mlxrun.planning.chips import Chip
from mlxrun.planning.roof import limit
from mlxrun.planning.work import Counts, Work, decode, prefill

Facts = dict[str, Any]


def work_of(workload: Workload, counts: Counts, piece: int) -> Work | None:
    """What a workload must do at least; None where that depends on how requests are mixed.

    Args:
        piece: the most tokens of a prompt in one pass.
    """
    match workload:
        case Prefill():
            return prefill(counts, workload.prompt, workload.context, piece=piece)
        case Decode():
            return decode(counts, workload.context, workload.predict, workload.parallel)
    return None


def roofline(results: Results, counts: Counts, device: Device, dtype: str, piece: int) -> Facts:
    """Every rate of ours as a fraction of what this device could do at most.

    Args:
        dtype: of activations.
        piece: the most tokens of a prompt in one pass.
    """
    roof = device.roof(dtype)
    tests = []
    for result in results.items:
        work = work_of(result.workload, counts, piece) if result.runtime == OURS else None
        if work is None:
            continue
        most, rate = limit(work, roof), result.rate.median
        tests.append(
            {
                "test": result.workload.name,
                "tokens_per_second": rate,
                **_work(work),
                "limit": asdict(most),
                "fraction": rate / most.rate,
                "in_cache": work.weights / work.passes < device.cached,
            }
        )
    return {
        "device": {**asdict(device), "roof": asdict(roof)},
        "weights": _weights(counts),
        "tests": tests,
        "unknown": list(counts.unknown),
    }


def limits(
    workloads: Iterable[Workload], counts: Counts, chips: Iterable[Chip], piece: int
) -> list[Facts]:
    """What chips could do at most, by their makers' figures.

    Args:
        counts: of the model as it would be held there.
    """
    works = {
        workload: work
        for workload in dict.fromkeys(workloads)
        if (work := work_of(workload, counts, piece)) is not None
    }
    return [
        {
            "chip": chip.name,
            "bandwidth": chip.roof.bandwidth,
            "throughput": chip.roof.throughput,
            "memory": chip.memory * 10**9,
            "holds_weights": counts.weights.total <= chip.memory * 10**9,
            "source": chip.source,
            "throughput_source": chip.tflops_source or None,
            "limits": [
                {"test": workload.name, **asdict(limit(work, chip.roof))}
                for workload, work in works.items()
            ],
        }
        for chip in chips
    ]


def _weights(counts: Counts) -> Facts:
    weights = counts.weights
    return {
        "total": weights.total,
        "always": weights.always,
        "head": weights.head,
        "row": weights.row,
        "experts": sum(routed.nbytes for routed in weights.routed),
    }


def _work(work: Work) -> Facts:
    return {
        "passes": work.passes,
        "tokens": work.tokens,
        "bytes": work.nbytes,
        "weights_read": work.weights,
        "cache_read": work.cache_read,
        "cache_written": work.cache_written,
        "operations": work.operations,
        "intensity": work.intensity,
    }
