"""What was measured on, and what else used it: facts that belong beside every figure.

Imports MLX only to ask for the device.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlxrun.bench.neighbours import Neighbours
from mlxrun.kernels import blas
from mlxrun.kernels.device import device_name
from mlxrun.memory.device import cores

# Load before, or what others take meanwhile, as a share of the cores: from here on it is felt.
BUSY = 0.25


def machine(packages: Iterable[str] = ("mlxrun", "mlx")) -> dict[str, Any]:
    """Device, system, versions and date, as JSON types.

    Args:
        packages: whose versions matter.
    """
    brought = "Accelerate" if sys.platform == "darwin" else "what MLX brings"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(),
        "processor": _processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "blas": blas.loaded or brought,
        "versions": {"python": platform.python_version()} | _versions(packages),
    }


class Watch:
    """What the system says of its load, and of other programs, while something is measured."""

    def __init__(self) -> None:
        self._before = self._highest = _load()
        self._neighbours = Neighbours()
        self._started, self._used = time.perf_counter(), time.process_time()

    def look(self) -> None:
        """Note the load of this moment."""
        load = _load()
        if load is not None:
            self._highest = max(load, self._highest or 0.0)

    def facts(self) -> dict[str, Any]:
        """Load averages over a minute, what others took and what this process did, in cores.

        None where the system does not tell. ``shared`` says whether it was enough to be felt.
        """
        self.look()
        wall = max(time.perf_counter() - self._started, 1e-9)
        used = time.process_time() - self._used
        busy, others = self._neighbours.programs()
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


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        return asked.stdout.strip() or platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
