"""How fast GGUF files are converted and loaded here, next to a copy of the same file by `cp`.

    python -m examples.conversion_speed types                # a file of each type, by policy
    python -m examples.conversion_speed model model.gguf     # one file: cp, conversions, loads

Each figure is that of the best of several runs, which take turns with those of `cp`. Copies and
conversions both end when the disk has all of it; both read from the file cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.convert import convert
from converters.gguf.source import GGUFSource
from converters.quantize.policy import POLICIES

from .make_random_gguf import Kind, Shape, write

# Matrices of TinyLlama's size: 175 million weights.
SHAPE = Shape(3, 2048, 5632, 32, 4, 8000)
TYPES = ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "F16", "BF16", "MXFP4")
LOAD = """
import sys, time
started = time.perf_counter()
import mlxrun
llm = mlxrun.load(sys.argv[1], policy=sys.argv[2] if len(sys.argv) > 2 else None)
print(time.perf_counter() - started)
"""


@contextmanager
def scratch(source: Path) -> Iterator[Path]:
    """A directory on the same disk as a file, for as long as it is needed."""
    with tempfile.TemporaryDirectory(dir=source.parent, prefix="conversion-speed-") as folder:
        yield Path(folder)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def seconds_of_cp(source: Path) -> float:
    """Of a copy, until the disk has it."""

    def copy() -> None:
        subprocess.run(["cp", source, folder / "copy"], check=True)
        with (folder / "copy").open("rb+") as file:
            os.fsync(file.fileno())

    with scratch(source) as folder:
        return seconds(copy)


def seconds_of_conversion(source: Path, policy: str = "near") -> tuple[float, float]:
    """Of a conversion, until the disk has it: by the clock, and of the cores' own time."""
    with scratch(source) as folder:
        worked = time.process_time()
        clock = seconds(lambda: convert(GGUFSource(source, policy), folder / "out"))
        return clock, time.process_time() - worked


def measure(source: Path, policies: tuple[str, ...], runs: int) -> None:
    """Print a line: megabytes of the file a second, copied and converted."""
    copied, best = float("inf"), dict.fromkeys(policies, (float("inf"), float("inf")))
    for _ in range(runs):
        copied = min(copied, seconds_of_cp(source))
        for policy in policies:
            run = seconds_of_conversion(source, policy)
            best[policy] = min(best[policy][0], run[0]), min(best[policy][1], run[1])
    size = source.stat().st_size / 1e6
    cells = [f"{size / clock:6.0f} {size / cores:6.0f}" for clock, cores in best.values()]
    print(f"{source.stem:12} {size:7.0f} {size / copied:6.0f} " + " ".join(cells), flush=True)


def heading() -> None:
    columns = " ".join(f"{policy:>13}" for policy in POLICIES)
    print(f"{'file':12} {'MB':>7} {'cp':>6} {columns}   MB/s by the clock, and per core's second")


def measure_types(folder: Path, kinds: list[str], runs: int) -> None:
    heading()
    for name in kinds:
        path = folder / f"{name}.gguf"
        write(SHAPE, str(path), kinds=(Kind[name], Kind[name]))
        measure(path, POLICIES, runs)
        path.unlink()


def measure_loads(source: Path, runs: int) -> None:
    """Seconds that a process of its own needs to load a file, and to load its conversion."""
    with scratch(source) as folder:
        convert(GGUFSource(source), folder / "out")
        subjects = {"GGUF": [source], "directory": [folder / "out"], "GGUF, near": [source, "near"]}
        best = dict.fromkeys(subjects, float("inf"))
        for _ in range(runs):
            for name, arguments in subjects.items():
                command = [sys.executable, "-c", LOAD, *map(str, arguments)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                best[name] = min(best[name], float(done.stdout))
    print("load: " + ", ".join(f"{name} {took:.2f} s" for name, took in best.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["types", "model"])
    parser.add_argument("names", nargs="*", help="types, or the GGUF file")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    if asked.what == "model":
        heading()
        measure(Path(asked.names[0]), POLICIES, asked.runs)
        measure_loads(Path(asked.names[0]), asked.runs)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        measure_types(folder, asked.names or list(TYPES), asked.runs)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
