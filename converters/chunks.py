"""Rows worked on in chunks by a pool of threads (numpy releases the interpreter lock).

Whoever makes a chunk copies it to its place while a core's cache still holds it, and the arrays of
a whole tensor are touched once. Knows nothing of what is made.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from converters.forms import Arrays, Error, Packed

Work = Callable[[slice], Packed]
Map = Callable[[Callable[[slice], Error], list[slice]], Iterator[Error]]


# Just below what glibc takes at most, 32 MiB with its own bookkeeping.
_KEPT_BLOCK = (1 << 25) - (1 << 16)


# More would mostly wait for the interpreter's lock, each with some 20 MB of its own.
_MOST_THREADS = 8


def workers() -> ThreadPoolExecutor:
    """Threads that share the chunks, one for each core up to eight.

    glibc is made to keep what they free for the next chunk, instead of asking the system each time:
    blocks that are freed raise the size up to which it keeps them, and one that is never touched
    will do (mallopt(3), "M_MMAP_THRESHOLD"). Other systems' allocators take no notice.
    """
    np.empty(_KEPT_BLOCK, np.uint8)
    return ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS))


def cut(rows: int, columns: int, weights: int) -> list[slice]:
    """Slices of at most ``weights`` weights, and of at least one row; at least one slice."""
    step = max(1, weights // max(1, columns))
    return [slice(a, min(a + step, rows)) for a in range(0, rows, step)] or [slice(0, 0)]


def gather(work: Work, parts: list[slice], over: Map) -> tuple[Arrays, Error]:
    """What ``work`` makes of each part as whole arrays (rows, ...), and the common error.

    Args:
        over: calls a function for each part, in any order, and returns its results in order.
    """
    arrays: Arrays = {}
    making = threading.Lock()

    def place(part: slice) -> Error:
        packed = work(part)
        for name, chunk in packed.arrays.items():
            if len(parts) == 1:
                arrays[name] = chunk
                continue
            with making:
                if name not in arrays:
                    arrays[name] = np.empty((parts[-1].stop, chunk.shape[1]), chunk.dtype)
            arrays[name][part] = chunk
        return packed.error

    error = Error()
    for each in over(place, parts):
        error.merge(each)
    return arrays, error
