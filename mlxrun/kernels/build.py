"""Compiled objects of the kernels: found, or compiled with the system's C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from converters.gguf.types import GGMLType
from mlxrun.kernels.native import Kernels, Native

SOURCES = Path(__file__).parent / "cpu"
_native: Native | None = None


@dataclass(frozen=True)
class Missing:
    """No kernels, and why: one line."""

    reason: str


def available(
    types: Iterable[GGMLType], say: Callable[[str], object] = lambda line: None
) -> Kernels | Missing:
    """Kernels for types of blocks, loaded, or compiled now; or why there are none.

    Args:
        say: called with a line that reports progress, where something is compiled.
    """
    global _native
    if os.environ.get("MLXRUN_KERNELS") == "0":
        return Missing("switched off by MLXRUN_KERNELS")
    started = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="mlxrun-kernels-"))
    loaded = _native.types if _native else set()
    jobs = [] if _native else [("core", _core(folder)), ("glue", _glue(folder))]
    wanted = [type for type in types if type not in loaded]
    jobs += [(type.name, _format(folder, type)) for type in wanted]
    if jobs:
        with ThreadPoolExecutor() as pool:
            for done in pool.map(lambda job: _run(job[1]), jobs):
                if done:
                    return Missing(done)
        say(f"kernels compiled in {time.perf_counter() - started:.1f} s")
    formats = {type: folder / f"{type.name}.so" for type in wanted}
    if _native is None:
        _native = Native(folder / "core.so", folder / "glue.so", formats)
    else:
        _native.add(formats)
    return Kernels(_native)


_FLAGS = ["-O2", "-fPIC", "-shared", "-march=native", "-Wno-psabi"]


def _compiler() -> str:
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def _core(folder: Path) -> list[str]:
    sources = [str(SOURCES / name) for name in ("core.cpp", "step.cpp")]
    return [_compiler(), "-std=c++17", *_FLAGS, "-pthread", *sources, "-o", str(folder / "core.so")]


def _format(folder: Path, type: GGMLType) -> list[str]:
    source, out = str(SOURCES / "format.cpp"), str(folder / f"{type.name}.so")
    return [_compiler(), "-std=c++17", *_FLAGS, f"-DKERNELS_TYPE={type.name}", source, "-o", out]


def _glue(folder: Path) -> list[str]:
    package = Path(mx.__file__).parent
    return [
        _compiler(), "-std=c++20", "-O1", "-fPIC", "-shared", "-isystem", str(package / "include"),
        str(SOURCES / "glue.cpp"), "-o", str(folder / "glue.so"), f"-L{package / 'lib'}", "-lmlx",
        f"-Wl,-rpath,{package / 'lib'}",
    ]  # fmt: skip


def _run(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.splitlines()[0] if done.returncode else None
