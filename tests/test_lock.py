"""Threads and processes: none is left behind by a thread that ends, a forked process is refused."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm_models import CONFIGS, save, stock
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun
from mlxrun.errors import ProcessError
from mlxrun.lock import _ThreadStreams, device_lock, load_lock

TASKS = Path("/proc/self/task")
linux = pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(layers=1).write(tmp_path_factory.mktemp("computing") / "m.gguf")


@pytest.fixture(scope="module")
def llm(path: Path) -> mlxrun.LLM:
    return mlxrun.load(path)


def in_threads(count: int, work: Callable[[], Any], at_once: int = 1) -> None:
    for _ in range(count // at_once):
        threads = [threading.Thread(target=work) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def tasks() -> int:
    """Threads of this process, with one for each stream that MLX knows."""
    mx.set_cache_limit(mx.set_cache_limit(0))  # waits for every stream of the CPU
    return len(list(TASKS.iterdir()))


def settled(most: int) -> int:
    """Their number once it is no more than ``most``: a joined thread is gone a moment later."""
    end = time.monotonic() + PATIENCE
    while (count := tasks()) > most and time.monotonic() < end:
        time.sleep(0.01)
    return count


def left_behind(count: int, work: Callable[[], Any], at_once: int = 1) -> int:
    """Threads that there are more after threads have worked, ``at_once`` of them at a time."""
    together = threading.Barrier(at_once)
    in_threads(at_once, lambda: (work(), together.wait()), at_once)
    time.sleep(0.1)
    before = tasks()
    in_threads(count, work, at_once)
    return settled(before) - before


@linux
def test_a_thousand_threads_leave_none_behind(llm: mlxrun.LLM) -> None:
    def ask() -> None:
        done.append(llm.generate("tea", max_tokens=1).tokens)

    done: list[list[int]] = []
    assert left_behind(1000, ask, at_once=10) <= 0
    assert len(done) == 1010


@linux
@pytest.mark.parametrize(
    "use",
    [
        lambda llm: llm.logits([5, 6, 7]),
        lambda llm: next(iter(llm.stream("tea", max_tokens=2))),
        lambda llm: llm.generate("tea", max_tokens=24, ignore_eos=True),
        lambda llm: llm.batch(["tea", "x"], max_tokens=2),
        lambda llm: llm.generate("tea", session=llm.session(cache_type_k="q8"), max_tokens=2),
        lambda llm: llm.engine(parallel=2).close(),
        lambda llm: llm.perplexity("some text " * 20, context=16),
        lambda llm: mlxrun.load(llm.source),
    ],
    ids=["logits", "stream", "compiled", "batch", "session", "engine", "perplexity", "load"],
)  # fmt: skip
def test_no_use_in_a_thread_leaves_one_behind(
    llm: mlxrun.LLM, use: Callable[[mlxrun.LLM], Any]
) -> None:
    assert left_behind(12, lambda: use(llm)) <= 0


@linux
def test_nor_do_threads_with_a_model_of_mlx_lm(tmp_path: Path) -> None:
    llm = mlxrun.load(save(tmp_path / "m", CONFIGS["mamba2"], stock(CONFIGS["mamba2"])))
    assert left_behind(12, lambda: llm.generate([5, 6], max_tokens=2)) <= 0


def test_a_thread_computes_on_its_own_streams_as_well(llm: mlxrun.LLM) -> None:
    """Two threads that use MLX themselves never share a stream, nor change that of the main one."""
    main = mx.default_stream(mx.cpu)
    together, seen = threading.Barrier(3), []

    def use() -> None:
        llm.generate("tea", max_tokens=1)
        together.wait()
        seen.append(mx.default_stream(mx.cpu))
        together.wait()
        mine = mx.new_thread_unsafe_stream(mx.cpu)
        with mx.stream(mine):
            llm.generate("tea", max_tokens=1)
            assert mx.default_stream(mx.cpu) == mine

    failed: list[Any] = []
    hook, threading.excepthook = threading.excepthook, failed.append
    try:
        in_threads(3, use, at_once=3)
    finally:
        threading.excepthook = hook
    assert not failed
    with device_lock:
        shared = mx.default_stream(mx.cpu)
        with device_lock:
            assert mx.default_stream(mx.cpu) == shared
        assert mx.default_stream(mx.cpu) == shared
    assert mx.default_stream(mx.cpu) == main
    every = [*seen, main, shared]
    assert all(a != b for i, a in enumerate(every) for b in every[:i])


def test_streams_are_made_only_while_no_other_thread_computes_or_loads(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX puts them into a table that evaluations in other threads read without a lock."""
    make, made = mx.new_thread_unsafe_stream, []

    def observed(device: mx.Device) -> mx.Stream:
        made.append((load_lock._lock._is_owned(), device_lock._lock._is_owned()))
        return make(device)

    monkeypatch.setattr(_ThreadStreams, "_free", [])
    monkeypatch.setattr(mx, "new_thread_unsafe_stream", observed)
    for first in (load_lock, device_lock):
        thread = threading.Thread(target=lambda lock=first: lock.__enter__() or lock._release())
        thread.start()
        thread.join()
        _ThreadStreams._free.clear()
    assert made and all(loading and computing for loading, computing in made)


def test_a_new_thread_need_not_wait_for_a_load(path: Path) -> None:
    code = """if True:
        import sys, threading, mlxrun
        from mlxrun.lock import load_lock, RESERVE

        def ask():
            llm.generate("tea", max_tokens=1)
            together.wait()

        llm, together = mlxrun.load(sys.argv[1]), threading.Barrier(RESERVE)
        threads = [threading.Thread(target=ask) for _ in range(RESERVE)]
        with load_lock:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    """
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("outer, inner", [(device_lock, load_lock), (load_lock, device_lock)])
def test_a_thread_that_waits_for_both_locks_keeps_neither_from_others(
    monkeypatch: pytest.MonkeyPatch, outer: Any, inner: Any
) -> None:
    monkeypatch.setattr(_ThreadStreams, "_free", [])
    waiting, entered = threading.Event(), threading.Event()

    def wait() -> None:
        waiting.set()
        with device_lock:
            pass

    def nest() -> None:
        with outer:
            thread.start()
            waiting.wait()
            time.sleep(0.05)
            with inner:
                entered.set()

    thread = threading.Thread(target=wait, daemon=True)
    holder = threading.Thread(target=nest, daemon=True)
    holder.start()
    assert entered.wait(PATIENCE)
    holder.join()
    thread.join(PATIENCE)
    assert not thread.is_alive()


FORK = """
import multiprocessing, os, sys
import mlxrun

def refused(use):
    try:
        use()
    except mlxrun.MlxrunError as error:
        return type(error).__name__, "spawn" in str(error.hint)

path = sys.argv[1]

def free_one():
    local = mlxrun.load(path)
    local.generate("tea", max_tokens=1)
    if (pid := os.fork()) == 0:
        return True  # and the model is freed
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

if free_one():
    sys.exit(0)
fresh = mlxrun.load(path)
used = mlxrun.load(path)
used.generate("tea", max_tokens=1)
engine = used.engine(parallel=1)
handle = engine.submit("tea", max_tokens=100, ignore_eos=True)
stream = used.stream("tea", max_tokens=100, ignore_eos=True)
next(stream)
session = used.session()

def child():
    uses = [
        lambda: mlxrun.load(path),
        lambda: fresh.generate("tea", max_tokens=1),
        lambda: used.generate("tea", max_tokens=1),
        lambda: used.chat([{"role": "user", "content": "tea"}], max_tokens=1),
        lambda: next(used.stream("tea", max_tokens=1)),
        lambda: next(stream),
        lambda: used.logits([5]),
        lambda: used.batch(["tea"], max_tokens=1),
        lambda: used.engine(),
        lambda: engine.submit("tea"),
        lambda: handle.result(),
        lambda: next(iter(handle)),
        lambda: session.reset(),
        lambda: used.perplexity("some text " * 20, context=16),
    ]
    return [refused(use) for use in uses]

def in_fork(work):
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(read)
        os.write(write, repr(work()).encode())
        sys.exit(0)  # with what runs at the end of a process, too
    os.close(write)
    with open(read) as pipe:
        found = eval(pipe.read())
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    return found

expected = [("ProcessError", True)] * 14
assert in_fork(child) == expected, in_fork(child)
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.apply(child) == expected
used.generate("tea", max_tokens=1)  # the parent goes on
engine.close()
assert handle.done
"""
UNUSED = """
import os, sys
import mlxrun, mlxrun.llm, mlxrun.engine.engine, mlxrun.engine.batch
if os.fork() == 0:
    llm = mlxrun.load(sys.argv[1])
    with llm.engine(parallel=1) as engine:
        both = llm.generate("tea", max_tokens=1), engine.submit("tea", max_tokens=1).result(60)
    sys.exit(0 if all(both) else 1)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@forking
@pytest.mark.parametrize("code", [FORK, UNUSED], ids=["used", "unused"])
def test_a_forked_process_is_refused_where_mlx_has_threads(code: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr.decode()


CLOSED_AT_EXIT = """
import atexit, sys
import mlxrun

# Registered before the first load, so called after what mlxrun itself does at the end.
atexit.register(lambda: (engine.close(), print("closed")))
engine = mlxrun.load(sys.argv[1]).engine(parallel=1)
next(iter(engine.submit("tea", max_tokens=100, ignore_eos=True)))
"""


def test_an_engine_may_be_closed_at_exit(path: Path) -> None:
    code = [sys.executable, "-c", CLOSED_AT_EXIT, path]
    done = subprocess.run(code, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"closed", b"")


def test_a_model_cannot_be_sent_to_another_process(llm: mlxrun.LLM) -> None:
    for each in (llm, llm.session()):
        with pytest.raises(ProcessError, match="cannot be pickled"):
            pickle.dumps(each)
    with pytest.raises(ProcessError, match="load"):
        multiprocessing.get_context("spawn").Process(target=print, args=(llm,)).start()


FREED = """
import gc, sys
import mlxrun

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

for round in range(2):  # what threads and libraries take for good is there after the first
    before = megabytes()
    llm = mlxrun.load(sys.argv[1])
    llm.generate("tea", max_tokens=2)
    session = llm.session()
    size = llm.model.nbytes / 1e6
    held = megabytes()
    del llm
    assert megabytes() > held - 0.1 * size, "the session has the model"
    del session
    gc.collect()
assert held > before + 0.9 * size > before + 50, (before, held)
assert megabytes() < before + 0.3 * size, (before, megabytes())
"""


def test_the_end_of_the_interpreter_is_silent(path: Path) -> None:
    """Even where a model goes after the names of its module, as one in a cycle may."""
    code = "import mlxrun.llm, sys; kept = mlxrun.load(sys.argv[1]); mlxrun.llm.sys = None"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")


@linux
def test_a_freed_model_leaves_no_memory_behind(tmp_path: Path) -> None:
    large = Tiny(hidden=512, heads=8, ffn=1536, layers=6).write(tmp_path / "large.gguf")
    code = [sys.executable, "-c", FREED, large]
    done = subprocess.run(code, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr.decode()
