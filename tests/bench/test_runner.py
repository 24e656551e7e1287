"""Runs take turns, warm-ups do not count, and an interrupt leaves what was measured."""

from __future__ import annotations

import pytest

from mlxrun.bench.runner import Results, Run, measure
from mlxrun.bench.workloads import Decode, Prefill, Workload


class Fake:
    """A runtime whose runs take as many seconds as it has run before."""

    about, load_seconds = "made up", None

    def __init__(self, name: str, log: list[str], *, only: type = object, fails: int = 99) -> None:
        self.name, self._log, self._only, self._fails = name, log, only, fails
        self._count = 0

    def can(self, workload: Workload) -> bool:
        return isinstance(workload, self._only)

    def run(self, workload: Workload) -> Run:
        if self._count == self._fails:
            raise KeyboardInterrupt
        self._log.append(f"{self.name} {workload.name}")
        self._count += 1
        return Run(float(self._count))


def test_they_take_turns_after_a_warm_up():
    log: list[str] = []
    results, seen = Results(), []
    pair = [Fake("a", log), Fake("b", log, only=Decode)]
    measure(pair, [Prefill(1), Decode(1)], 2, results, progress=lambda *done: seen.append(done))
    first, second = ["a pp1"] * 3, ["b tg1", "a tg1", "a tg1", "b tg1", "b tg1", "a tg1"]
    assert log == first + second
    assert seen == [(i, 9) for i in range(1, 10)]
    runs = {(r.workload.name, r.runtime): [run.seconds for run in r.runs] for r in results.items}
    assert runs == {
        ("pp1", "a"): [2, 3],
        ("tg1", "a"): [5, 6],
        ("tg1", "b"): [2, 3],
    }


def test_an_interrupt_keeps_the_results_so_far():
    results = Results()
    with pytest.raises(KeyboardInterrupt):
        measure([Fake("a", [], fails=4)], [Prefill(1), Prefill(2)], 2, results)
    assert [(r.workload.name, len(r.runs)) for r in results.items] == [("pp1", 2)]


def test_a_workload_that_is_measured_again_takes_its_turns_anew():
    """Runs from before a baseline came would be compared with runs that they did not follow."""
    log: list[str] = []
    results, ours = Results(), Fake("a", log)
    measure([ours], [Prefill(1), Decode(1)], 2, results)
    measure([ours, Fake("b", log)], [Decode(1)], 2, results)
    runs = {(r.workload.name, r.runtime): [run.seconds for run in r.runs] for r in results.items}
    assert runs == {("pp1", "a"): [2, 3], ("tg1", "a"): [8, 9], ("tg1", "b"): [2, 3]}
