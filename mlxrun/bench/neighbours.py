"""Other programs that keep the machine busy: the processor time that each takes meanwhile.

Linux tells it in ``/proc`` (proc(5)), macOS through ``ps``. Knows no MLX and nothing of models.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Programs that took less than this part of a core are not worth a name, and how many have one.
_FELT, _NAMED = 0.05, 5
# The process that is the parent of Linux's own threads.
_KERNEL = 2


class Process(NamedTuple):
    """A process of somebody else's: its program, and its processor time in seconds so far."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Program:
    """What processes of one name took.

    Attributes:
        name: of the program, as the system has it.
        cores: processor time by wall time, of all together.
        processes: how many took some.
    """

    name: str
    cores: float
    processes: int


class Neighbours:
    """Processes besides this one and its children, from the moment this is made."""

    def __init__(self) -> None:
        self._started, self._before = time.perf_counter(), processes()

    def programs(self) -> tuple[list[Program], float | None]:
        """Those that took most, and what all took, in cores; None where the system tells nothing.

        What ended meanwhile is not counted: its time is gone.
        """
        after, wall = processes(), time.perf_counter() - self._started
        if not after:
            return [], None
        taken: defaultdict[str, list[float]] = defaultdict(list)
        for pid, (name, seconds) in after.items():
            same = self._before.get(pid)
            spent = seconds - (same.seconds if same and same.name == name else 0.0)
            if spent > 0:
                taken[name].append(spent / max(wall, 1e-9))
        found = [Program(name, sum(cores), len(cores)) for name, cores in taken.items()]
        found.sort(key=lambda program: (-program.cores, program.name))
        named = [program for program in found if program.cores >= _FELT]
        return named[:_NAMED], sum(program.cores for program in found)


def processes() -> dict[int, Process]:
    """Processes by number, this one and its children apart; none where the system tells nothing."""
    return of_ps(_ps()) if sys.platform == "darwin" else of_proc(Path("/proc"))


def of_proc(folder: Path) -> dict[int, Process]:
    """Processes as Linux tells of them; those that end meanwhile are left out."""
    ticks, own, found = os.sysconf("SC_CLK_TCK"), os.getpid(), {}
    for entry in folder.glob("[0-9]*"):
        try:
            told = (entry / "stat").read_text(errors="replace")
        except OSError:
            continue
        # A name may hold spaces and brackets; the numbers begin behind the last bracket.
        head, _, tail = told.rpartition(")")
        fields = tail.split()
        pid, parent = int(entry.name), int(fields[1])
        if own not in (pid, parent):
            user, system = int(fields[11]), int(fields[12])
            name = head.partition("(")[2]
            # Threads of the kernel are many, and named after what each does at the moment.
            name = "kernel" if parent == _KERNEL else name
            found[pid] = Process(name, (user + system) / ticks)
    return found


def of_ps(text: str) -> dict[int, Process]:
    """Processes as ``ps -A -o pid=,ppid=,time=,comm=`` prints them; other lines are left out."""
    own, found = os.getpid(), {}
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(\d+)\s+(\d+)\s+(?:(\d+)-)?((?:\d+:)*\d+(?:\.\d+)?)\s+(.+)", line)
        if match and own not in (int(match[1]), int(match[2])):
            seconds = 0.0
            for part in match[4].split(":"):
                seconds = seconds * 60 + float(part)
            seconds += 86_400 * int(match[3] or 0)
            found[int(match[1])] = Process(Path(match[5].strip()).name, seconds)
    return found


def _ps() -> str:
    command = ["/bin/ps", "-A", "-o", "pid=,ppid=,time=,comm="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
