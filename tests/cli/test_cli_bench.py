"""``mlxrun bench`` at tiny sizes: tables, JSON, CSV and early ends. No times."""

from __future__ import annotations

import csv
import io
import json

import pytest
from tiny_models import Tiny

from mlxrun.bench.runtimes import MlxrunRuntime
from mlxrun.errors import BaselineError

SMALL = ("--n-prompt", "8", "--n-predict", "4", "--repetitions", "2")


def test_tables(mlxrun_cli, model, llm):
    result = mlxrun_cli("bench", model, *SMALL, "--parallel", "2")
    assert (result.code, result.err) == (0, "")
    for name in ("pp8", "tg4", "tg4 x2", "Sequences together", "M1 Pro", "mlx 0"):
        assert name in result.out
    assert f"Tokens that memory has room for: {llm.context_length} in each of 2 " in result.out
    assert "room for" not in mlxrun_cli("bench", model, *SMALL).out


def test_json(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, *SMALL, "--parallel", "2", "--context", "0,16", "--json")
    found = json.loads(result.out)
    names = [one["test"] for one in found["results"]]
    shallow = ["pp8", "tg4", "tg4 x2"]
    assert names == shallow + [f"{name} @ d16" for name in shallow]
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in found["results"])
    assert found["results"][2]["kv_bytes"] == 2 * found["results"][1]["kv_bytes"]
    assert found["other_use"]["wall_seconds"] > 0
    assert {"python", "mlx", "mlxrun"} <= set(found["machine"]["versions"])


def test_csv(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, *SMALL, "--csv")
    rows = list(csv.DictReader(io.StringIO(result.out)))
    assert [row["test"] for row in rows] == ["pp8", "tg4"]
    assert all(float(row["tokens_per_second_median"]) > 0 for row in rows)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--n-prompt", "8,x"),
        ("--n-predict", "-1"),
        ("--parallel", "0"),
        ("--context", "1g"),
        ("--repetitions", "0"),
        ("--n-prompt", "0", "--n-predict", "0"),
        ("--json", "--csv"),
    ],
)
def test_wrong_usage(mlxrun_cli, model, wrong):
    result = mlxrun_cli("bench", model, *wrong)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err


def test_tests_beyond_the_context_are_left_out_and_named(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, "-p", "8,512", "-n", "0", "-r", "1")
    assert result.code == 0
    assert "Left out, longer than the model's context: pp512." in result.out


def test_tests_beyond_memory_are_left_out_and_named(mlxrun_cli, model, monkeypatch):
    monkeypatch.setenv("MLXRUN_MEMORY_LIMIT", "120M")
    many = ("-p", "8", "-n", "4", "-r", "1", "--parallel", "2000")
    result = mlxrun_cli("bench", model, *many)
    assert result.code == 0, result.err
    assert "Left out, more than memory holds: tg4 x2000." in result.out
    nothing = mlxrun_cli("bench", model, *many, "--context", "100", "--json")
    found = json.loads(nothing.out)
    assert found["left_out"] == {"context": [], "memory": ["tg4 x2000 @ d100"]}
    assert found["room"] == [{"parallel": 2000, "context": 0}]
    assert "room for" not in result.out


def test_no_test_fits_in_memory(mlxrun_cli, model, monkeypatch):
    monkeypatch.setattr("mlxrun.memory.plan.room", lambda: 1 << 20)
    result = mlxrun_cli("bench", model, *SMALL)
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith("error: this needs ")


def test_no_test_fits_the_context(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, "-p", "1k", "-n", "0")
    assert result.code == 1
    assert result.error.startswith("error: pp1024 needs 1024 tokens")


def test_mixed_requests_against_mlx_lm(mlxrun_cli, tmp_path):
    small = Tiny(keys={"context_length": 48}).write(tmp_path / "tiny.gguf")
    more = ("--parallel", "2", "--ragged", "--against", "mlx-lm", "--json")
    result = mlxrun_cli("bench", small, *SMALL, "-r", "1", *more)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    pairs = {(one["test"], one["runtime"]) for one in found["results"]}
    for test in ("pp8", "tg4", "tg4 x2", "ragged20", "first11", "first11 behind 47"):
        assert {(test, "mlxrun"), (test, "mlx-lm")} <= pairs
    assert ("ragged20", "mlxrun, one at a time") in pairs
    assert found["results"][0]["faster_than"]["mlx-lm"] > 0
    assert "mlx-lm" in found["machine"]["versions"]
    ours, theirs = found["runtimes"]
    assert ours["about"] == theirs["about"]  # the same weights in the same form


def test_ratios_in_tables(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, *SMALL, "--against", "mlx-lm")
    assert (result.code, result.err) == (0, "")
    header, ours, theirs = result.out.splitlines()[1:4]
    assert header.endswith("x mlx-lm")
    assert ours.split()[:2] == ["pp8", "mlxrun"]
    assert ours.endswith("x")
    assert theirs.split()[:2] == ["pp8", "mlx-lm"]


def test_llama_bench_that_is_not_there(mlxrun_cli, model, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = mlxrun_cli("bench", model, *SMALL, "--against", "llama-bench")
    assert (result.code, result.out) == (1, "")
    assert result.error.startswith("error: llama-bench is not on the path.")


def test_an_adapter_changes_the_weights(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, "--against", "mlx-lm", "--adapter", "somewhere")
    assert (result.code, result.out) == (2, "")


@pytest.mark.parametrize("form", ["--json", "--csv", None])
def test_ctrl_c_prints_the_results_so_far(mlxrun_cli, model, monkeypatch, form):
    real, calls = MlxrunRuntime.run, []

    def run(self, workload):
        calls.append(workload)
        if len(calls) > 4:  # warm-up, two runs, warm-up, and now the first that would count
            raise KeyboardInterrupt
        return real(self, workload)

    monkeypatch.setattr(MlxrunRuntime, "run", run)
    result = mlxrun_cli("bench", model, *SMALL, *([form] if form else []))
    assert (result.code, result.err) == (130, "interrupted\n")
    assert "pp8" in result.out
    assert "tg4" not in result.out
    if form == "--json":
        assert json.loads(result.out)["interrupted"]
    if form is None:
        assert "Interrupted" in result.out


def test_a_failure_prints_the_results_so_far(mlxrun_cli, model, monkeypatch):
    real, calls = MlxrunRuntime.run, []

    def run(self, workload):
        calls.append(workload)
        if len(calls) > 4:
            raise BaselineError("it broke")
        return real(self, workload)

    monkeypatch.setattr(MlxrunRuntime, "run", run)
    result = mlxrun_cli("bench", model, *SMALL, "--json")
    assert (result.code, result.err) == (1, "error: it broke\n")
    assert [one["test"] for one in json.loads(result.out)["results"]] == ["pp8"]
    calls += [None] * 4
    result = mlxrun_cli("bench", model, *SMALL)
    assert (result.code, result.out) == (1, "")


def test_ctrl_c_while_the_device_is_measured(mlxrun_cli, model, monkeypatch):
    def measured():
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxrun.analysis.device.measure_device", measured)
    result = mlxrun_cli("bench", model, *SMALL, "--roofline")
    assert result.code == 130
    assert "pp8" in result.out
    assert "tg4" in result.out
