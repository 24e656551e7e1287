"""Compiled kernels: shipped in a wheel, cached, or compiled now.

There is one object for the core, one for each type of blocks and one for the glue to MLX. Its key
is the hash of its sources, the compiler's flags and, for the glue, MLX's version. An object that is
compiled here is also keyed by the compiler's version, and tested in a process of its own before it
is cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

import mlx.core as mx

from converters.gguf.types import GGMLType
from mlxrun.kernels.cache import ObjectCache, digest
from mlxrun.kernels.machine import ISA

__all__ = ["BuildError", "Compiler", "Object", "core", "format_of", "glue", "objects"]

SOURCES: Final = Path(__file__).parent / "cpu"
#: Types without kernels: F64 and integers are never matrices, Q8_1 and Q8_K never in files.
UNKNOWN: Final = frozenset(
    GGMLType[name] for name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
)

_KERNEL_FLAGS: Final = ("-std=c++17", "-O3", "-fvisibility=hidden", "-pthread", "-Wno-psabi")
_GLUE_FLAGS: Final = ("-std=c++20", "-O1")
_COMMON_FLAGS: Final = ("-fPIC", "-shared", "-g0", *(("-s",) if sys.platform == "linux" else ()))
_INCLUDE: Final = re.compile(r'^\s*#\s*include\s+"([\w./]+)"', re.MULTILINE)

# Seconds; a slow machine under load takes some ten for one object.
COMPILING: Final = 300.0
TRYING: Final = 120.0
_ASKING: Final = 20.0


class BuildError(Exception):
    """Objects cannot be made: one line that says why."""


@dataclass(frozen=True)
class Object:
    """A shared object to compile.

    Attributes:
        name: with the instruction set or MLX's version.
        libraries: flags with paths of this machine, which are not part of the key.
        needs: further dependencies, part of the key.
    """

    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    needs: str = ""

    @property
    def key(self) -> str:
        """The hash of sources, headers, flags and dependencies, in hexadecimal."""
        parts = [self.name, self.needs, *self.flags]
        for path in sorted(_with_headers(self.sources)):
            parts += [path.name, path.read_text(encoding="utf-8")]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def command(self, compiler: Sequence[str], out: Path) -> list[str]:
        """The compiler's command line."""
        paths = [str(path) for path in self.sources]
        return [*compiler, *self.flags, *paths, *self.libraries, "-o", str(out)]


def core(isa: ISA) -> Object:
    """The core: products, and the small operations of a step."""
    sources = (SOURCES / "core.cpp", SOURCES / "step.cpp")
    flags = (*_KERNEL_FLAGS, *_COMMON_FLAGS, *isa.flags)
    return Object(f"core-{isa.name}", sources, flags)


def format_of(kind: GGMLType, isa: ISA) -> Object:
    """The kernels of one type."""
    flags = (*_KERNEL_FLAGS, *_COMMON_FLAGS, *isa.flags, f"-DKERNELS_TYPE={kind.name}")
    return Object(f"{kind.name.lower()}-{isa.name}", (SOURCES / "format.cpp",), flags)


def glue(package: Path | None = None, version: str | None = None) -> Object:
    """The primitives, for an MLX: the imported one, or that in another directory."""
    package = package or Path(mx.__file__).parent
    version = version or str(vars(mx)["__version__"])
    library = next((package / "lib").glob("libmlx.*"), None)
    # No path to the library is recorded on Linux: the process has it already, by its name.
    libraries = ["-isystem", str(package / "include"), f"-L{package / 'lib'}", "-lmlx"]
    if sys.platform == "darwin":
        libraries += ["-undefined", "dynamic_lookup", f"-Wl,-rpath,{package / 'lib'}"]
    return Object(
        f"glue-{version}",
        (SOURCES / "glue.cpp",),
        (*_GLUE_FLAGS, *_COMMON_FLAGS),
        tuple(libraries),
        # Builds of a version under development differ, and share its name.
        needs=f"{version} {library.stat().st_size if library else 0}",
    )


def objects(types: frozenset[GGMLType], isa: ISA) -> dict[str, Object]:
    """All objects for some types: "core", "glue", and each type by its name.

    Raises:
        BuildError: a type has no kernels.
    """
    without = sorted(kind.name for kind in types & UNKNOWN)
    if without:
        raise BuildError(f"there are no kernels for {', '.join(without)}")
    return {"core": core(isa), "glue": glue()} | {
        kind.name: format_of(kind, isa) for kind in sorted(types)
    }


def _with_headers(sources: Sequence[Path]) -> set[Path]:
    """Files, and the headers next to them that they include, directly or not."""
    found: set[Path] = set()
    waiting = list(sources)
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():  # MLX's own, which its version stands for
            continue
        found.add(path)
        text = path.read_text(encoding="utf-8")
        waiting += [(path.parent / name).resolve() for name in _INCLUDE.findall(text)]
    return found


# ---- objects that a wheel brings -----------------------------------------------------------------


@cache
def shipped() -> tuple[Path, Mapping[str, Mapping[str, str]]] | None:
    """The folder of the wheel ``mlxrun-kernels`` and its manifest; None without the wheel."""
    try:
        folder = Path(str(import_module("mlxrun_kernels").__file__)).parent
    except ImportError:
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return folder, dict(manifest["objects"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_shipped(made: Object) -> Path | None:
    """The wheel's object, if it is intact and of these sources."""
    found = shipped()
    if found is None:
        return None
    folder, manifest = found
    entry = manifest.get(made.name, {})
    path = folder / f"{made.name}.so"
    try:
        intact = entry.get("key") == made.key and entry.get("sha256") == digest(path)
    except OSError:
        return None
    return path if intact else None


# ---- the compiler --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, and the first line of ``--version``."""

    command: tuple[str, ...]
    version: str

    @classmethod
    def find(cls) -> Compiler | None:
        """The one that ``CXX`` names, else the system's; None if there is none."""
        named = os.environ.get("CXX", "").strip()
        for candidate in [named] if named else ["c++", "g++", "clang++"]:
            command = tuple(shlex.split(candidate))
            if shutil.which(command[0]) is None:
                continue
            try:
                version = _run([*command, "--version"], _ASKING).splitlines()[0]
            except (BuildError, IndexError):
                continue
            return cls(command, version)
        return None

    @property
    def key(self) -> str:
        text = json.dumps([*self.command, self.version])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def compile(self, made: Object, out: Path) -> None:
        """Compile an object into a file; raises BuildError."""
        _run(made.command(self.command, out), COMPILING)
        if not out.is_file():
            raise BuildError(f"{self.command[0]} makes no object")


def _run(command: Sequence[str], seconds: float, given: str = "", **environment: str) -> str:
    """A program's output; raises BuildError. Its process group is killed after the timeout."""
    program = Path(command[0]).name
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C", **environment},
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{program} cannot be run: {error.strerror or error}") from error
    try:
        output, problems = process.communicate(given, timeout=seconds)
    except BaseException as error:
        _end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise BuildError(f"{program} took more than {seconds:.0f} s") from None
        raise
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise BuildError(f"{program} was ended by {name}")
    if process.returncode:
        raise BuildError(f"{program} fails: {_first_error(problems, process.returncode)}")
    return output


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a compiler's passes are processes of their own
    process.communicate()


def _first_error(problems: str, status: int) -> str:
    """The line of a compiler's output to report."""
    lines = [" ".join(line.split()) for line in problems.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    chosen = (telling or lines[-1:] or [f"status {status}"])[0]
    return chosen[:300]


# ---- building ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Paths of objects, and the objects still to be compiled, by the names of :func:`objects`."""

    paths: dict[str, Path]
    absent: dict[str, Object]


def find(wanted: Mapping[str, Object], cache: ObjectCache | None) -> Found:
    """Shipped and cached objects."""
    compiler = Compiler.find() if cache is not None else None
    paths, absent = {}, {}
    for name, made in wanted.items():
        path = find_shipped(made)
        if path is None and cache is not None:
            path = _find_cached(made, compiler, cache)
        if path is None:
            absent[name] = made
        else:
            paths[name] = path
    return Found(paths, absent)


def _find_cached(made: Object, compiler: Compiler | None, cache: ObjectCache) -> Path | None:
    if compiler is None:  # removed since it compiled
        return cache.matching(f"{made.name}-{made.key}-*")
    return cache.find(_cached_name(made, compiler))


def _cached_name(made: Object, compiler: Compiler) -> str:
    return f"{made.name}-{made.key}-{compiler.key}"


def build(wanted: Mapping[str, Object], cache: ObjectCache) -> tuple[dict[str, Path], list[str]]:
    """Find objects; compile and try those that are absent.

    Returns:
        Their paths, and the names of those that were compiled.

    Raises:
        BuildError: one cannot be compiled, or fails its test.
    """
    with cache.locked():  # another process may have compiled them meanwhile
        found = find(wanted, cache)
        if not found.absent:
            return found.paths, []
        compiler = Compiler.find()
        if compiler is None:
            named = os.environ.get("CXX", "").strip()
            raise BuildError(
                f"CXX names {named}, which is no compiler" if named else "no C++ compiler"
            )
        with cache.workshop() as workshop:
            made = dict(_compiled(found.absent, compiler, workshop))
            attempt(found.paths | made)
            paths = {
                name: cache.add(_cached_name(found.absent[name], compiler), path)
                for name, path in made.items()
            }
    for name, path in paths.items():
        cache.prune(f"{wanted[name].name}-*", path)
    return found.paths | paths, list(paths)


def _compiled(
    absent: Mapping[str, Object], compiler: Compiler, folder: Path
) -> Iterator[tuple[str, Path]]:
    def compiled(name: str) -> tuple[str, Path]:
        out = folder / f"{name}.so"
        compiler.compile(absent[name], out)
        return name, out

    order = sorted(absent, key=lambda name: name not in ("core", "glue"))  # the longest first
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if sys.platform == "linux" else None) as p:
        yield from p.map(compiled, order)


def attempt(paths: Mapping[str, Path]) -> None:
    """Test objects in a process of their own, which may crash.

    Raises:
        BuildError: results are wrong, or it crashed.
    """
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    given = json.dumps({name: str(path) for name, path in paths.items()})
    try:
        _run(
            [sys.executable, "-m", "mlxrun.kernels.attempt"],
            TRYING, given, PYTHONPATH=search, MLXRUN_BLAS="0",
        )  # fmt: skip
    except BuildError as error:
        raise BuildError(f"compiled kernels do not pass their test: {error}") from error
