"""``llm.batch`` and ``llm.engine``: the tokens of ``generate``, from any thread or task."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun
from mlxrun.errors import (
    ContextLengthError,
    EngineClosedError,
    MlxrunError,
    ParameterError,
    QueueFullError,
)
from mlxrun.eval.batch_invariance import check_batch
from mlxrun.lock import device_lock

OPTIONS: dict[str, Any] = {"temperature": 0.8, "ignore_eos": True}
PROMPTS = ["tea", "a longer prompt", "x", "why?", "one two three", "Z"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "m.gguf"
    return Tiny(keys={"context_length": 256}).write(path)


@pytest.fixture(scope="module")
def llm(path: Path) -> mlxrun.LLM:
    return mlxrun.load(path)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    """One whose longest completion no thread that is kept waiting misses the end of."""
    path = tmp_path_factory.mktemp("engine") / "m.gguf"
    return mlxrun.load(Tiny(keys={"context_length": 1 << 16}).write(path))


ENDLESS: dict[str, Any] = {"max_tokens": 60_000, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def engine(llm: mlxrun.LLM) -> Iterator[mlxrun.Engine]:
    with llm.engine(parallel=3, queue=50) as made:
        yield made


def alone(llm: mlxrun.LLM, number: int, **more: Any) -> mlxrun.Completion:
    return llm.generate(PROMPTS[number], seed=number, max_tokens=9 + number, **OPTIONS | more)


def same(a: mlxrun.Completion, b: mlxrun.Completion) -> bool:
    return (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason)


def test_batch_returns_the_completions_of_generate_in_order(llm: mlxrun.LLM) -> None:
    heard: list[list[int]] = [[] for _ in PROMPTS]
    got = llm.batch(
        PROMPTS,
        max_tokens=[9 + i for i in range(6)],
        seed=list(range(6)),
        parallel=4,
        on_token=lambda i, chunk: heard[i].extend(chunk.tokens),
        **OPTIONS,
    )
    assert all(same(completion, alone(llm, i)) for i, completion in enumerate(got))
    assert heard == [completion.tokens for completion in got]
    for i, completion in enumerate(got):
        assert completion.usage.completion_tokens == 9 + i
        assert 0 < completion.usage.time_to_first_token <= completion.usage.total_time


def test_batch_takes_messages_ids_stops_and_nothing(llm: mlxrun.LLM) -> None:
    assert llm.batch([]) == []
    ids = llm.tokenizer.encode("tea")
    text, tokens = llm.batch(["tea", ids], max_tokens=12, temperature=0, ignore_eos=True)
    assert same(text, tokens)
    stop = text.text[3:5]
    (stopped,) = llm.batch(["tea"], max_tokens=12, temperature=0, ignore_eos=True, stop=stop)
    expected = llm.generate("tea", max_tokens=12, temperature=0, ignore_eos=True, stop=stop)
    assert same(stopped, expected)
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompts", "options", "error"),
    [
        ("tea", {}, ParameterError),
        (["tea", []], {}, ParameterError),
        (["tea"], {"max_tokens": [1, 2]}, ParameterError),
        (["tea"], {"temperature": -1}, ParameterError),
        (["tea"], {"parallel": 0}, ParameterError),
        (["tea"], {"priority": 0.5}, ParameterError),
        (["tea", [5] * 300], {}, ContextLengthError),
    ],
)
def test_requests_that_cannot_be_served_are_refused_before_anything_is_computed(
    llm: mlxrun.LLM, prompts: Any, options: dict[str, Any], error: type[MlxrunError]
) -> None:
    heard: list[int] = []
    with pytest.raises(error):
        llm.batch(prompts, on_token=lambda i, _: heard.append(i), **options)
    assert heard == []


def test_a_callback_that_fails_ends_the_batch(llm: mlxrun.LLM) -> None:
    def fail(number: int, chunk: mlxrun.Chunk) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        llm.batch(PROMPTS, on_token=fail)
    assert same(llm.batch(PROMPTS[:1], seed=0, max_tokens=9, **OPTIONS)[0], alone(llm, 0))


def test_a_callback_may_wait_for_an_engine(llm: mlxrun.LLM, engine: mlxrun.Engine) -> None:
    heard = []

    def ask(number: int, chunk: mlxrun.Chunk) -> None:
        heard.append(engine.submit("tea", max_tokens=1, ignore_eos=True).result(PATIENCE).tokens)

    llm.batch(PROMPTS[:2], max_tokens=2, **OPTIONS, on_token=ask)
    assert len(heard) >= 4
    llm.batch(PROMPTS[:1], max_tokens=1, on_token=lambda *_: engine.close())


@pytest.mark.parametrize("refused", [False, True])
def test_a_thread_that_has_a_handles_lock_may_compute(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """The garbage collector may end a stream there that was dropped, which takes device_lock."""

    def refuse(*_: Any) -> int:
        raise RuntimeError("refused")

    def compute() -> None:
        with device_lock:
            computed.set()

    computed = threading.Event()
    thread = threading.Thread(target=compute, daemon=True)
    with llm.engine(parallel=1) as engine:
        if refused:
            monkeypatch.setattr(engine, "_begin", refuse)
        with device_lock:
            handle = engine.submit("tea", max_tokens=4, ignore_eos=True)
            handle._sequence.changed.acquire()
        try:
            time.sleep(0.2)  # the engine's thread gets to its deliveries
            thread.start()
            assert computed.wait(PATIENCE)
        finally:
            handle._sequence.changed.release()
        if refused:
            with pytest.raises(RuntimeError, match="refused"):
                handle.result(PATIENCE)
        else:
            assert len(handle.result(PATIENCE).tokens) == 4


def test_a_closed_event_loop_is_not_notified(engine: mlxrun.Engine) -> None:
    sequence = engine.prepare(mlxrun.Request([5]))
    handle = mlxrun.Handle(sequence)

    async def wait() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(aiter(handle)), 0.01)

    asyncio.run(wait())
    sequence.end(EngineClosedError("closed"))
    sequence.notify()  # would raise in the thread that serves all others
    assert handle.done


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", None, True])
@pytest.mark.parametrize("name", ["parallel", "context", "queue"])
def test_sizes_of_an_engine_are_whole_numbers(llm: mlxrun.LLM, name: str, wrong: Any) -> None:
    if wrong is None and name != "queue":
        return  # chosen by the engine
    with pytest.raises(ParameterError, match=name):
        llm.engine(**{name: wrong})


def test_many_threads_share_an_engine(llm: mlxrun.LLM, engine: mlxrun.Engine) -> None:
    def ask(number: int) -> mlxrun.Completion:
        i = number % 6
        handle = engine.submit(PROMPTS[i], seed=i, max_tokens=9 + i, **OPTIONS)
        return handle.result(PATIENCE)

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(ask, range(18)))
    expected = [alone(llm, i) for i in range(6)]
    assert all(same(completion, expected[n % 6]) for n, completion in enumerate(got))


def test_streams_and_batches_run_while_an_engine_does(
    llm: mlxrun.LLM, engine: mlxrun.Engine
) -> None:
    handles = [engine.submit(PROMPTS[i], seed=i, max_tokens=9 + i, **OPTIONS) for i in range(6)]
    assert same(llm.batch([PROMPTS[2]], seed=2, max_tokens=11, **OPTIONS)[0], alone(llm, 2))
    for i, handle in enumerate(handles):
        chunks = list(handle)
        assert "".join(map(str, chunks)) == alone(llm, i).text
        assert chunks == list(handle), "each reader starts with the first chunk"


def test_tasks_read_while_others_run(llm: mlxrun.LLM, engine: mlxrun.Engine) -> None:
    async def read(number: int) -> str:
        handle = engine.submit(PROMPTS[number], seed=number, max_tokens=9 + number, **OPTIONS)
        return "".join([chunk.text async for chunk in handle])

    async def everyone() -> list[str]:
        return await asyncio.gather(*(read(i) for i in range(6)))

    assert asyncio.run(everyone()) == [alone(llm, i).text for i in range(6)]


def test_cancelling_while_waiting_and_while_decoding(endless: mlxrun.LLM) -> None:
    ending = ENDLESS | {"max_tokens": 100}
    with endless.engine(parallel=3, context=1 << 16) as engine:
        handles = [engine.submit("tea", **(ending if i % 2 else ENDLESS)) for i in range(5)]
        next(iter(handles[0]))
        for handle in handles[::2]:
            handle.cancel()
        expected = endless.generate("tea", **ending).tokens
        for number, handle in enumerate(handles):
            completion = handle.result(PATIENCE)
            assert completion.finish_reason == ("length" if number % 2 else "cancelled")
            assert completion.tokens[:100] == expected[: len(completion.tokens)]
            handle.cancel()  # of one that has ended: nothing happens
            assert handle.done


def idle(engine: mlxrun.Engine) -> bool:
    """Whether an engine has nothing left to do, soon."""
    end = time.monotonic() + PATIENCE
    while (engine.figures.live or engine.waiting) and time.monotonic() < end:
        time.sleep(0.001)
    return not (engine.figures.live or engine.waiting)


@pytest.mark.parametrize("waits_for", ["a chunk", "something else"])
def test_a_task_that_is_cancelled_ends_its_request(endless: mlxrun.LLM, waits_for: str) -> None:
    async def main(engine: mlxrun.Engine) -> None:
        handle, reading = engine.submit("tea", **ENDLESS), asyncio.Event()

        async def read() -> None:
            async for _ in handle:
                reading.set()
                if waits_for == "something else":
                    await asyncio.sleep(60)

        task = asyncio.create_task(read())
        await reading.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(idle, engine)
        assert handle.result(PATIENCE).finish_reason == "cancelled"

    with endless.engine(parallel=2) as engine:
        asyncio.run(main(engine))


def test_a_loop_that_is_left_ends_its_request_unless_another_reads(endless: mlxrun.LLM) -> None:
    async def leave(handle: mlxrun.Handle) -> None:
        async for _ in handle:
            break

    async def main(engine: mlxrun.Engine) -> None:
        both, alone = engine.submit("tea", **ENDLESS), engine.submit("tea", **ENDLESS)
        other = aiter(both)
        await anext(other)
        await leave(both)
        await leave(alone)
        while not alone.done:
            await asyncio.sleep(0.001)
        assert not both.done
        await other.aclose()
        assert await asyncio.to_thread(idle, engine)
        assert [handle.result().finish_reason for handle in (both, alone)] == 2 * ["cancelled"]

    with endless.engine(parallel=2) as engine:
        asyncio.run(main(engine))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_dropped_handle_frees_its_row_or_its_place(endless: mlxrun.LLM, rows: int) -> None:
    with endless.engine(parallel=rows) as engine:
        handles = [engine.submit("tea", **ENDLESS) for _ in range(3)]
        next(iter(handles[0]))
        del handles
        assert idle(engine)
        assert engine.figures.computed < 60_000, "cut short"
        completion = engine.submit("x", seed=2, max_tokens=11, **OPTIONS).result(PATIENCE)
        assert same(completion, endless.generate("x", seed=2, max_tokens=11, **OPTIONS))


def test_a_handle_that_is_dropped_while_its_request_is_taken_in_frees_its_row(
    endless: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking, dropped = threading.Event(), threading.Event()
    with endless.engine(parallel=1) as engine:
        add = engine.scheduler.add

        def late(sequence: Any) -> None:
            taking.set()
            assert dropped.wait(PATIENCE)
            add(sequence)

        monkeypatch.setattr(engine.scheduler, "add", late)
        handle = engine.submit("tea", **ENDLESS)
        assert taking.wait(PATIENCE)
        del handle
        dropped.set()
        assert idle(engine)
        assert engine.figures.computed < 60_000, "cut short"


def test_a_block_over_a_handle_ends_its_request(endless: mlxrun.LLM) -> None:
    async def main() -> mlxrun.Completion:
        async with endless.engine(parallel=1) as engine:
            async with engine.submit("tea", **ENDLESS) as handle:
                pass
            return await asyncio.to_thread(handle.result, PATIENCE)

    with endless.engine(parallel=1) as engine:
        with engine.submit("tea", **ENDLESS) as handle:
            next(iter(handle))
        assert handle.result(PATIENCE).finish_reason == "cancelled"
    assert asyncio.run(main()).finish_reason == "cancelled"


@pytest.mark.parametrize(
    "use",
    [
        lambda engine: None,
        lambda engine: engine.submit("tea", max_tokens=3).result(PATIENCE),
        lambda engine: engine.submit("tea", **ENDLESS),
    ],
    ids=["unused", "idle", "busy"],
)
def test_a_dropped_engine_frees_its_thread_and_its_model(
    path: Path, use: Callable[[mlxrun.Engine], Any]
) -> None:
    llm = mlxrun.load(path)
    engine = llm.engine(parallel=1)
    use(engine)
    thread, freed = engine._thread, threading.Event()
    weakref.finalize(llm, freed.set)
    del engine, llm
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert freed.wait(PATIENCE)


def test_a_handle_keeps_its_engine_until_the_end(llm: mlxrun.LLM) -> None:
    handle = llm.engine(parallel=1).submit("tea", seed=0, max_tokens=9, **OPTIONS)
    gc.collect()
    assert same(handle.result(PATIENCE), alone(llm, 0))
    assert handle._sequence.engine is None


def test_engines_and_handles_are_shown(llm: mlxrun.LLM) -> None:
    engine = llm.engine(parallel=1, context=99)
    assert repr(engine).endswith("m.gguf', 0 of 1 sequences live, 0 waiting, context 99)")
    handle = engine.submit("tea", max_tokens=2, ignore_eos=True)
    assert repr(handle).endswith("so far)") or handle.done
    handle.result(PATIENCE)
    assert repr(handle) == "Handle(2 tokens, length)"
    engine.close()
    assert repr(engine).endswith("m.gguf', closed)")
    sequence = engine.prepare(mlxrun.Request([5]))
    failed = mlxrun.Handle(sequence)
    sequence.end(EngineClosedError("closed"))
    assert repr(failed) == "Handle(0 tokens, failed: closed)"


def test_a_full_queue_refuses(endless: mlxrun.LLM) -> None:
    with endless.engine(parallel=1, queue=2) as engine:
        first = engine.submit("tea", **ENDLESS)
        next(iter(first))
        refused, taken = 0, []
        for _ in range(10):
            try:
                taken.append(engine.submit("tea", **ENDLESS))
            except QueueFullError as error:
                refused += 1
                assert "2 requests are waiting" in str(error)
        assert (refused, len(taken)) == (8, 2)


def test_deadlines_and_priorities(endless: mlxrun.LLM) -> None:
    with endless.engine(parallel=1) as engine:
        slow = engine.submit("tea", **ENDLESS)
        next(iter(slow))
        late = engine.submit("tea", max_tokens=5, deadline=0.001)
        usual = engine.submit("tea", max_tokens=5)
        urgent = engine.submit("tea", max_tokens=5, priority=3)
        slow.cancel()
        assert late.result(PATIENCE).finish_reason == "deadline"
        assert urgent.result(PATIENCE).usage.total_time < usual.result(PATIENCE).usage.total_time


def test_figures_tell_the_size_and_the_work(llm: mlxrun.LLM) -> None:
    prompt = list(range(3, 60))
    with llm.engine(parallel=3, prefix_bytes=1 << 20) as engine:
        for _ in range(2):
            engine.submit(prompt, max_tokens=4, ignore_eos=True).result(PATIENCE)
        figures = engine.figures
        assert (figures.parallel, figures.context) == (3, llm.context_length)
        assert (figures.live, figures.waiting) == (0, 0)
        # The second prompt's prefix was cached: only its last token, and the sampled ones.
        assert figures.computed - figures.wasted == len(prompt) + 3 + 1 + 3
        assert (figures.prefixes.hits, figures.prefixes.tokens) == (1, len(prompt) - 1)
    with llm.engine(parallel=4, prefix_bytes=0) as engine:
        lengths = (2, 9, 30, 30)
        handles = [engine.submit("tea", max_tokens=n, ignore_eos=True) for n in lengths]
        assert all(handle.result(PATIENCE) for handle in handles)
        figures = engine.figures
        useful = 4 * len(llm.tokenizer.encode("tea")) + sum(n - 1 for n in lengths)
        assert figures.computed - figures.wasted == useful


def test_closing_ends_running_requests_and_refuses_the_rest(endless: mlxrun.LLM) -> None:
    engine = endless.engine(parallel=1)
    running = engine.submit("tea", **ENDLESS)
    waiting = engine.submit("tea", max_tokens=5)
    next(iter(running))
    engine.close()
    assert running.result(PATIENCE).finish_reason == "cancelled"
    assert waiting.done
    with pytest.raises(EngineClosedError):
        engine.submit("tea")
    engine.close()


def test_a_result_that_takes_too_long(endless: mlxrun.LLM) -> None:
    with endless.engine(parallel=1) as engine:
        handle = engine.submit("tea", **ENDLESS)
        with pytest.raises(TimeoutError, match=r"after 0\.001 s"):
            handle.result(0.001)
        handle.cancel()
        assert handle.result(PATIENCE).finish_reason == "cancelled"


def test_invalid_requests_are_refused_at_once(engine: mlxrun.Engine) -> None:
    for options in ({"temperature": -1}, {"deadline": -1}, {"nonsense": 1}):
        with pytest.raises(MlxrunError):
            engine.submit("tea", **options)
    with pytest.raises(ContextLengthError):
        engine.submit([5] * 300)
    with pytest.raises(ParameterError):
        engine.submit(mlxrun.Request([10**6]))
    with pytest.raises(ParameterError, match="options"):
        engine.submit(mlxrun.Request([5]), max_tokens=3)


def test_a_check_compares_alone_with_together(llm: mlxrun.LLM) -> None:
    seen: list[tuple[int, int]] = []
    ways = check_batch(
        llm, requests=4, tokens=8, parallel=3, progress=lambda *done: seen.append(done)
    )
    assert [way.name for way in ways] == [
        f"{kind}, {way}" for kind in ("greedy", "seeded") for way in ("default", "deterministic")
    ]
    assert all(way.requests == way.equal == 4 for way in ways)
    assert all(way.tokens == way.same > 0 for way in ways)
    assert seen[-1] == (24, 24)


def test_a_check_takes_nothing_over(llm: mlxrun.LLM) -> None:
    llm.generate("once", max_tokens=1)
    before = llm.prefix_cache.figures
    check_batch(llm, requests=3, tokens=4, parallel=3)
    assert llm.prefix_cache.figures == before


def test_the_interpreter_may_end_with_an_engine_open(tmp_path: Path) -> None:
    path = Tiny().write(tmp_path / "m.gguf")
    code = (
        "import sys, mlxrun\n"
        "engine = mlxrun.load(sys.argv[1]).engine()\n"
        "next(iter(engine.submit('tea', max_tokens=100, ignore_eos=True)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("way", ["generate", "batch"])
def test_the_end_of_the_process_waits_for_no_thread(tmp_path: Path, way: str) -> None:
    """A step that is computed meanwhile ends first: MLX aborts otherwise."""
    path = Tiny(keys={"context_length": 4096}).write(tmp_path / "m.gguf")
    prompt = {"generate": "'tea'", "batch": "['tea', 'x']"}[way]
    code = (
        "import sys, threading, time, mlxrun\n"
        "llm = mlxrun.load(sys.argv[1])\n"
        f"run = lambda: llm.{way}({prompt}, max_tokens=4000, ignore_eos=True)\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "time.sleep(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
