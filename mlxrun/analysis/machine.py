"""The machine that figures are measured on: device, system, versions; its load meanwhile."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from mlxrun.memory.device import cores

# Load average before, or cores used by other programs, as a share of all: from here on it is felt.
BUSY = 0.25
# Programs below this part of a core are not named, and at most so many are.
_LEAST_CORES, _MOST_NAMED = 0.05, 5
# The parent of Linux's kernel threads.
_KTHREADD = 2


def machine(packages: Iterable[str] = ("mlxrun", "mlx")) -> dict[str, Any]:
    """Device, system, versions of ``packages`` and date, as JSON types."""
    from mlxrun.kernels import blas
    from mlxrun.kernels.device import device_name

    default_blas = "Accelerate" if sys.platform == "darwin" else "MLX's default"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(),
        "processor": _processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "blas": blas.loaded or default_blas,
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in packages}},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    name = ""
    if sys.platform == "darwin":
        name = _output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    elif (info := Path("/proc/cpuinfo")).is_file():
        found = re.search(r"^model name\s*:(.*)", info.read_text(), re.MULTILINE)
        name = found[1] if found else ""
    return name.strip() or platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


class Process(NamedTuple):
    """A process other than this one and its children, and its processor time in seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Program:
    """Load by all processes of one name."""

    name: str
    cores: float  # processor time over wall time
    processes: int  # that used some


class BackgroundLoad:
    """Load of the machine, by this process and by others, from the moment this is made."""

    def __init__(self) -> None:
        self._before = self._highest = _load_average()
        self._processes = processes()
        self._started, self._used = time.perf_counter(), time.process_time()

    def look(self) -> None:
        """Note the load average of this moment."""
        load = _load_average()
        if load is not None:
            self._highest = max(load, self._highest or 0.0)

    def programs(self) -> tuple[list[Program], float | None]:
        """The busiest other programs, and cores used by all that still run; None if unknown."""
        after, wall = processes(), max(time.perf_counter() - self._started, 1e-9)
        if not after:
            return [], None
        used: defaultdict[str, list[float]] = defaultdict(list)
        for pid, (name, seconds) in after.items():
            same = self._processes.get(pid)
            spent = seconds - (same.seconds if same and same.name == name else 0.0)
            if spent > 0:
                used[name].append(spent / wall)
        found = [Program(name, sum(cores), len(cores)) for name, cores in used.items()]
        found.sort(key=lambda program: (-program.cores, program.name))
        named = [program for program in found if program.cores >= _LEAST_CORES]
        return named[:_MOST_NAMED], sum(program.cores for program in found)

    def facts(self) -> dict[str, Any]:
        """Load averages over a minute, and cores used by others and by this process, or None.

        ``shared``: others used enough to be felt.
        """
        self.look()
        wall = max(time.perf_counter() - self._started, 1e-9)
        used = time.process_time() - self._used
        busy, others = self.programs()
        return {
            "load_before": self._before,
            "load_highest": self._highest,
            "cores": cores(),
            "wall_seconds": wall,
            "cpu_seconds": used,
            "cores_used": used / wall,
            "busy": [asdict(program) for program in busy],
            "others_used": others,
            "shared": max(self._before or 0.0, others or 0.0) > BUSY * cores(),
        }


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def processes() -> dict[int, Process]:
    """Processes by number, this one and its children apart; none where the system lists none."""
    if sys.platform == "darwin":
        return of_ps(_output("/bin/ps", "-A", "-o", "pid=,ppid=,time=,comm="))
    return of_proc(Path("/proc"))


def of_proc(folder: Path) -> dict[int, Process]:
    """Processes in Linux's ``/proc`` (proc(5))."""
    ticks, own, found = os.sysconf("SC_CLK_TCK"), os.getpid(), {}
    for entry in folder.glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except OSError:  # it has ended
            continue
        # A name may have spaces and brackets; the numbers begin behind the last bracket.
        head, _, tail = stat.rpartition(")")
        fields = tail.split()
        pid, parent = int(entry.name), int(fields[1])
        if own not in (pid, parent):
            user, system = int(fields[11]), int(fields[12])
            # Threads of the kernel are many, and named after their work of the moment.
            name = "kernel" if parent == _KTHREADD else head.partition("(")[2]
            found[pid] = Process(name, (user + system) / ticks)
    return found


def of_ps(text: str) -> dict[int, Process]:
    """Processes as ``ps -A -o pid=,ppid=,time=,comm=`` prints them on macOS."""
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
