"""One thread computes at a time, and what must not be interrupted is not.

MLX crashes when threads build and evaluate graphs over the same arrays at the same time, so whoever
computes with a model holds :data:`COMPUTING` meanwhile.
"""

from __future__ import annotations

import atexit
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

COMPUTING = threading.RLock()
# At the end of the process threads that still compute stop where they are: MLX aborts where one is
# at work while it is taken down. Nobody holds the lock for longer than a step.
atexit.register(COMPUTING.acquire, timeout=10)


def one_at_a_time(items: Generator[T, None, None]) -> Iterator[T]:
    """The same items; while one is computed, other threads wait."""
    try:
        while True:
            with COMPUTING:
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
    finally:
        with COMPUTING:
            items.close()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block, also for the programs that it starts.

    MLX runs a compiler on a CPU, which a terminal would interrupt together with us.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
