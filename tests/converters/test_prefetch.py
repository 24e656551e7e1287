"""Working ahead: order, room, failures and giving up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE

from converters.convert import prefetch


@given(st.lists(st.integers(0, 9)), st.integers(0, 20))
def test_results_are_in_order_whatever_fits(sizes: list[int], room: int) -> None:
    tasks = [partial(int, i) for i in range(len(sizes))]
    assert list(prefetch(tasks, sizes, room)) == list(range(len(sizes)))


class Counted:
    """Tasks of size 10 that tell how many of them were taken up."""

    def __init__(self, fail_at: int = -1) -> None:
        self.taken = 0
        self.fail_at = fail_at

    def tasks(self, count: int) -> Iterator[Callable[[], int]]:
        for i in range(count):
            self.taken += 1
            yield partial(self.work, i)

    def work(self, i: int) -> int:
        if i == self.fail_at:
            raise ValueError(f"task {i}")
        return i


@pytest.mark.parametrize(("room", "begun"), [(0, 1), (19, 1), (20, 2), (10**9, 3)])
def test_no_more_is_begun_than_there_is_room_for(room: int, begun: int) -> None:
    counted = Counted()
    results = prefetch(counted.tasks(50), [10] * 50, room)
    for turn in range(5):
        assert next(results) == turn
        assert counted.taken <= turn + begun + 1  # one is looked at for its size
    results.close()


def test_a_failure_is_raised_in_its_turn() -> None:
    results = prefetch(Counted(fail_at=2).tasks(9), [1] * 9, 100)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="task 2"):
        next(results)


def test_tasks_run_while_the_current_one_does() -> None:
    second = threading.Event()

    def first() -> bool:
        return second.wait(PATIENCE)

    def other() -> bool:
        second.set()
        return True

    assert list(prefetch([first, other], [1, 1], 2)) == [True, True]


def test_no_task_starts_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both threads are at work when the next task cannot even be made; a third task waits."""
    begun: list[int] = []
    busy, given_up = threading.Barrier(3), threading.Event()

    class Pool(ThreadPoolExecutor):
        """Lets its threads finish when their results are no longer needed."""

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            given_up.set()
            super().shutdown(wait=wait)

    def work(number: int) -> None:
        begun.append(number)
        busy.wait(PATIENCE)
        given_up.wait(PATIENCE)

    def tasks() -> Iterator[Callable[[], None]]:
        yield from (partial(work, number) for number in range(3))
        busy.wait(PATIENCE)
        raise ValueError("no more")

    monkeypatch.setattr("converters.convert.ThreadPoolExecutor", Pool)
    with pytest.raises(ValueError, match="no more"):
        next(prefetch(tasks(), [1] * 4, 100))
    assert sorted(begun) == [0, 1]
