"""Build the wheel ``mlxrun-kernels``: the CPU kernels, compiled, for machines without a compiler.

    python -m tools.kernels_wheel --out dist [--mlx PYTHON]...

Run it on a machine of each kind (Linux on x86-64 and on ARM, macOS). It compiles the core and all
types for every instruction set of this kind of processor, and the glue for the MLX that is
installed and for those of other interpreters. Nothing in the wheel depends on a version of Python.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from converters.gguf.types import GGMLType
from mlxrun.kernels import build, machine
from mlxrun.kernels.cache import digest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mlxrun_kernels"
INIT = '"""Compiled CPU kernels for mlxrun, which looks for them here."""\n'
# A file has one time, whenever it is made: the same objects are the same wheel.
EPOCH = (2026, 1, 1, 0, 0, 0)
METADATA = """\
Metadata-Version: 2.4
Name: mlxrun-kernels
Version: {version}
Summary: Compiled CPU kernels for mlxrun: products over GGUF blocks without a C++ compiler
License-Expression: MIT
License-File: LICENSE
Requires-Python: >=3.11

Compiled from the sources in mlxrun {version}. mlxrun finds them where their sources, its own and
MLX's version are the same: MLX {mlx}; {isas}.
"""


def wanted(mlx: Iterable[str]) -> list[build.Object]:
    """All objects of this kind of processor, and the glue of each MLX."""
    isas = [isa for isa in machine.ISAS if isa.machine in ("", machine.machine())]
    types = sorted(set(GGMLType) - build.UNKNOWN)
    made = [build.core(isa) for isa in isas]
    made += [build.format_of(kind, isa) for isa in isas for kind in types]
    made.append(build.glue())
    for python in mlx:
        said = subprocess.run(
            [python, "-c", "import mlx.core as mx; print(mx.__file__); print(mx.__version__)"],
            capture_output=True,
            text=True,
            check=True,
        )
        file, number = said.stdout.split()
        made.append(build.glue(Path(file).parent, number))
    return list({each.name: each for each in made}.values())


def compiled(objects: list[build.Object], folder: Path) -> dict[str, Path]:
    """Compile objects in parallel; paths by their names."""
    compiler = build.Compiler.find()
    if compiler is None:
        sys.exit("no C++ compiler")
    print(f"{len(objects)} objects with {compiler.version}")

    def one(made: build.Object) -> Path:
        out = folder / f"{made.name}.so"
        compiler.compile(made, out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = list(pool.map(one, objects))
    return {made.name: path for made, path in zip(objects, paths, strict=True)}


def check(objects: dict[str, Path]) -> None:
    """Try what this machine can run, with the MLX that is installed."""
    glue = objects[build.glue().name]
    for isa in machine.runnable_isas():
        types = {
            kind.name: objects[build.format_of(kind, isa).name]
            for kind in set(GGMLType) - build.UNKNOWN
        }
        build.attempt({"core": objects[build.core(isa).name], "glue": glue, **types})
        print(f"{isa.name}: all types pass their test")


def tag(paths: Iterable[Path]) -> str:
    """The wheel's: of the oldest C library, or macOS, that has all that the objects need."""
    if sys.platform == "darwin":
        release, _, kind = sysconfig.get_platform().removeprefix("macosx-").partition("-")
        return f"py3-none-macosx_{release.replace('.', '_')}_{kind}"
    newest = (2, 17)
    for path in paths:
        needed = re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes())
        newest = max([newest, *((int(major), int(minor)) for major, minor in needed)])
    return f"py3-none-manylinux_{newest[0]}_{newest[1]}_{platform.machine()}"


def write(objects: list[build.Object], paths: dict[str, Path], out: Path) -> Path:
    """Put objects into a wheel."""
    number = version("mlxrun")
    info = f"{PACKAGE}-{number}.dist-info"
    entries = {each.name: {"key": each.key, "sha256": digest(paths[each.name])} for each in objects}
    about = {
        "version": number,
        "mlx": ", ".join(e.name.removeprefix("glue-") for e in objects if "glue" in e.name),
        "isas": ", ".join(e.name.removeprefix("core-") for e in objects if "core" in e.name),
    }
    label = tag(paths.values())
    files = {
        f"{PACKAGE}/__init__.py": INIT.encode(),
        f"{PACKAGE}/manifest.json": json.dumps({"objects": entries}, indent=1).encode(),
        **{f"{PACKAGE}/{name}.so": path.read_bytes() for name, path in paths.items()},
        f"{info}/METADATA": METADATA.format(**about).encode(),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: tools.kernels_wheel\nRoot-Is-Purelib: false\n"
            f"Tag: {label}\n"
        ).encode(),
        f"{info}/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(),
    }
    record = "".join(
        f"{name},sha256={_hash(content)},{len(content)}\n" for name, content in files.items()
    )
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    out.mkdir(parents=True, exist_ok=True)
    wheel = out / f"{PACKAGE}-{number}-{label}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, content)
    return wheel


def _hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="the wheel's directory")
    parser.add_argument(
        "--mlx", action="append", default=[], metavar="PYTHON",
        help="an interpreter with another version of MLX; may be repeated",
    )  # fmt: skip
    options = parser.parse_args()
    objects = wanted(options.mlx)
    with tempfile.TemporaryDirectory() as folder:
        paths = compiled(objects, Path(folder))
        check(paths)
        wheel = write(objects, paths, options.out)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
