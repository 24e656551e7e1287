"""mlxrun as a runtime to measure, through the public methods of an LLM; making text included."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Self

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


class Meter:
    """Time and MLX memory of one runtime's runs, without other memory of this process.

    Average memory is that of samples from a thread of its own, since a pass takes most in the
    middle.

    Args:
        weights: bytes of the runtime's model, mapped ones included.
    """

    def __init__(self, weights: int) -> None:
        self._weights = weights
        self._others = 0

    def begin(self) -> None:
        """Note other memory before a run makes its caches, without garbage."""
        gc.collect()
        mx.synchronize()
        mx.reset_peak_memory()
        self._others = mx.get_active_memory() - self._weights

    def time(self, work: Callable[[], int]) -> Run:
        """Time some work, which returns bytes of keys and values."""
        mx.synchronize()
        with _MemorySamples() as samples:
            started = time.perf_counter()
            kv_bytes = work()
            seconds = time.perf_counter() - started
        peak, average = mx.get_peak_memory() - self._others, samples.average - self._others
        mx.synchronize()
        return Run(seconds, kv_bytes, max(0, peak), max(0, average))


class _MemorySamples:
    """Samples of MLX's active memory, at both ends and in between."""

    def __enter__(self) -> Self:
        self._sum, self._count, self._over = 0, 0, Event()
        self._sample()
        self._thread = Thread(target=self._watch, name="mlxrun-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    @property
    def average(self) -> int:
        return self._sum // self._count

    def _watch(self) -> None:
        while not self._over.wait(_PAUSE):
            self._sample()

    def _sample(self) -> None:
        self._sum += mx.get_active_memory()
        self._count += 1


class MlxrunRuntime:
    """A model of mlxrun's.

    Args:
        llm: the model; its prefix cache is switched off, since all runs have the same prompts.
        load_seconds: its loading time.
        cache: how keys and values are stored and attended to.
    """

    name = OURS

    def __init__(self, llm: LLM, load_seconds: float, cache: StorageOptions | None = None) -> None:
        self._llm, self.load_seconds = llm, load_seconds
        self._cache: StorageOptions = cache or {}
        dtype = str(llm.model.dtype).removeprefix("mlx.core.")
        self.about = f"{dtype}, {llm.model.nbytes / 1e6:.1f} MB of weights"
        self.about += "".join(
            f", {name.replace('_', ' ')} {value}" for name, value in self._cache.items()
        )
        self._meter = Meter(llm.model.nbytes)
        llm.prefix_cache.budget = 0
        llm.prefix_cache.clear()
        self._filled = llm.session(**self._cache)

    def can(self, workload: Workload) -> bool:
        return True

    def run(self, workload: Workload) -> Run:
        if isinstance(workload, Prefill | Decode):
            self._fill(workload.context)
        self._meter.begin()
        match workload:
            case Prefill():
                return self._generate(workload.prompt, 1)
            case Decode(parallel=1):
                return self._generate(1, workload.predict)
            case Decode():
                return self._together(workload)
            case Ragged():
                return self._ragged(workload)
        return self._first_token(workload)

    def _generate(self, prompt: int, predict: int) -> Run:
        session = self._filled.fork()
        ids = [*session.tokens, *self._ids(prompt, seed=1)]

        def work() -> int:
            self._llm.generate(ids, session=session, max_tokens=predict, **GREEDY)
            return session.nbytes

        return self._meter.time(work)

    def _together(self, workload: Decode) -> Run:
        llm, rows = self._llm, workload.parallel
        engine = llm.make_engine(EngineConfig(parallel=rows, queue=rows, prefix_bytes=0), "batch")
        sessions, sequences = [], []
        for last in self._ids(rows, seed=1):
            session = self._filled.fork()
            ids = [*session.tokens, last]
            request = llm.inputs.request(ids, max_tokens=workload.predict, **GREEDY)
            sequences.append(engine.prepare(request, session=session))
            sessions.append(session)

        def work() -> int:
            for _ in engine.run(sequences):
                pass
            return sum(session.nbytes for session in sessions)

        return self._meter.time(work)

    def _ragged(self, workload: Ragged) -> Run:
        prompts = self._prompts(workload)

        def work() -> int:
            self._llm.batch(
                prompts,
                max_tokens=list(workload.completions),
                prefix_bytes=0,
                progress=False,
                **GREEDY,
                **self._cache,
            )
            return 0

        return self._meter.time(work)

    def _first_token(self, workload: FirstToken) -> Run:
        waited: list[float] = []

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
            waited.append(completion.usage.time_to_first_token)
            return 0

        return replace(self._meter.time(work), seconds=waited[0])

    def _fill(self, context: int) -> None:
        """Have a session of so many tokens, to be forked by each run."""
        if len(self._filled.tokens) != context:
            self._filled = self._llm.session(**self._cache)
            if context:
                ids = self._ids(context)
                self._llm.generate(ids, session=self._filled, max_tokens=1, **GREEDY)

    def _prompts(self, workload: Ragged) -> Sequence[list[int]]:
        return [self._ids(count, seed) for seed, count in enumerate(workload.prompts)]

    def _ids(self, count: int, seed: int = 0) -> list[int]:
        return token_ids(count, self._llm.model.vocab_size, seed)


class SerialRuntime(MlxrunRuntime):
    """The same, with requests that arrive at once served one after the other."""

    name = f"{OURS}, one at a time"

    def can(self, workload: Workload) -> bool:
        return isinstance(workload, Ragged)

    def _ragged(self, workload: Ragged) -> Run:
        prompts = self._prompts(workload)

        def work() -> int:
            for prompt, limit in zip(prompts, workload.completions, strict=True):
                self._llm.generate(prompt, max_tokens=limit, **GREEDY, **self._cache)
            return 0

        return self._meter.time(work)
