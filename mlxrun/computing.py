"""One thread computes at a time.

MLX crashes when threads build and evaluate graphs over the same arrays at the same time, so whoever
computes with a model holds :data:`COMPUTING` meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

COMPUTING = threading.RLock()


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
