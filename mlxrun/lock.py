"""One thread computes at a time, on streams that all threads share.

MLX crashes when threads build and evaluate graphs over the same arrays at the same time, so a
thread that computes with a model holds :data:`device_lock`.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar

import mlx.core as mx

from mlxrun.errors import ProcessError
from mlxrun.kernels.device import stream_devices

# Streams made in advance: the first computation of so many threads need not wait for a load.
RESERVE = 4


class _ThreadStreams:
    """A thread's own default streams, for outside the lock; another thread's after its end.

    MLX would make new ones for every thread and register them for good; whenever the buffer cache
    of a CPU is cleared or bounded, it waits for all of them, each in an OS thread of its own.
    """

    _free: ClassVar[list[list[mx.Stream]]] = []

    def __init__(self) -> None:
        try:
            self.streams = self._free.pop()
        except IndexError:
            with _both_locks():
                self.streams = _new_streams()

    @classmethod
    def reserve(cls, threads: int) -> None:
        """Make streams of so many threads in advance."""
        cls._free += [_new_streams() for _ in range(threads)]

    def __del__(self) -> None:
        self._free.append(self.streams)


def _new_streams() -> list[mx.Stream]:
    """One for each device, for any thread; to be made with both locks.

    MLX adds them to a table that it reads without a lock whenever it evaluates.
    """
    return [mx.new_thread_unsafe_stream(device) for device in stream_devices()]


class DeviceLock:
    """A reentrant lock whose owner computes on streams of the lock, not on those of its thread.

    By default MLX gives every Python thread streams of its own, and on a CPU each stream an OS
    thread that outlives the Python thread. Sharing streams is safe while one thread at a time uses
    them.

    Where no streams are in reserve, a thread's first entry waits for both locks: streams are made
    while no other thread computes or loads.

    Attributes:
        kept: whether one thread has it for good, so that all others wait forever.
    """

    _thread = threading.local()

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self.kept = False
        self._streams: list[mx.Stream] = []
        self._replaced: list[mx.Stream] = []

    def __enter__(self) -> None:
        self.prepare_thread()
        self._lock.acquire()
        try:
            self._depth += 1
            if self._depth == 1:
                self._set_streams()
        except BaseException:
            self._release()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    @property
    def used(self) -> bool:
        """Whether MLX may have threads because of it."""
        return bool(self._streams)

    def keep(self, timeout: float) -> None:
        """Take it, for good, if it is free within so many seconds."""
        self.kept = self._lock.acquire(timeout=timeout)

    def prepare_thread(self) -> None:
        """Give a thread streams of its own, before its first entry.

        It holds neither lock, and may wait for both.

        Raises:
            ProcessError: this process was forked from one in which MLX had computed.
        """
        check_process()
        if hasattr(self._thread, "own"):
            return
        if not self._streams:  # not before: importing this must leave a process free to fork
            with _both_locks():
                if not device_lock.used:
                    device_lock._streams, load_lock._streams = _new_streams(), _new_streams()
                    _ThreadStreams.reserve(RESERVE)
        main = threading.current_thread() is threading.main_thread()
        self._thread.own = None if main else _ThreadStreams()
        _set_default(self._thread.own.streams if self._thread.own else [])

    def _set_streams(self) -> None:
        self._replaced = [mx.default_stream(stream.device) for stream in self._streams]
        _set_default(self._streams)

    def _release(self) -> None:
        try:
            if self._depth == 1:
                _set_default(self._replaced)
        finally:
            self._depth -= 1
            self._lock.release()


def _set_default(streams: list[mx.Stream]) -> None:
    for stream in streams:
        mx.set_default_stream(stream)


device_lock = DeviceLock()
# Loading shares no arrays with what runs meanwhile, and may take long.
load_lock = DeviceLock()
_forked = False


@contextmanager
def _both_locks() -> Iterator[None]:
    """Hold both locks, without waiting for one while holding the other: that could deadlock."""
    first, second = load_lock._lock, device_lock._lock
    first.acquire()
    while not second.acquire(blocking=False):
        first.release()
        first, second = second, first
        first.acquire()
    try:
        yield
    finally:
        second.release()
        first.release()


def is_forked() -> bool:
    """Whether this process was forked from one in which MLX had computed."""
    return _forked


def check_process() -> None:
    """See to it that MLX can compute in this process.

    Raises:
        ProcessError: the process was forked from one in which MLX had computed.
    """
    if is_forked():
        raise ProcessError(
            "this process was forked from one that had already loaded a model, and MLX's threads "
            "are not there in the copy",
            hint='Start it with multiprocessing.get_context("spawn"), or load models only after '
            "the fork",
        )


def _after_fork() -> None:
    global _forked
    _forked = device_lock.used or load_lock.used


def _at_exit() -> None:
    """Stop threads that still compute: MLX aborts where one is at work while it is taken down."""
    if not is_forked():
        device_lock.keep(timeout=10)  # a step at most


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
