"""mlxrun's own runtime: single sequences through its engine, several through its service.

One sequence alone is measured without text, as llama-bench and mlx-lm's ``generate_step`` do; what
is served together includes making the text of every reply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxrun.bench.results import OURS, Run
from mlxrun.bench.workload import Decode, FirstToken, Prefill, Ragged, Workload, token_ids
from mlxrun.computing import COMPUTING
from mlxrun.errors import MlxrunError
from mlxrun.generation.engine import Session, decode, prefill
from mlxrun.generation.reply import Reply
from mlxrun.generation.request import Chunk, Request
from mlxrun.generation.serving import Job, Service

if TYPE_CHECKING:
    from mlxrun.llm import LLM


class Ours:
    """The runtime that :class:`mlxrun.LLM` uses."""

    name = OURS

    def __init__(self, llm: LLM, load_seconds: float) -> None:
        self._llm, self.load_seconds = llm, load_seconds
        dtype = str(llm.model.dtype).removeprefix("mlx.core.")
        self.about = f"{dtype}, {llm.model.nbytes / 1e6:.1f} MB of weights"
        self._filled: Session | None = None

    def can(self, workload: Workload) -> bool:
        return True

    def run(self, workload: Workload) -> Run:
        with COMPUTING:
            match workload:
                case Prefill():
                    return self._prefill(workload)
                case Decode(parallel=1):
                    return self._decode(workload)
                case Decode():
                    return self._together(workload)
                case Ragged():
                    return self._ragged(workload)
        return self._first_token(workload)

    def _prefill(self, workload: Prefill) -> Run:
        session = self._session(workload.context)
        prompt = session.tokens + self._ids(workload.prompt, seed=1)
        sampler = self._llm.asker.sampler(self._request(prompt, 1))

        def work() -> int:
            mx.eval(sampler.sample(prefill(self._llm.model, session, prompt)).token)
            return session.nbytes

        return timed(work)

    def _decode(self, workload: Decode) -> Run:
        session = self._session(workload.context)
        prompt = session.tokens + self._ids(1, seed=1)
        sampler = self._llm.asker.sampler(self._request(prompt, workload.predict))

        def work() -> int:
            model = self._llm.model
            logits = prefill(model, session, prompt)
            for _ in decode(model, session, sampler, logits, workload.predict):
                pass
            return session.nbytes

        return timed(work)

    def _together(self, workload: Decode) -> Run:
        llm, held = self._llm, self._session(workload.context)
        service = Service(llm.model, rows=workload.parallel, queue=workload.parallel)
        for last in self._ids(workload.parallel, seed=1):
            request = self._request([*held.tokens, last], workload.predict)
            service.submit(self._job(request, held))

        def work() -> int:
            steps = kv_bytes = 0
            while service.busy:
                service.step()
                steps += 1
                if steps >= workload.predict - 1:  # the last ones, while all are still there
                    kv_bytes = max(kv_bytes, service.batch.nbytes)
            return kv_bytes

        return timed(work)

    def _job(self, request: Request, held: Session) -> Job:
        llm, limit = self._llm, request.max_tokens or 1
        reply = Reply(request, llm.tokenizer, limit, time.perf_counter(), len(held.tokens))
        cache = held.fork().cache
        return Job(
            request, llm.asker.sampler(request), reply, limit, cache, len(held.tokens), _heard
        )

    def _ragged(self, workload: Ragged) -> Run:
        prompts = self._prompts(workload)

        def work() -> int:
            self._llm.batch(
                prompts,
                max_tokens=list(workload.replies),
                temperature=0,
                ignore_eos=True,
                prefix_bytes=0,
                progress=False,
            )
            return 0

        return timed(work)

    def _first_token(self, workload: FirstToken) -> Run:
        mx.reset_peak_memory()
        settings = {"max_tokens": 1, "temperature": 0, "ignore_eos": True}
        with self._llm.engine(prefix_bytes=0) as engine:
            if workload.behind:
                engine.submit(self._ids(workload.behind, seed=2), **settings)
                while engine.waiting:
                    time.sleep(1e-3)
            reply = engine.submit(self._ids(workload.prompt, seed=1), **settings).result()
        return Run(reply.usage.time_to_first_token, 0, mx.get_peak_memory(), mx.get_active_memory())

    def _session(self, context: int) -> Session:
        """A session that holds so many tokens, to be used once."""
        if self._filled is None or len(self._filled.tokens) != context:
            self._filled = self._llm.session()
            if context:
                mx.eval(prefill(self._llm.model, self._filled, self._ids(context)))
        return self._filled.fork()

    def _prompts(self, workload: Ragged) -> list[list[int]]:
        return [self._ids(count, seed) for seed, count in enumerate(workload.prompts)]

    def _ids(self, count: int, seed: int = 0) -> list[int]:
        return token_ids(count, self._llm.model.vocab_size, seed)

    def _request(self, prompt: Sequence[int], limit: int) -> Request:
        return self._llm.asker.request(prompt, max_tokens=limit, temperature=0, ignore_eos=True)


class OneAtATime(Ours):
    """The same, with requests that arrive at once served one after the other."""

    name = f"{OURS}, one at a time"

    def can(self, workload: Workload) -> bool:
        return isinstance(workload, Ragged)

    def _ragged(self, workload: Ragged) -> Run:
        prompts = self._prompts(workload)

        def work() -> int:
            for prompt, limit in zip(prompts, workload.replies, strict=True):
                self._llm.generate(prompt, max_tokens=limit, temperature=0, ignore_eos=True)
            return 0

        return timed(work)


def timed(work: Callable[[], int]) -> Run:
    """Time some work, which returns bytes of keys and values; nothing else is queued meanwhile."""
    mx.synchronize()
    mx.reset_peak_memory()
    started = time.perf_counter()
    kv_bytes = work()
    seconds = time.perf_counter() - started
    active, peak = mx.get_active_memory(), mx.get_peak_memory()
    mx.synchronize()
    return Run(seconds, kv_bytes, peak, active)


def _heard(item: Chunk | MlxrunError) -> None:
    if isinstance(item, MlxrunError):
        raise item
