"""Make a skeleton's logits with llama.cpp, check them, and compare mlxrun with them.

usage: python -m tests.conformance.make NAME ... [--check] [--sensitivity]
       python -m tests.conformance.make NAME --from-peer FILE.json

llama.cpp runs in the interpreter that MLXRUN_LLAMA_PYTHON names (one that has llama-cpp-python);
by default in this one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from . import skeleton as skeletons
from .skeleton import LOGITS, SKELETONS, Skeleton, SkeletonError

#: Lines of llama.cpp's log that say what is wrong.
_TELLING = re.compile(r"error loading|ASSERT|what\(\)|Error: llama_decode")
SANE = 1e-3, 1e3


class JudgeError(RuntimeError):
    """llama.cpp does not run a file; the message is its own."""


def judge(path: Path, tokens: list[int]) -> np.ndarray:
    """llama.cpp's logits (T, V), float32.

    Raises:
        JudgeError: with what llama.cpp says, if it does not run the file.
    """
    python = os.environ.get("MLXRUN_LLAMA_PYTHON", sys.executable)
    out = path.with_suffix(".npy")
    script = Path(__file__).with_name("judge.py")
    command = [python, str(script), str(path), str(out), *map(str, tokens)]
    # A backtrace would be of no use, and what prints it may outlive the judge and hang it.
    quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env=quiet
    )
    if run.returncode:
        if "No module named 'llama_cpp'" in run.stderr:
            sys.exit(f"{python} has no llama-cpp-python: set MLXRUN_LLAMA_PYTHON")
        lines = (run.stdout + run.stderr).splitlines()
        telling = [line for line in lines if _TELLING.search(line)] or lines[-8:]
        raise JudgeError("\n".join(telling) or f"died with status {run.returncode}")
    return np.load(out)


def make(skeleton: Skeleton, folder: Path) -> None:
    """Store llama.cpp's logits of a skeleton, and say what is odd about them."""
    path = skeleton.write(folder / f"{skeleton.name}.gguf")
    logits = judge(path, skeleton.token_ids())
    size = path.stat().st_size / 1e6
    spread = logits.std()
    print(f"{skeleton.name}: {size:.1f} MB, logits {logits.shape}, standard deviation {spread:.3g}")
    if not SANE[0] < spread < SANE[1] or not np.isfinite(logits).all():
        print("  WARNING: these logits prove little; change the values")
    np.savez_compressed(
        LOGITS / f"{skeleton.name}.npz", logits=logits, skeleton=np.array(skeleton.digest())
    )


def check(skeleton: Skeleton, folder: Path) -> bool:
    """Compare mlxrun with the stored logits; print how near it is. Returns whether near enough."""
    from mlxrun.errors import MlxrunError

    from .measure import SAME, left_out, load, measure, on_cpu

    path = skeleton.write(folder / f"{skeleton.name}.gguf")
    try:
        with on_cpu():
            loaded = load(path)
            found = measure(loaded, skeleton.token_ids(), skeletons.expected(skeleton))
    except MlxrunError as error:
        print(f"  mlxrun: {error}")
        return False
    for line in left_out(loaded):
        print(f"  left out: {line}")
    print("  NMSE: " + ", ".join(f"{way} {value:.1e}" for way, value in found.items()))
    return max(found.values()) <= SAME and not left_out(loaded)


def sensitivity(skeleton: Skeleton, folder: Path) -> None:
    """Name the tensors that llama.cpp's logits do not depend on: they prove nothing."""
    expected = skeletons.expected(skeleton)
    for pattern in skeleton.tensors:
        path = skeleton.write(folder / "zeroed.gguf", zero=pattern)
        if np.array_equal(judge(path, skeleton.token_ids()), expected):
            print(f"  WARNING: {pattern} makes no difference")


def main() -> int:
    """The command; returns how many skeletons failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--check", action="store_true", help="compare mlxrun as well")
    parser.add_argument("--only-check", action="store_true", help="keep the logits there are")
    parser.add_argument("--sensitivity", action="store_true", help="which tensors do nothing?")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the GGUF files there")
    parser.add_argument("--from-peer", type=Path, metavar="FILE", help="draft NAME.json from it")
    args = parser.parse_args()
    if args.from_peer:
        from .peer import draft

        (name,) = args.names
        (SKELETONS / f"{name}.json").write_text(draft(args.from_peer))
        print(f"wrote {SKELETONS / name}.json: a draft, to be cut down")
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.names or skeletons.names():
            failed += not _one(name, folder, args)
    return failed


def _one(name: str, folder: Path, args: argparse.Namespace) -> bool:
    try:
        skeleton = skeletons.read(name)
        if args.only_check:
            print(f"{name}:")
        else:
            make(skeleton, folder)
        if args.sensitivity:
            sensitivity(skeleton, folder)
        if args.check or args.only_check:
            return check(skeleton, folder)
    except (SkeletonError, JudgeError) as error:
        print(f"{name}: {error}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
