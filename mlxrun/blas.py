"""A real BLAS for MLX's CPU backend on Linux.

MLX's CPU wheel brings the reference BLAS, whose matrix products run on one core without vector
instructions (measured here: 4096 x 4096 by 64 takes 559 ms; with OpenBLAS 12 ms). A library loaded
globally before MLX takes its place. On a Mac MLX uses Accelerate and nothing is done.
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys
from pathlib import Path

# Debian and Ubuntu (libopenblas0), Fedora (openblas), Intel's wheel (mkl).
_NAMES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")

loaded: str | None = None


def preload() -> str | None:
    """Load a BLAS for MLX unless MLX is there already; returns its name, or None.

    ``MLXRUN_BLAS`` names another library, or switches this off with ``0``.
    """
    global loaded
    wanted = os.environ.get("MLXRUN_BLAS")
    if sys.platform != "linux" or wanted == "0" or "mlx.core" in sys.modules or loaded:
        return loaded
    wheels = glob.glob(str(Path(sys.prefix) / "lib" / "libmkl_rt.so*"))  # noqa: PTH207
    for name in (wanted,) if wanted else (*_NAMES, *wheels):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        loaded = name
        break
    return loaded


def hint() -> str | None:
    """What to tell a user whose matrix products will be slow; None if there is nothing to say."""
    if sys.platform != "linux" or loaded or os.environ.get("LD_PRELOAD", "").find("blas") >= 0:
        return None
    return (
        "matrix products are slow without a BLAS: apt-get install libopenblas0 (or pip install mkl)"
    )
