"""mlxrun as a runtime to measure, through the public methods of an LLM; making text included."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxrun.bench.runner import OURS, Run
from mlxrun.bench.workloads import Decode, FirstToken, Prefill, Ragged, Workload, token_ids
from mlxrun.config import EngineConfig, StorageOptions
from mlxrun.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mlxrun.llm import LLM

# Penalties that a model recommends would cost time that other runtimes do not spend.
GREEDY: dict[str, Any] = {"params": SamplingParams(temperature=0), "ignore_eos": True}
# Seconds between two samples of memory: a thousandth of a core's time.
_PAUSE = 0.01


@contextmanager
def _memory_samples() -> Iterator[list[int]]:
    """Samples of MLX's active memory from a thread of their own: a pass takes most midway."""
    samples, over = [mx.get_active_memory()], Event()

    def watch() -> None:
        while not over.wait(_PAUSE):
            samples.append(mx.get_active_memory())

    thread = Thread(target=watch, name="mlxrun-memory", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
        samples.append(mx.get_active_memory())


Work = Callable[[], int]


class InProcessRuntime(ABC):
    """A runtime of this process; see :class:`~mlxrun.bench.runner.Runtime`.

    Args:
        weights: bytes of the model, mapped ones included.
        dtype: of activations.
    """

    name: str
    prefill_tokens = 1  # that a prefill samples

    def __init__(self, vocab_size: int, weights: int, dtype: mx.Dtype, load_seconds: float) -> None:
        self._vocab_size, self._weights = vocab_size, weights
        self.load_seconds = load_seconds
        self.about = f"{str(dtype).removeprefix('mlx.core.')}, {weights / 1e6:.1f} MB of weights"

    def can(self, workload: Workload) -> bool:
        return True

    def run(self, workload: Workload) -> Run:
        if isinstance(workload, Prefill | Decode):
            self._fill(workload.context)
        gc.collect()
        mx.synchronize()
        mx.reset_peak_memory()
        others = mx.get_active_memory() - self._weights  # memory that is not this runtime's
        work = self._work(workload)
        mx.synchronize()
        with _memory_samples() as samples:
            started = time.perf_counter()
            kv_bytes = work()
            seconds = time.perf_counter() - started
        peak = mx.get_peak_memory()
        mx.synchronize()
        return Run(seconds, kv_bytes, max(0, peak - others), max(0, int(fmean(samples)) - others))

    @abstractmethod
    def _fill(self, context: int) -> None:
        """Have a cache of so many tokens, to be copied by each run."""

    def _work(self, workload: Workload) -> Work:
        """Prepare a run; the function that is returned is timed, and returns bytes of K/V."""
        match workload:
            case Prefill():
                return self._generate(workload.prompt, self.prefill_tokens)
            case Decode(parallel=1):
                return self._generate(1, workload.predict)
            case Decode():
                return self._decode_together(workload)
            case Ragged():
                return self._serve(workload)
        return self._first_token(workload)

    @abstractmethod
    def _generate(self, prompt: int, predict: int) -> Work: ...

    @abstractmethod
    def _decode_together(self, workload: Decode) -> Work: ...

    @abstractmethod
    def _serve(self, workload: Ragged) -> Work: ...

    @abstractmethod
    def _first_token(self, workload: FirstToken) -> Work: ...

    def _prompts(self, workload: Ragged) -> list[list[int]]:
        return [self._ids(count, seed) for seed, count in enumerate(workload.prompts)]

    def _ids(self, count: int, seed: int = 0) -> list[int]:
        return token_ids(count, self._vocab_size, seed)


class MlxrunRuntime(InProcessRuntime):
    """A model of mlxrun's.

    Args:
        llm: the model; its prefix cache is switched off, since all runs have the same prompts.
        cache: how keys and values are stored and attended to.
    """

    name = OURS

    def __init__(self, llm: LLM, load_seconds: float, cache: StorageOptions | None = None) -> None:
        self._llm = llm
        self._cache: StorageOptions = cache or {}
        model = llm.model
        super().__init__(model.vocab_size, model.nbytes, model.dtype, load_seconds)
        self.about += "".join(f", {name.replace('_', ' ')} {v}" for name, v in self._cache.items())
        llm.prefix_cache.budget = 0
        llm.prefix_cache.clear()
        self._filled = llm.session(**self._cache)
        self._waited = 0.0

    def run(self, workload: Workload) -> Run:
        run = super().run(workload)
        return replace(run, seconds=self._waited) if isinstance(workload, FirstToken) else run

    def _fill(self, context: int) -> None:
        if len(self._filled.tokens) != context:
            self._filled = self._llm.session(**self._cache)
            if context:
                ids = self._ids(context)
                self._llm.generate(ids, session=self._filled, max_tokens=1, **GREEDY)

    def _generate(self, prompt: int, predict: int) -> Work:
        session = self._filled.fork()
        ids = [*session.tokens, *self._ids(prompt, seed=1)]

        def work() -> int:
            self._llm.generate(ids, session=session, max_tokens=predict, **GREEDY)
            return session.nbytes

        return work

    def _decode_together(self, workload: Decode) -> Work:
        llm, rows = self._llm, workload.parallel
        engine = llm.make_engine(EngineConfig(parallel=rows, queue=rows, prefix_bytes=0), "batch")
        sessions = [self._filled.fork() for _ in range(rows)]
        sequences = []
        for session, last in zip(sessions, self._ids(rows, seed=1), strict=True):
            ids = [*session.tokens, last]
            request = llm.inputs.request(ids, max_tokens=workload.predict, **GREEDY)
            sequences.append(engine.prepare(request, session=session))

        def work() -> int:
            for _ in engine.run(sequences):
                pass
            return sum(session.nbytes for session in sessions)

        return work

    def _serve(self, workload: Ragged) -> Work:
        prompts, limits = self._prompts(workload), list(workload.completions)
        options = {"prefix_bytes": 0, "progress": False, **GREEDY, **self._cache}

        def work() -> int:
            self._llm.batch(prompts, max_tokens=limits, **options)
            return 0

        return work

    def _first_token(self, workload: FirstToken) -> Work:
        def work() -> int:
            with self._llm.engine(prefix_bytes=0, **self._cache) as engine:
                ahead = []  # the engine drops a request whose handle is dropped
                if workload.behind:
                    ids = self._ids(workload.behind, seed=2)
                    ahead.append(engine.submit(ids, max_tokens=1, **GREEDY))
                    while engine.waiting:
                        time.sleep(1e-3)
                ids = self._ids(workload.prompt, seed=1)
                completion = engine.submit(ids, max_tokens=1, **GREEDY).result()
            self._waited = completion.usage.time_to_first_token
            return 0

        return work


class SerialRuntime(MlxrunRuntime):
    """The same, with requests that arrive at once served one after the other."""

    name = f"{OURS}, one at a time"

    def can(self, workload: Workload) -> bool:
        return isinstance(workload, Ragged)

    def _serve(self, workload: Ragged) -> Work:
        prompts = self._prompts(workload)

        def work() -> int:
            for prompt, limit in zip(prompts, workload.completions, strict=True):
                self._llm.generate(prompt, max_tokens=limit, **GREEDY, **self._cache)
            return 0

        return work
