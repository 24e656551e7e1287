"""Kernels for this machine: :func:`available` gives :class:`Kernels`, or the reason for none."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from converters.gguf.types import GGMLType
from mlxrun.errors import KernelsError
from mlxrun.kernels import blas, build, machine
from mlxrun.kernels.cache import ObjectCache, place
from mlxrun.kernels.device import CPU, device
from mlxrun.kernels.interface import HeadsSpec, Matrix, Missing
from mlxrun.kernels.native import GATES, Kernels, LayoutError, Native

if TYPE_CHECKING:
    from mlxrun.kernels.gpu import Kernels as GPUKernels

__all__ = [
    "GATES",
    "HeadsSpec",
    "Kernels",
    "Matrix",
    "Missing",
    "Status",
    "available",
    "cpu_kernels",
    "gpu_kernels",
    "status",
]

# Seconds that idle threads of the pool wait busily for the next operation.
SPIN: Final = 1e-4


@dataclass(frozen=True)
class Status:
    """The kernels on this machine.

    Attributes:
        isa: the instruction set in use.
        runnable: instruction sets of the processor, best first.
        threads: of the pool.
        pinned: each thread keeps to a core.
        cache: directory of compiled objects.
        compiler: its version; None without one.
        objects: "shipped", "cached" or "to be compiled".
        loaded: types whose kernels this process has loaded.
    """

    isa: str
    runnable: tuple[str, ...]
    threads: int
    pinned: bool
    cache: Path
    compiler: str | None
    objects: dict[str, str]
    loaded: frozenset[GGMLType]


class _Process:
    """The kernels of this process: one instruction set, a growing set of types."""

    lock = threading.Lock()
    native: Native | None = None
    isa: machine.ISA
    # Reasons by the objects' keys: a failure is not tried again in this process.
    failed: dict[frozenset[str], str] = {}  # noqa: RUF012


def available(
    types: Iterable[GGMLType], say: Callable[[str], object] = lambda line: None
) -> Kernels | Missing:
    """The CPU's kernels for types of blocks, loaded or compiled now; or the reason for none.

    ``MLXRUN_KERNELS=0`` switches them off; the name of an instruction set chooses it, for the first
    kernels of a process. ``MLXRUN_THREADS`` and ``MLXRUN_PIN_THREADS=1`` configure the pool.

    Args:
        say: called with a line after compiling.

    Raises:
        KernelsError: ``MLXRUN_KERNELS`` names instructions that this processor lacks.
        ParameterError: ``MLXRUN_THREADS`` is no number of threads.
    """
    if os.environ.get(machine.SWITCH) == "0":
        return Missing(f"switched off by {machine.SWITCH}=0")
    isa, threads = machine.chosen_isa(), machine.thread_count()
    with _Process.lock:
        known = _Process.native.types if _Process.native else set()
        absent = frozenset(types) - known
        try:
            if absent or _Process.native is None:
                _load(absent, isa, threads, say)
        except (build.BuildError, KernelsError, LayoutError, OSError) as error:
            return Missing(" ".join(str(error).split()))
        assert _Process.native is not None
        return Kernels(_Process.native)


def cpu_kernels(types: Iterable[GGMLType], dtype: str) -> Kernels | Missing | None:
    """Kernels for types of blocks and for F32; None unless activations are float32 on a CPU."""
    if dtype != "float32" or device() is not CPU:
        return None
    return available({*types, GGMLType.F32}, _say)


def gpu_kernels(types: Iterable[GGMLType]) -> GPUKernels | Missing | None:
    """Kernels for the types that a GPU multiplies faster as blocks; None on a CPU."""
    if device() is CPU:
        return None
    from mlxrun.kernels import gpu

    return gpu.available(types)


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def _load(
    types: frozenset[GGMLType], isa: machine.ISA, threads: int, say: Callable[[str], object]
) -> None:
    """Find or build objects, and load them."""
    native = _Process.native
    if native is not None:
        isa = _Process.isa
    wanted = build.objects(types, isa)
    paths = _paths(wanted, say)
    formats = {kind: paths[kind.name] for kind in types}
    if native is None:
        native = Native(paths["core"], paths["glue"], {})
        native.set_threads(threads, SPIN, machine.pinned())
        blas.use_one_thread()
    native.add(formats)
    _Process.native, _Process.isa = native, isa


def _paths(wanted: dict[str, build.Object], say: Callable[[str], object]) -> dict[str, Path]:
    found = build.find(wanted, None)
    if not found.absent:
        return found.paths
    keys = frozenset(made.key for made in found.absent.values())
    if keys in _Process.failed:
        raise build.BuildError(_Process.failed[keys])
    started = time.perf_counter()
    try:
        paths, compiled = build.build(wanted, ObjectCache(place()))
    except build.BuildError as error:
        _Process.failed[keys] = str(error)
        raise
    if compiled:
        seconds = time.perf_counter() - started
        say(f"block kernels compiled ({', '.join(sorted(compiled))}): {seconds:.1f} s, once")
    return paths


def status(types: Iterable[GGMLType] = ()) -> Status:
    """What :func:`available` would use; compiles and loads nothing.

    Raises:
        KernelsError: ``MLXRUN_KERNELS`` names instructions that this processor lacks, or the cache
            cannot be used.
        ParameterError: ``MLXRUN_THREADS`` is no number of threads.
    """
    isa, folder = machine.chosen_isa(), place()
    wanted = build.objects(frozenset(types) - build.UNKNOWN, isa)
    kept = build.find(wanted, ObjectCache(folder))
    where = {
        name: "to be compiled"
        if name in kept.absent
        else "cached"
        if kept.paths[name].parent == folder
        else "shipped"
        for name in wanted
    }
    compiler = build.Compiler.find()
    return Status(
        isa.name,
        tuple(each.name for each in machine.runnable_isas()),
        machine.thread_count(),
        machine.pinned(),
        folder,
        compiler.version if compiler else None,
        where,
        frozenset(_Process.native.types if _Process.native else ()),
    )
