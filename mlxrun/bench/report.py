"""Results as JSON types and as CSV: times in seconds, sizes in bytes, rates in tokens/s."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import asdict
from typing import Any

from mlxrun.bench.runner import OURS, Result, Results
from mlxrun.bench.workloads import Decode, FirstToken, Prefill

Facts = dict[str, Any]

# The shape of another runtime's curve, to compare that of --parallel with.
REFERENCE: Facts = {
    "what": "llama.cpp, Qwen2-1.5B Q4_K_M on an M1 Pro (200 GB/s)",
    "tokens_per_second": {1: 85.6, 2: 96.7, 4: 157.6, 8: 181.6},
}


def reference_speedup(parallel: int) -> float | None:
    """Speed-up of the reference, where it was measured at so many sequences."""
    rates = REFERENCE["tokens_per_second"]
    return rates[parallel] / rates[1] if parallel in rates else None


def facts(results: Results, about: Facts) -> Facts:
    """Results behind ``about``: model, machine, its load, runtimes; ready for ``json.dumps``."""
    return {
        **about,
        "results": [_result(results, result) for result in results.items],
        "reference": REFERENCE,
    }


def _result(results: Results, result: Result) -> Facts:
    workload, rate, seconds = result.workload, result.rate, result.seconds.median
    others = dict.fromkeys(r.runtime for r in results.items if OURS == result.runtime != r.runtime)
    ratios = {name: results.ratio(result, name) for name in others}
    found: Facts = {
        "test": workload.name,
        "runtime": result.runtime,
        "workload": asdict(workload),
        "tokens": workload.tokens,
        "parallel": workload.parallel,
        "seconds": [run.seconds for run in result.runs],
        "tokens_per_second": asdict(rate),
        "kv_bytes": max(run.kv_bytes for run in result.runs) or None,
        "peak_memory": max(run.peak for run in result.runs) or None,
        "average_memory": int(statistics.median(run.average for run in result.runs)) or None,
        "faster_than": {name: ratio for name, ratio in ratios.items() if ratio is not None},
    }
    if isinstance(workload, Prefill | FirstToken):
        found["time_to_first_token"] = seconds
    if isinstance(workload, FirstToken):
        found["times_idle"] = results.delay(result)
    if isinstance(workload, Decode):
        speedup = results.speedup(result)
        found["time_per_token"] = seconds / workload.predict
        found["tokens_per_second_each"] = rate.median / workload.parallel
        found["speedup"] = speedup
        found["efficiency"] = speedup / workload.parallel if speedup else None
    return found


def flat(found: Facts) -> str:
    """The results of :func:`facts` as CSV, a row for each with its machine and versions."""
    machine, use = found["machine"], found["other_use"]
    loading = {runtime["name"]: runtime["load_seconds"] for runtime in found["runtimes"]}
    same = {
        "date": machine["date"],
        **machine["versions"],
        **{name: machine.get(name) for name in ("device", "processor", "cores", "system", "blas")},
        "model": found["model"],
        "load_before": use.get("load_before"),
        "load_highest": use["load_highest"],
        "others_used": use["others_used"],
        "interrupted": found.get("interrupted"),
    }
    others = [name for name in loading if name != OURS]
    # Ratios to mlxrun's serial runtime, too, which loads nothing of its own.
    others += [name for result in found["results"] for name in result["faster_than"]]
    ratios = [f"faster_than_{name}" for name in dict.fromkeys(others)]
    columns = (*same, *_COLUMNS, *ratios)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for result in found["results"]:
        rate = result["tokens_per_second"]
        row = {name: result.get(name) for name in _COLUMNS} | same
        row |= {f"tokens_per_second_{name}": rate[name] for name in rate}
        row |= {name: result["workload"].get(name) for name in _WORKLOAD}
        row |= {f"faster_than_{name}": ratio for name, ratio in result["faster_than"].items()}
        row["runs"] = len(result["seconds"])
        row["load_seconds"] = loading.get(result["runtime"])
        writer.writerow(row)
    return out.getvalue()


_RATES = ("median", "low", "high", "mean", "deviation")
_WORKLOAD = ("prompt", "predict", "context")
_COLUMNS = (
    "test",
    "runtime",
    *_WORKLOAD,
    "parallel",
    "tokens",
    "load_seconds",
    "runs",
    *(f"tokens_per_second_{name}" for name in _RATES),
    "time_to_first_token",
    "times_idle",
    "time_per_token",
    "tokens_per_second_each",
    "speedup",
    "efficiency",
    "kv_bytes",
    "peak_memory",
    "average_memory",
)
