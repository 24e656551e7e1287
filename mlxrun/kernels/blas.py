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
from contextlib import suppress
from pathlib import Path

VARIABLE = "MLXRUN_BLAS"
ACCELERATE = sys.platform == "darwin"

_DEFAULT = "MLX's default, which is slow"
# Debian and Ubuntu (libopenblas0), Fedora (openblas).
_NAMES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")

loaded: str | None = None
late = False  # whether MLX was there before
problem: str | None = None  # of the library that MLXRUN_BLAS names
_advised = False


def preload() -> str | None:
    """Load a BLAS for MLX unless MLX is there already; returns its name, or None.

    Intel's comes first where its wheel is installed: a product with one row, as in decoding, takes
    less than half the time of an OpenBLAS that copies the matrix first (measured on an AMD EPYC,
    5632 x 2048: 2.1 and 5.2 ms of the cores' time). ``MLXRUN_BLAS`` names another library, or
    switches this off with ``0``.
    """
    global loaded, late, problem
    wanted = os.environ.get(VARIABLE)
    if sys.platform != "linux" or wanted == "0" or loaded or late:
        return loaded
    if "mlx.core" in sys.modules:
        late = True
        return None
    wheels = glob.glob(str(Path(sys.prefix) / "lib" / "libmkl_rt.so*"))  # noqa: PTH207
    for name in (wanted,) if wanted else (*wheels, *_NAMES):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            if wanted:
                problem = f"{VARIABLE} names {name}, which cannot be loaded: {error}"
            continue
        loaded = name
        break
    return loaded


def use_one_thread() -> None:
    """Restrict the BLAS to the calling thread: its idle threads spin on the cores of our pool."""
    if not (loaded or preloaded()):
        return
    program = ctypes.CDLL(None)  # it was loaded globally
    for name in ("openblas_set_num_threads", "MKL_Set_Num_Threads"):
        with suppress(AttributeError):
            program[name](ctypes.c_int(1))


def preloaded() -> str | None:
    """The BLAS among the libraries of LD_PRELOAD, or None."""
    named = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return next((name for name in named if "blas" in name or "mkl" in name), None)


def hint() -> str | None:
    """Why matrix products will be slow, and what to do; None if they will not."""
    if sys.platform != "linux" or loaded or preloaded() or not _used():
        return None
    if late:
        return "matrix products are slow: MLX was imported before a BLAS; import mlxrun first"
    wanted = os.environ.get(VARIABLE)
    if wanted == "0":
        return None
    if problem:
        return f"matrix products are slow: {problem}"
    return (
        "matrix products are slow without a BLAS: apt-get install libopenblas0 (or pip install mkl)"
    )


def described() -> str:
    """The library in words, with the variable that chooses another."""
    if not _used():
        return "not used on a GPU"
    if ACCELERATE:
        return "Accelerate"
    if not loaded and (named := preloaded()):
        return f"{named} (LD_PRELOAD)"
    return f"{loaded or _DEFAULT} ({VARIABLE})"


def _used() -> bool:
    import mlx.core as mx

    return bool(mx.default_device() == mx.cpu)


def advice() -> str | None:
    """As :func:`hint` on the first call; None from then on."""
    global _advised
    found = None if _advised else hint()
    _advised = True
    return found
