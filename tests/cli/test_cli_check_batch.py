"""``mlxrun check-batch``: a table for people, an object for programs."""

from __future__ import annotations

import json
from dataclasses import replace

from mlxrun.eval import batch_invariance

SMALL = ("--requests", "3", "--tokens", "6", "--parallel", "2")


def test_a_table(mlxrun_cli, model):
    result = mlxrun_cli("check-batch", model, *SMALL)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert len(lines) == 5
    assert all("3 of 3" in line for line in lines[1:])


def test_json(mlxrun_cli, model):
    result = mlxrun_cli("check-batch", model, *SMALL, "--json")
    found = json.loads(result.out)
    assert [way["equal"] for way in found["ways"]] == [3, 3, 3, 3]


def test_a_difference_where_none_may_be(mlxrun_cli, model, monkeypatch):
    whole = batch_invariance.check_batch

    def check_batch(*args, **options):
        ways = whole(*args, **options)
        return [replace(way, equal=2) if "deterministic" in way.name else way for way in ways]

    monkeypatch.setattr(batch_invariance, "check_batch", check_batch)
    result = mlxrun_cli("check-batch", model, *SMALL)
    assert result.code == 1
    assert "2 of 3" in result.out


def test_wrong_numbers(mlxrun_cli, model):
    assert mlxrun_cli("check-batch", model, "--requests", "0").code == 2
