"""Facts of the machine, and other busy programs: a real process is seen, a child is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxrun.analysis import machine as machine_module
from mlxrun.analysis.machine import (
    BackgroundLoad,
    Process,
    Program,
    cores,
    machine,
    of_proc,
    of_ps,
    processes,
)


def test_facts_are_json_and_name_what_matters():
    found = json.loads(json.dumps(machine(["mlxrun", "mlx", "no-such-package"])))
    assert found["device"] and found["processor"] and found["system"]
    assert found["cores"] == cores() >= 1
    assert found["versions"]["no-such-package"] == "unknown"
    assert {"python", "mlx"} <= set(found["versions"])


# A shell that starts a program and ends leaves it to another parent.
SPIN = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def test_a_busy_process_is_named_and_a_child_is_not():
    started = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -c '{SPIN}' >/dev/null 2>&1 & echo $!"],
        capture_output=True,
        text=True,
        check=True,
    )
    stranger, child = int(started.stdout), subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        load = BackgroundLoad()
        seen, deadline = processes(), time.monotonic() + 20
        before = seen[stranger].seconds
        while seen[stranger].seconds < before + 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)
            seen = processes()
        assert child.pid not in seen
        assert os.getpid() not in seen
        found, all_of_them = load.programs()
        assert seen[stranger].name in {program.name for program in found}
        assert all_of_them is not None
        assert all_of_them >= max(program.cores for program in found) > 0
    finally:
        os.kill(stranger, 9)
        child.kill()
        child.wait()


@pytest.fixture
def listed(monkeypatch):
    """Has the system list made-up processes, one table after the other, a second apart."""

    def set_to(*tables: dict[int, Process]) -> tuple[list[Program], float | None]:
        made, clock = iter(tables), iter([10.0, 11.0])
        monkeypatch.setattr(machine_module, "processes", lambda: next(made))
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
        return BackgroundLoad().programs()

    return set_to


def test_processes_of_one_name_are_counted_together(listed):
    before = {1: Process("cc", 5.0), 2: Process("cc", 1.0), 3: Process("idle", 9.0)}
    after = {1: Process("cc", 5.5), 2: Process("cc", 1.25), 3: Process("idle", 9.0)}
    # A new one counts from its start, also where it has the number of one that ended.
    after |= {4: Process("ld", 0.125)}
    found, taken = listed(before | {4: Process("sh", 3.0)}, after)
    assert found == [Program("cc", 0.75, 2), Program("ld", 0.125, 1)]
    assert taken == 0.875


def test_only_the_busiest_are_named_and_all_are_counted(listed):
    names = "abcdefgh"
    after = {i: Process(name, (i + 1) / 16) for i, name in enumerate(names)}
    after[99] = Process("hardly", 0.01)
    found, taken = listed({}, after)
    assert [program.name for program in found] == ["h", "g", "f", "e", "d"]
    assert taken == pytest.approx(36 / 16 + 0.01)


def test_a_system_that_lists_nothing(listed):
    assert listed({}, {}) == ([], None)


def test_names_with_spaces_and_brackets(tmp_path: Path):
    ticks = os.sysconf("SC_CLK_TCK")
    processes = ((10, "a b) c (d", 1), (11, "mine", os.getpid()), (12, "kworker/0:1", 2))
    for pid, name, parent in processes:
        (tmp_path / str(pid)).mkdir()
        numbers = [parent, *[0] * 9, 3 * ticks, ticks // 2, *[0] * 30]
        stat = f"{pid} ({name}) R {' '.join(map(str, numbers))}\n"
        (tmp_path / str(pid) / "stat").write_text(stat)
    (tmp_path / "13").mkdir()  # ended while it was looked at
    (tmp_path / "version").write_text("")
    took = 3 + ticks // 2 / ticks
    assert of_proc(tmp_path) == {10: Process("a b) c (d", took), 12: Process("kernel", took)}


def test_processes_in_the_output_of_ps():
    text = f"""\
      1     0 1:02.50 /sbin/launchd
    345     1 112:00.25 /Applications/Some App.app/Contents/MacOS/Some App
    346     1 2-01:00:03 old
    {os.getpid()}     1 0:09.00 python
    347 {os.getpid()} 0:01.00 ps
    nonsense
    """
    assert of_ps(text) == {
        1: Process("launchd", 62.5),
        345: Process("Some App", 6720.25),
        346: Process("old", 2 * 86_400 + 3603),
    }
    assert of_ps("") == {}


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


def test_another_program_that_uses_much(monkeypatch):
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
