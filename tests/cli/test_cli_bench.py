"""``mlxrun bench`` at tiny sizes: it runs, and tells the truth about what it ran. No times."""

from __future__ import annotations

import csv
import io
import json

import pytest

SMALL = ("--n-prompt", "8", "--n-predict", "4", "--repetitions", "2")


def test_tables(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, *SMALL, "--parallel", "2")
    assert (result.code, result.err) == (0, "")
    for name in ("pp8", "tg4", "tg4 x2", "Sequences together", "M1 Pro", "mlx 0"):
        assert name in result.out


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


def test_what_the_context_does_not_hold_is_left_out_and_told(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, "-p", "8,512", "-n", "0", "-r", "1")
    assert result.code == 0
    assert "Left out, longer than the model's context: pp512." in result.out


def test_nothing_that_the_context_holds(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, "-p", "1k", "-n", "0")
    assert result.code == 1
    assert result.error.startswith("error: pp1024 needs 1024 tokens")
