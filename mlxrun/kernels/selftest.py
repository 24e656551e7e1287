"""Block kernels against dequantize-and-multiply, and their times against the repacked form.

Results on a GPU are stored: its kernels are used, for the types whose products they speed up, once
all have passed there with these versions.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from converters.gguf.quants import CODECS
from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.affine import repack
from converters.quantize.layout import Layout, dense
from converters.quantize.policy import FIXED, Policy
from mlxrun import __version__
from mlxrun.files import remove, replacing
from mlxrun.kernels.cache import ObjectCache, place
from mlxrun.kernels.interface import BlockKernels, Matrix

__all__ = ["WORKS", "Passed", "Result", "Subject", "Way", "Work", "forget", "keep", "kept", "run"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

TYPES: Final = tuple(sorted(set(CODECS) | set(FIXED)))
_BLOCKS = 64  # different ones, of which matrices are made
_SIZES = (2**-7, 2**3)  # of their weights, root mean square
_RUNS, _CALLS, _SECONDS = 3, 64, 0.03  # of a measurement: calls of a run, about so long


@dataclass(frozen=True)
class Work:
    """A product with ``rows`` rows of x, or of as many tokens with ``used`` experts each."""

    name: str
    rows: int
    used: int = 0


EXPERTS: Final = 8
WORKS: Final = (
    Work("1 row", 1),
    Work("8 rows", 8),
    Work("128 rows", 128),
    Work("experts, 1 row", 1, 2),
    Work("experts, 128 rows", 128, 2),
)


@dataclass(frozen=True)
class Way:
    """A precision of activations.

    Attributes:
        planes: of kernels that quantize activations.
        allowed: norm of the error, relative to that of the result.
    """

    name: str
    dtype: mx.Dtype
    planes: int
    allowed: float


@dataclass(frozen=True)
class Subject:
    """Kernels on a device.

    Attributes:
        kernels: by name; ``blocks``, and variants of them.
        ways: the first is timed.
        policy: of the repacked form.
    """

    device: str
    kernels: Mapping[str, BlockKernels]
    ways: tuple[Way, ...]
    policy: Policy


CPU_WAYS: Final = (
    Way("near", mx.float32, 2, 1e-4),
    Way("fast", mx.float32, 1, 10**-1.5),
    Way("exact", mx.float32, 3, 1e-6),
)
GPU_WAYS: Final = (
    Way("float16", mx.float16, 0, 2e-3),
    Way("bfloat16", mx.bfloat16, 0, 1e-2),
    Way("float32", mx.float32, 0, 2e-6),
)


@dataclass(frozen=True)
class Result:
    """Of one type.

    Attributes:
        equal: rows are bit-equal to the converter's.
        errors: the worst of all works, by way.
        wrong: ways whose error is too large, or NaN.
        seconds: by work, then by the kernels' names and ``repacked``.
        problem: an exception's message.
    """

    kind: GGMLType
    equal: bool
    errors: dict[str, float]
    wrong: tuple[str, ...]
    seconds: dict[str, dict[str, float]]
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.equal and not self.wrong and self.problem is None

    def fastest(self, work: str) -> str:
        """The name of the fastest kernels, or ``repacked``."""
        return min(self.seconds[work], key=self.seconds[work].__getitem__)


def run(
    subject: Subject,
    kinds: Iterable[GGMLType] = TYPES,
    *,
    works: Collection[Work] = WORKS,
    rows: int = 4096,
    columns: int = 4096,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Result]:
    """Test types one after the other, with matrices of (rows, columns); columns % 256 == 0."""
    kinds, results = list(kinds), []
    for done, kind in enumerate(kinds):
        progress(done, len(kinds))
        try:
            results.append(_tested(subject, kind, works, rows, columns))
        except (RuntimeError, ValueError) as error:  # as MLX reports a kernel that cannot run
            problem = " ".join(str(error).split())[:500]
            results.append(Result(kind, False, {}, (), {}, problem))
        mx.clear_cache()
    return results


def _tested(
    subject: Subject, kind: GGMLType, works: Collection[Work], rows: int, columns: int
) -> Result:
    matrix, values = random_matrix(kind, (rows, columns))
    stack, stacked = random_matrix(kind, (EXPERTS, max(1, rows // 4), columns))
    equal = all(
        np.array_equal(np.array(each.dequantize(one)), expected)
        for each in subject.kernels.values()
        for one, expected in ((matrix, values), (stack, stacked))
    )
    errors: dict[str, float] = {}
    seconds: dict[str, dict[str, float]] = {}
    for work in works:
        one, expected = (stack, stacked) if work.used else (matrix, values)
        for way in subject.ways:
            inputs, wanted = _inputs(work, way.dtype, expected)
            for kernels in subject.kernels.values():
                error = _error(_product(kernels, one, work, way)(*inputs), wanted)
                errors[way.name] = float(np.maximum(errors.get(way.name, 0.0), error))  # keeps NaN
        way = subject.ways[0]
        inputs, _ = _inputs(work, way.dtype, expected)
        times = {
            name: _time(_product(kernels, one, work, way), inputs)
            for name, kernels in subject.kernels.items()
        }
        times["repacked"] = _time(_repacked(subject.policy, kind, expected, way.dtype), inputs)
        seconds[work.name] = times
    allowed = {way.name: way.allowed for way in subject.ways}
    wrong = tuple(name for name, error in errors.items() if not error <= allowed[name])
    return Result(kind, equal, errors, wrong, seconds)


def random_matrix(kind: GGMLType, shape: tuple[int, ...]) -> tuple[Matrix, Floats]:
    """A matrix or stack of random blocks of ordinary size, and its weights by the converter."""
    random = np.random.default_rng(int(kind))
    elements, size = BLOCKS[kind]
    found: list[Bytes] = []
    while sum(map(len, found)) < _BLOCKS:
        raw = random.integers(0, 256, (1024, size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            magnitude = np.sqrt(np.square(_values(kind, raw).astype(np.float64)).mean(axis=1))
            found.append(raw[(magnitude > _SIZES[0]) & (magnitude < _SIZES[1])])
    blocks = np.concatenate(found)
    count = int(np.prod(shape)) // elements
    chosen = random.integers(0, len(blocks), count)
    values = _values(kind, blocks)[chosen].reshape(shape)
    packed = blocks[chosen].reshape(*shape[:-1], -1)
    return Matrix(mx.array(packed), kind, shape[-1]), values


def _values(kind: GGMLType, blocks: Bytes) -> Floats:
    """Weights of blocks, (n, elements), by the converter."""
    if kind in FIXED:
        return repack(blocks, kind, dense("float32")).arrays["weight"].astype(np.float32)
    return CODECS[kind].decode(blocks).values()


def _inputs(work: Work, dtype: mx.Dtype, values: Floats) -> tuple[list[mx.array], npt.NDArray[Any]]:
    """A product's inputs, and its result for some rows in float64."""
    random = np.random.default_rng(work.rows)
    x = mx.array(random.standard_normal((work.rows, values.shape[-1])).astype(np.float32))
    x = x.astype(dtype)
    rows = np.linspace(0, work.rows - 1, min(work.rows, 4)).astype(int)  # that are compared
    plain = np.array(x.astype(mx.float32)).astype(np.float64)[rows]
    if not work.used:
        return [x], plain @ values.astype(np.float64).T
    chosen = random.integers(0, len(values), (work.rows, work.used))
    wanted = [
        [values[expert].astype(np.float64) @ row for expert in experts]
        for row, experts in zip(plain, chosen[rows], strict=True)
    ]
    return [x[:, None, None, :], mx.array(chosen.astype(np.uint32))], np.array(wanted)


def _product(
    kernels: BlockKernels, matrix: Matrix, work: Work, way: Way
) -> Callable[..., mx.array]:
    make = kernels.experts if work.used else kernels.product
    product = make([matrix], way.planes)
    return lambda *inputs: product(*inputs)[0]


def _error(out: mx.array, wanted: npt.NDArray[Any]) -> float:
    rows = np.linspace(0, len(out) - 1, len(wanted)).astype(int)
    got = np.array(out.astype(mx.float32)).astype(np.float64)[rows].reshape(wanted.shape)
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def _repacked(
    policy: Policy, kind: GGMLType, values: Floats, dtype: mx.Dtype
) -> Callable[..., mx.array]:
    """A product in the form that a policy tries first for a type."""
    layout: Layout = next(policy.candidates(kind, module=True))
    plain = mx.array(values).astype(dtype)
    if not layout.quantized:
        weight = plain.swapaxes(-1, -2)
        mx.eval(weight)
        return lambda x, *chosen: (
            mx.gather_mm(x, weight, rhs_indices=chosen[0]) if chosen else x @ weight
        )
    how: Any = {"group_size": layout.group_size, "bits": layout.bits, "mode": layout.mode}
    packed = mx.quantize(plain, **how)
    return lambda x, *chosen: (
        mx.gather_qmm(x, *packed, rhs_indices=chosen[0], transpose=True, **how)
        if chosen
        else mx.quantized_matmul(x, *packed, transpose=True, **how)
    )


def _time(product: Callable[..., mx.array], inputs: list[mx.array]) -> float:
    """Seconds of a call, in the fastest of some runs of many calls."""
    mx.eval(product(*inputs))
    started = time.perf_counter()
    mx.eval(product(*inputs))
    calls = max(1, min(_CALLS, int(_SECONDS / (time.perf_counter() - started))))
    best = float("inf")
    for _ in range(_RUNS):
        started = time.perf_counter()
        mx.eval([product(*inputs) for _ in range(calls)])
        best = min(best, (time.perf_counter() - started) / calls)
    return best


@dataclass(frozen=True)
class Passed:
    """Stored results of a device on which all kernels have passed.

    Attributes:
        fastest: by type's name, then by work's: one of the kernels, or ``repacked``.
    """

    device: str
    date: str
    fastest: dict[str, dict[str, str]]

    def served(self) -> frozenset[GGMLType]:
        """Types whose product of one row, which makes each token, the kernels make faster."""
        return frozenset(
            GGMLType[name]
            for name, works in self.fastest.items()
            if works[WORKS[0].name] != "repacked"
        )

    def fused(self) -> frozenset[GGMLType]:
        """Types whose products of many rows are faster without expanding the matrix."""
        return frozenset(
            GGMLType[name]
            for name, works in self.fastest.items()
            if works[WORKS[2].name] == "blocks"
        )


def _path(folder: Path | None) -> Path:
    return (folder or place()) / "selftest.json"


def _versions(device: str) -> dict[str, str]:
    versions = {"mlxrun": __version__, "mlx": str(vars(mx)["__version__"])}
    return {"device": device, "system": platform.release(), **versions}


def keep(device: str, results: Collection[Result], folder: Path | None = None) -> Passed:
    """Store the results of a device for this user.

    Args:
        folder: default: the kernels' cache.

    Raises:
        KernelsError: other users could write to the folder.
        OSError: it cannot be written.
        ValueError: a kernel has not passed.
    """
    failed = [result.kind.name for result in results if not result.passed]
    if failed:
        raise ValueError(f"kernels have not passed: {', '.join(failed)}")
    date = time.strftime("%Y-%m-%d")
    fastest = {r.kind.name: {work: r.fastest(work) for work in r.seconds} for r in results}
    path = _path(folder)
    ObjectCache(path.parent)
    with replacing(path) as partial:
        record = {"for": _versions(device), "date": date, "fastest": fastest}
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Passed(device, date, fastest)


def forget(folder: Path | None = None) -> None:
    """Remove stored results."""
    with suppress(OSError):
        remove(_path(folder))


def kept(device: str, folder: Path | None = None) -> Passed | None:
    """Stored results of a device with these versions, if they are the user's own; else None."""
    path = _path(folder)
    try:
        if path.stat().st_uid != os.geteuid() or path.stat().st_mode & 0o022:
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["for"] != _versions(device):
            return None
        passed = Passed(device, str(record["date"]), dict(record["fastest"]))
        passed.served(), passed.fused()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return passed
