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

# Debian and Ubuntu (libopenblas0), Fedora (openblas).
_NAMES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")

loaded: str | None = None
late = False  # whether MLX was there before
problem: str | None = None  # what is wrong with the library that MLXRUN_BLAS names
_advised = False


def preload() -> str | None:
    """Load a BLAS for MLX unless MLX is there already; returns its name, or None.

    Intel's comes first where its wheel is installed: a product with one row, which each drawn token
    is, takes it less than half the time of an OpenBLAS that copies the matrix first (measured on an
    AMD EPYC, 5632 x 2048: 2.1 and 5.2 ms of the cores' time). ``MLXRUN_BLAS`` names another
    library, or switches this off with ``0``.
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
    """Have the BLAS multiply on the calling thread alone, from now on.

    Where a pool of our own multiplies (``mlxrun.kernels``), a BLAS's threads wait for the next
    product on the cores that the pool computes on. Nothing happens where there is no BLAS of ours.
    """
    if not (loaded or preloaded()):
        return
    program = ctypes.CDLL(None)  # it was loaded globally
    for name in ("openblas_set_num_threads", "MKL_Set_Num_Threads"):
        with suppress(AttributeError):
            program[name](ctypes.c_int(1))


def preloaded() -> str | None:
    """The BLAS that LD_PRELOAD names; None if there is none among what it names."""
    named = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return next((name for name in named if "blas" in name or "mkl" in name), None)


def hint() -> str | None:
    """What to tell a user whose matrix products will be slow; None if there is nothing to say."""
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
    """The library in words, and in brackets what chooses another."""
    if not _used():
        return "not used on a GPU"
    if ACCELERATE:
        return "Accelerate"
    if not loaded and (named := preloaded()):
        return f"{named} (LD_PRELOAD)"
    return f"{loaded or 'what MLX brings, which is slow'} ({VARIABLE})"


def _used() -> bool:
    import mlx.core as mx

    return bool(mx.default_device() == mx.cpu)


def advice() -> str | None:
    """As :func:`hint`, the first time that it is asked for; None from then on."""
    global _advised
    told = None if _advised else hint()
    _advised = True
    return told
