"""Time and memory of what one runtime does.

Memory is MLX's, and its average that of looks at it every few milliseconds, from a thread of its
own: a pass takes what it takes in the middle, where nobody else can look.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Self

import mlx.core as mx

from mlxrun.bench.results import Run

# Seconds between two looks at memory: a thousandth of a core's time.
_PAUSE = 0.01


class Meter:
    """Measures runs of one runtime; what others hold in this process meanwhile does not count.

    Args:
        weights: bytes that the runtime's model takes, mapped ones among them.
    """

    def __init__(self, weights: int) -> None:
        self._weights = weights
        self._others = 0

    def begin(self) -> None:
        """Note what is held before a run makes its caches, without what nobody holds any more."""
        gc.collect()
        mx.synchronize()
        mx.reset_peak_memory()
        self._others = mx.get_active_memory() - self._weights

    def time(self, work: Callable[[], int]) -> Run:
        """Time some work, which returns bytes of keys and values."""
        mx.synchronize()
        with _Looks() as looks:
            started = time.perf_counter()
            kv_bytes = work()
            seconds = time.perf_counter() - started
        peak, average = mx.get_peak_memory() - self._others, looks.average - self._others
        mx.synchronize()
        return Run(seconds, kv_bytes, max(0, peak), max(0, average))


class _Looks:
    """Looks at what MLX holds, at the beginning, at the end and in between."""

    def __enter__(self) -> Self:
        self._sum, self._count, self._over = 0, 0, Event()
        self._look()
        self._thread = Thread(target=self._watch, name="mlxrun-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    @property
    def average(self) -> int:
        """Bytes."""
        return self._sum // self._count

    def _watch(self) -> None:
        while not self._over.wait(_PAUSE):
            self._look()

    def _look(self) -> None:
        self._sum += mx.get_active_memory()
        self._count += 1
