"""The machine that figures were measured on: device, system, versions."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlxrun.memory.device import cores


def machine(packages: Iterable[str] = ("mlxrun", "mlx")) -> dict[str, Any]:
    """Device, system, versions of ``packages`` and date, as JSON types."""
    from mlxrun.kernels import blas
    from mlxrun.kernels.device import device_name

    default_blas = "Accelerate" if sys.platform == "darwin" else "what MLX brings"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(),
        "processor": _processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "blas": blas.loaded or default_blas,
        "versions": {"python": platform.python_version(), **_versions(packages)},
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _processor() -> str:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
