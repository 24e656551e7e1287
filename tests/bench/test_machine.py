"""What is told of the machine and of what else used it."""

from __future__ import annotations

import json
import os

import pytest

from mlxrun.bench.machine import BackgroundLoad, Program, cores, machine


def test_facts_are_json_and_name_what_matters():
    found = json.loads(json.dumps(machine(["mlxrun", "mlx", "no-such-package"])))
    assert found["device"] and found["processor"] and found["system"]
    assert found["cores"] == cores() >= 1
    assert found["versions"]["no-such-package"] == "unknown"
    assert {"python", "mlx"} <= set(found["versions"])


def test_the_highest_load_is_kept(monkeypatch):
    loads = iter([0.0, 5.0, 1.0])
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    monkeypatch.setattr(BackgroundLoad, "programs", lambda self: ([], 0.0))
    load = BackgroundLoad()
    load.look()
    found = load.facts()
    assert (found["load_before"], found["load_highest"], found["shared"]) == (0.0, 5.0, False)
    assert found["cores_used"] == pytest.approx(found["cpu_seconds"] / found["wall_seconds"])


def test_a_busy_machine(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (cores(), 0.0, 0.0))
    assert BackgroundLoad().facts()["shared"]


def test_a_neighbour_that_takes_much(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    busy = Program("a compiler", 0.9 * cores(), 2)
    monkeypatch.setattr(BackgroundLoad, "programs", lambda self: ([busy], busy.cores))
    found = json.loads(json.dumps(BackgroundLoad().facts()))
    assert found["busy"] == [{"name": "a compiler", "cores": busy.cores, "processes": 2}]
    assert found["others_used"] == busy.cores
    assert found["shared"]


def test_a_system_without_a_load(monkeypatch):
    def fail():
        raise OSError

    monkeypatch.setattr(os, "getloadavg", fail)
    monkeypatch.setattr(BackgroundLoad, "programs", lambda self: ([], None))
    found = BackgroundLoad().facts()
    assert (found["load_before"], found["load_highest"], found["shared"]) == (None, None, False)
