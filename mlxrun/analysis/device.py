"""Bandwidth and throughput of this device, measured.

Arrays several times as large as the processor's caches are copied and read, large matrices
multiplied. The limit is the best of several runs.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxrun.analysis.costs import Roof
from mlxrun.kernels.device import device
from mlxrun.memory.device import cores, room

# Bytes of the arrays, unless caches are larger or memory is short.
CPU_BYTES, GPU_BYTES = 256 << 20, 1 << 30
# The part of the free memory that both of them may take.
SHARE = 1 / 8
# Sides of the square matrices that are multiplied, and how many products are queued at once.
CPU_SIDE, GPU_SIDE, GPU_PRODUCTS = 2048, 4096, 4
RUNS = 7
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Rate:
    """Best and median of several runs, in bytes/s or FLOPs/s."""

    name: str
    best: float
    median: float


@dataclass(frozen=True)
class Device:
    """Measurements of a device."""

    moved: int  # bytes of the array that was copied and read
    cached: int  # bytes of the last-level cache; 0 where unknown
    bandwidth: tuple[Rate, ...]  # by kind of access
    throughput: tuple[Rate, ...]  # of matrix products, by dtype

    def roof(self, dtype: str) -> Roof:
        """Best bandwidth, and best throughput of that dtype, packed matrices included."""
        same = [rate.best for rate in self.throughput if rate.name.startswith(dtype)]
        most = max(same or [rate.best for rate in self.throughput])
        return Roof(max(rate.best for rate in self.bandwidth), most)


def measure_device(*, nbytes: int | None = None, side: int | None = None) -> Device:
    """Measure MLX's default device; takes some seconds.

    Args:
        nbytes: of the array; by default well beyond the caches.
        side: of the square matrices.
    """
    measured = device()
    cached = 0 if measured.own_memory else last_cache()
    moved = nbytes or _bytes_to_move(own_memory=measured.own_memory, cached=cached)
    bandwidth = _moved(moved)
    if not measured.own_memory:
        bandwidth.insert(0, _copied(moved))
    if measured.half_precision:
        products = _products(side or GPU_SIDE)
    else:
        products = [_product(side or CPU_SIDE, mx.float32)]
    return Device(moved, cached, tuple(bandwidth), tuple(products))


def last_cache() -> int:
    """Bytes of the last-level cache of the first core; 0 where unknown."""
    texts = (file.read_text().strip() for file in _CACHES.glob("index*/size"))
    sizes = (int(text[:-1]) << 10 for text in texts if re.fullmatch(r"\d+K", text))
    return max(sizes, default=0)


def _bytes_to_move(*, own_memory: bool, cached: int) -> int:
    nbytes = GPU_BYTES if own_memory else max(CPU_BYTES, 4 * cached)
    free = room()
    return min(nbytes, int(SHARE * free)) if free else nbytes


def _timed(name: str, amount: float, work: Callable[[], object]) -> Rate:
    """The rate of some work on ``amount`` bytes or FLOPs, after one run to warm up."""
    work()
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return Rate(name, amount / min(seconds), amount / statistics.median(seconds))


def _copied(nbytes: int) -> Rate:
    """A copy by all cores at once, in parts: each byte is read and written."""
    source, target = np.ones(nbytes // 4, np.float32), np.ones(nbytes // 4, np.float32)
    parts = list(zip(*(np.array_split(a, cores()) for a in (target, source)), strict=True))

    def work() -> None:
        threads = [threading.Thread(target=np.copyto, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return _timed("copy, all cores", 2 * source.nbytes, work)


def _moved(nbytes: int) -> list[Rate]:
    """MLX's negation of an array, and its product with a vector."""
    columns = 4096
    matrix = mx.ones((max(1, nbytes // 4 // columns), columns), mx.float32)
    vector = mx.ones((1, columns), mx.float32)
    mx.eval(matrix, vector)
    return [
        _timed("copy, MLX", 2 * matrix.nbytes, lambda: mx.eval(-matrix)),
        _timed("read, MLX", matrix.nbytes, lambda: mx.eval(vector @ matrix.T)),
    ]


def _products(side: int) -> list[Rate]:
    half = [_product(side, dtype, GPU_PRODUCTS) for dtype in (mx.float16, mx.bfloat16)]
    return [*half, _packed_product(side, GPU_PRODUCTS), _product(side, mx.float32, GPU_PRODUCTS)]


def _product(side: int, dtype: mx.Dtype, count: int = 1) -> Rate:
    a, b = (mx.ones((side, side), dtype) for _ in range(2))
    mx.eval(a, b)
    name = str(dtype).removeprefix("mlx.core.")
    return _timed(name, 2 * side**3 * count, lambda: mx.eval([a @ b for _ in range(count)]))


def _packed_product(side: int, count: int) -> Rate:
    x = mx.ones((side, side), mx.float16)
    packed = mx.quantize(mx.random.normal((side, side)).astype(mx.float16), 64, 4)
    mx.eval(x, packed)

    def work() -> None:
        mx.eval([mx.quantized_matmul(x, *packed, group_size=64, bits=4) for _ in range(count)])

    return _timed("float16 x 4 bits", 2 * side**3 * count, work)
