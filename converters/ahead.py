"""Work on a few things ahead of the one whose turn it is. Knows nothing of what they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
# Two in work, which wait for threads of their own most of the time, and one that is done.
_IN_WORK, _IN_HAND = 2, 3


def ahead(
    tasks: Iterable[Callable[[], T]], sizes: Sequence[int], room: int
) -> Generator[T, None, None]:
    """Results in order; the next ones are begun early, a few and as long as ``room`` holds them.

    Args:
        tasks: taken one by one in the caller's thread, run in others.
        sizes: of each, in the units of ``room``. The one in turn is begun whatever its size.
    """
    begun: deque[tuple[int, Future[T]]] = deque()
    coming = zip(sizes, tasks, strict=True)
    following = next(coming, None)

    def fits(size: int) -> bool:
        return len(begun) < _IN_HAND and sum(each for each, _ in begun) + size <= room

    with ThreadPoolExecutor(_IN_WORK) as pool:
        try:
            while begun or following:
                while following and (not begun or fits(following[0])):
                    begun.append((following[0], pool.submit(following[1])))
                    following = next(coming, None)
                yield begun.popleft()[1].result()
        finally:
            for _, future in begun:
                future.cancel()
