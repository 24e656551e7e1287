"""What follows from measurements: arithmetic over made-up ones."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.bench.report import facts, flat, reference_speedup
from mlxrun.bench.runner import Result, Results, Run, Spread
from mlxrun.bench.workloads import Decode, FirstToken, Prefill, Ragged

seconds = st.lists(st.floats(1e-4, 100), min_size=1, max_size=9)


def results(**times: list[float]) -> Results:
    """One sequence and four of 10 tokens: ``mlxrun=[...]``, ``mlxrun4``, ``baseline``."""
    made = Results()
    for name, values in times.items():
        workload = Decode(10, 0, 4 if name.endswith("4") else 1)
        for value in values:
            made.add(workload, name.removesuffix("4"), Run(value, 100, 300, 200))
    return made


@given(seconds)
def test_rates_are_tokens_over_seconds(times):
    result = Result(Decode(10, 0, 4), "mlxrun", [Run(value) for value in times])
    assert result.rates == pytest.approx([40 / value for value in times])
    rate = result.rate
    assert rate.low <= rate.median <= rate.high
    assert rate.low <= rate.mean * (1 + 1e-9)
    (found,) = facts(Results([result]), {})["results"]
    assert found["time_per_token"] == pytest.approx(result.seconds.median / 10)


def test_a_spread():
    assert Spread.of([4.0]) == Spread(4, 4, 4, 4, 0)
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(2, 1, 6, 3, pytest.approx(7**0.5))


def test_speedup_is_over_one_sequence_of_the_same_runtime():
    made = results(mlxrun=[1.0, 1.0, 4.0], mlxrun4=[2.0], baseline=[8.0])
    alone, together, baseline = made.items
    assert made.speedup(alone) == 1
    assert made.speedup(together) == pytest.approx(2)  # 40 tokens in 2 s against 10 in 1 s
    assert made.speedup(baseline) == 1
    made.add(Prefill(10), "mlxrun", Run(1.0))
    assert made.speedup(made.items[-1]) is None
    assert results(mlxrun4=[1.0]).speedup(results(mlxrun4=[1.0]).items[0]) is None


def test_ratios_are_taken_between_runs_that_followed_one_another():
    # The machine slows down tenfold midway: a ratio of medians would be off, each pair is not.
    made = results(mlxrun=[1, 1, 10, 10, 10], baseline=[2, 2, 2, 20, 20])
    assert made.ratio(made.items[0], "baseline") == pytest.approx(2)
    assert made.ratio(made.items[0], "other") is None


def test_a_run_that_an_interrupt_left_without_its_counterpart():
    made = results(mlxrun=[1, 1], baseline=[3])
    assert made.ratio(made.items[0], "baseline") == pytest.approx(3)


def test_how_long_a_short_request_waits_behind_a_long_one():
    made = Results()
    for workload, time in ((FirstToken(4), 2.0), (FirstToken(4, 90), 3.0)):
        made.add(workload, "mlxrun", Run(time))
    made.add(FirstToken(4, 90), "baseline", Run(9.0))
    assert [made.delay(result) for result in made.items] == [None, 1.5, None]


def test_the_reference():
    assert reference_speedup(1) == 1
    assert reference_speedup(8) == pytest.approx(2.12, abs=0.005)
    assert reference_speedup(16) is None


ABOUT = {
    "model": "m.gguf",
    "machine": {
        "date": "2026-01-01",
        "device": "CPU",
        "processor": "p, q",
        "versions": {"mlxrun": "1", "mlx": "2"},
    },
    "other_use": {"load_highest": 2.5, "others_used": None},
    "runtimes": [
        {"name": "mlxrun", "load_seconds": 1.5},
        {"name": "baseline", "load_seconds": None},
    ],
}


def mixed() -> Results:
    made = results(mlxrun=[1.0, 3.0], mlxrun4=[2.0], baseline=[4.0, 6.0])
    made.add(Prefill(8, 16), "mlxrun", Run(0.5))
    made.add(Ragged((3, 4), (5, 6)), "mlxrun", Run(2.0))
    made.add(FirstToken(2, 9), "mlxrun", Run(0.25))
    return made


def test_facts_are_json_and_complete():
    found = json.loads(json.dumps(facts(mixed(), ABOUT)))
    by_test = {(one["test"], one["runtime"]): one for one in found["results"]}
    assert list(by_test) == [
        ("tg10", "mlxrun"),
        ("tg10 x4", "mlxrun"),
        ("tg10", "baseline"),
        ("pp8 @ d16", "mlxrun"),
        ("ragged2", "mlxrun"),
        ("first2 behind 9", "mlxrun"),
    ]
    alone, four = by_test["tg10", "mlxrun"], by_test["tg10 x4", "mlxrun"]
    assert alone["seconds"] == [1, 3]
    assert alone["faster_than"] == {"baseline": pytest.approx(3)}
    assert (alone["kv_bytes"], alone["peak_memory"], alone["average_memory"]) == (100, 300, 200)
    assert four["speedup"] == pytest.approx(20 / alone["tokens_per_second"]["median"])
    assert four["efficiency"] == pytest.approx(four["speedup"] / 4)
    assert four["tokens_per_second_each"] == 5
    assert by_test["pp8 @ d16", "mlxrun"]["time_to_first_token"] == 0.5
    assert by_test["first2 behind 9", "mlxrun"]["time_to_first_token"] == 0.25
    assert by_test["ragged2", "mlxrun"]["tokens_per_second"]["median"] == 5.5
    assert by_test["tg10", "baseline"]["faster_than"] == {}


def test_csv_has_a_row_for_each_result():
    found = facts(mixed(), ABOUT)
    rows = list(csv.DictReader(io.StringIO(flat(found))))
    assert [row["test"] for row in rows] == [one["test"] for one in found["results"]]
    assert {row["processor"] for row in rows} == {"p, q"}
    assert {(row["load_highest"], row["others_used"]) for row in rows} == {("2.5", "")}
    loading = {row["runtime"]: row["load_seconds"] for row in rows}
    assert loading == {"mlxrun": "1.5", "baseline": ""}
    assert [row["runs"] for row in rows] == ["2", "1", "2", "1", "1", "1"]
    for row, one in zip(rows, found["results"], strict=True):
        assert float(row["tokens_per_second_median"]) == one["tokens_per_second"]["median"]
        assert (row["speedup"] == "") == (one.get("speedup") is None)
        for column in ("prompt", "predict", "context"):
            assert row[column] == str(one["workload"].get(column, ""))
    assert float(rows[0]["faster_than_baseline"]) == pytest.approx(3)
    assert {row["faster_than_baseline"] for row in rows[1:]} == {""}
    assert (rows[0]["mlxrun"], rows[0]["mlx"]) == ("1", "2")


def test_nothing_measured():
    found = facts(Results(), ABOUT)
    assert found["results"] == []
    assert len(flat(found).splitlines()) == 1
