"""Time and memory of what one runtime does."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from mlxrun.bench.results import Run


class Meter:
    """Measures runs of one runtime; what others hold in this process meanwhile does not count.

    Args:
        weights: bytes that the runtime's model takes.
    """

    def __init__(self, weights: int) -> None:
        self._weights = weights
        self._others = 0

    def begin(self) -> None:
        """Note what is held before a run makes its caches."""
        mx.synchronize()
        mx.reset_peak_memory()
        self._others = mx.get_active_memory() - self._weights

    def time(self, work: Callable[[], int]) -> Run:
        """Time some work, which returns bytes of keys and values."""
        mx.synchronize()
        started = time.perf_counter()
        kv_bytes = work()
        run = self.read(time.perf_counter() - started, kv_bytes)
        mx.synchronize()
        return run

    def read(self, seconds: float, kv_bytes: int = 0) -> Run:
        """A run that took so long and ends now."""
        peak, active = mx.get_peak_memory() - self._others, mx.get_active_memory() - self._others
        return Run(seconds, kv_bytes, max(0, peak), max(0, active))
