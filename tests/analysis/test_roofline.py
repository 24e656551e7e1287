"""Rates as fractions of the limits of a made-up device."""

from __future__ import annotations

import json

import pytest

from mlxrun.analysis.chips import Chip
from mlxrun.analysis.costs import AttentionCost, ModelCost, WeightCost, decode_cost, prefill_cost
from mlxrun.analysis.device import Device, Rate
from mlxrun.analysis.roofline import MANY_TOKENS, chip_limits, roofline, workload_costs
from mlxrun.bench.runner import Results, Run
from mlxrun.bench.workloads import Decode, Prefill, ragged

COUNTS = ModelCost(
    WeightCost(1000.0, 300.0, 10.0, 50.0), (AttentionCost(token=4, pair=7),), 400, 90
)
DEVICE = Device(10**6, 500, (Rate("copy", 1e6, 1e6),), (Rate("float32", 1e6, 1e6),))
TESTS = [Prefill(64), Decode(8), Decode(8, 16, 4)]


def measured(seconds: float = 2.0) -> Results:
    results = Results()
    for workload in [*TESTS, ragged(100)]:
        results.add(workload, "mlxrun", Run(seconds))
        results.add(workload, "mlx-lm", Run(seconds))
        results.add(workload, "llama-bench", Run(seconds))  # other weights
    return results


def test_every_rate_has_its_limit() -> None:
    found = roofline(measured(), COUNTS, DEVICE, "float32")
    ours = [test for test in found["tests"] if test["runtime"] == "mlxrun"]
    theirs = [test for test in found["tests"] if test["runtime"] == "mlx-lm"]
    assert [test["test"] for test in ours] == [workload.name for workload in TESTS]
    assert [{**test, "runtime": "mlxrun"} for test in theirs] == ours
    prefill, decode, together = ours
    assert prefill["tokens_per_second"] == 32
    assert prefill["limit"]["binds"] == "compute"
    assert (
        prefill["limit"]["seconds"] == (prefill_cost(COUNTS, 64, chunk=512).operations or 0) / 1e6
    )
    assert decode["limit"]["binds"] == "bandwidth"
    assert decode["limit"]["seconds"] == decode_cost(COUNTS, 0, 8).nbytes / 1e6
    assert together["operations"] == decode_cost(COUNTS, 16, 8, 4).operations
    for test in found["tests"]:
        assert test["fraction"] == pytest.approx(test["limit"]["seconds"] / 2)
        assert not test["in_cache"]
    assert json.loads(json.dumps(found))["device"]["roof"]["bandwidth"] == 1e6


def test_costs_by_name() -> None:
    assert workload_costs([*TESTS, ragged(100)], COUNTS) == {
        "pp64": prefill_cost(COUNTS, 64, chunk=512),
        "tg8": decode_cost(COUNTS, 0, 8),
        "tg8 x4 @ d16": decode_cost(COUNTS, 16, 8, 4),
    }


def test_chips_without_a_throughput() -> None:
    silent = Chip("Silent", 100, 1, "https://example.org")
    known = Chip("Known", 100, 1, "https://example.org", 1.0, "https://example.org")
    tasks = {
        "one": decode_cost(COUNTS, 5),
        "some": decode_cost(COUNTS, 5, rows=MANY_TOKENS - 1),
        "many": decode_cost(COUNTS, 5, rows=MANY_TOKENS),
        "prompt": prefill_cost(COUNTS, 500, chunk=512),
    }
    of_silent, of_known = chip_limits(tasks, 1e9 + 1, [silent, known])
    limits = {each["test"]: each["limit"] for each in of_silent["limits"]}
    assert limits["many"] is None
    assert limits["prompt"] is None
    for name in ("one", "some"):
        assert not limits[name]["whole"]
        assert limits[name]["seconds"] == tasks[name].nbytes / 100e9
    assert all(each["limit"]["whole"] for each in of_known["limits"])
    assert not of_known["holds_weights"]
    assert of_silent["throughput"] is None
