"""Work on a few things ahead of the one whose turn it is. Knows nothing of what they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
# Each waits for threads of its own most of the time.
_AT_ONCE = 2


def ahead(tasks: Iterable[Callable[[], T]], sizes: Sequence[int], room: int) -> Iterator[T]:
    """Results in order; those after the one in turn are begun as long as ``room`` holds them.

    Args:
        tasks: taken one by one in the caller's thread, run in others.
        sizes: of each, in the units of ``room``. The one in turn is begun whatever its size.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    coming = zip(sizes, tasks, strict=True)
    following = next(coming, None)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            while waiting or following:
                while following and (
                    not waiting or sum(size for size, _ in waiting) + following[0] <= room
                ):
                    waiting.append((following[0], pool.submit(following[1])))
                    following = next(coming, None)
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()
