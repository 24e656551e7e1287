"""mlxrun's own runtime: single sequences through its engine, several through its service.

One sequence alone is measured without text, as llama-bench and mlx-lm's ``generate_step`` do; what
is served together includes making the text of every reply.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxrun.bench.results import OURS, Run
from mlxrun.bench.subjects.meter import Meter
from mlxrun.bench.workload import Decode, FirstToken, Prefill, Ragged, Workload, token_ids
from mlxrun.computing import COMPUTING
from mlxrun.errors import MlxrunError
from mlxrun.generation.engine import Session, decode, prefill
from mlxrun.generation.parameters import SamplingParams
from mlxrun.generation.reply import Reply
from mlxrun.generation.request import Chunk, Request
from mlxrun.generation.serving import Job, Service, most_beside

if TYPE_CHECKING:
    from mlxrun.llm import LLM

# Whatever the model recommends: penalties, say, would cost time that other runtimes do not spend.
GREEDY = SamplingParams(temperature=0)


class Ours:
    """The runtime that :class:`mlxrun.LLM` uses.

    Args:
        llm: the model; its prefix cache is switched off.
        load_seconds: what loading took.
        cache: how keys and values are stored and attended to, as :meth:`LLM.session` takes it:
            ``cache_type_k``, ``cache_type_v``, ``attention``.
    """

    name = OURS

    def __init__(
        self, llm: LLM, load_seconds: float, cache: Mapping[str, str] | None = None
    ) -> None:
        self._llm, self.load_seconds, self._cache = llm, load_seconds, dict(cache or {})
        dtype = str(llm.model.dtype).removeprefix("mlx.core.")
        self.about = f"{dtype}, {llm.model.nbytes / 1e6:.1f} MB of weights"
        self.about += "".join(
            f", {name.replace('_', ' ')} {how}" for name, how in self._cache.items()
        )
        self._meter = Meter(llm.model.nbytes)
        # Every run has the same prompts: what one has read must not be there for the next.
        llm.prefix_cache.budget = 0
        llm.prefix_cache.clear()
        self._filled = self._session()

    def can(self, workload: Workload) -> bool:
        return True

    def run(self, workload: Workload) -> Run:
        with COMPUTING:
            if isinstance(workload, Prefill | Decode):
                self._fill(workload.context)
            self._meter.begin()
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
        session = self._filled.fork()
        prompt = session.tokens + self._ids(workload.prompt, seed=1)
        sampler = self._llm.asker.sampler(self._request(prompt, 1))

        def work() -> int:
            mx.eval(sampler.sample(prefill(self._llm.model, session, prompt)).token)
            return session.nbytes

        return self._meter.time(work)

    def _decode(self, workload: Decode) -> Run:
        session = self._filled.fork()
        prompt = session.tokens + self._ids(1, seed=1)
        sampler = self._llm.asker.sampler(self._request(prompt, workload.predict))

        def work() -> int:
            model = self._llm.model
            logits = prefill(model, session, prompt)
            for _ in decode(self._llm.stepper, session, sampler, logits, workload.predict):
                pass
            return session.nbytes

        return self._meter.time(work)

    def _together(self, workload: Decode) -> Run:
        llm, held, rows = self._llm, self._filled, workload.parallel
        # All begin in the first step, however short their replies.
        service = Service(llm.model, rows=rows, queue=rows, beside=max(rows, most_beside()))
        for last in self._ids(rows, seed=1):
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

        return self._meter.time(work)

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
                params=GREEDY,
                ignore_eos=True,
                prefix_bytes=0,
                progress=False,
                **self._cache,
            )
            return 0

        return self._meter.time(work)

    def _first_token(self, workload: FirstToken) -> Run:
        settings: dict[str, Any] = {"max_tokens": 1, "params": GREEDY, "ignore_eos": True}
        waited: list[float] = []

        def work() -> int:
            with self._llm.engine(prefix_bytes=0, **self._cache) as engine:
                ahead = []  # the engine serves it as long as its handle is there
                if workload.behind:
                    ahead.append(engine.submit(self._ids(workload.behind, seed=2), **settings))
                    while engine.waiting:
                        time.sleep(1e-3)
                reply = engine.submit(self._ids(workload.prompt, seed=1), **settings).result()
            waited.append(reply.usage.time_to_first_token)
            return 0

        return replace(self._meter.time(work), seconds=waited[0])

    def _session(self) -> Session:
        return self._llm.session(**self._cache)

    def _fill(self, context: int) -> None:
        """Have a session that holds so many tokens, for forks of it to be used."""
        if len(self._filled.tokens) != context:
            self._filled = self._session()
            if context:
                mx.eval(prefill(self._llm.model, self._filled, self._ids(context)))

    def _prompts(self, workload: Ragged) -> list[list[int]]:
        return [self._ids(count, seed) for seed, count in enumerate(workload.prompts)]

    def _ids(self, count: int, seed: int = 0) -> list[int]:
        return token_ids(count, self._llm.model.vocab_size, seed)

    def _request(self, prompt: Sequence[int], limit: int) -> Request:
        return self._llm.asker.request(prompt, max_tokens=limit, params=GREEDY, ignore_eos=True)


class OneAtATime(Ours):
    """The same, with requests that arrive at once served one after the other."""

    name = f"{OURS}, one at a time"

    def can(self, workload: Workload) -> bool:
        return isinstance(workload, Ragged)

    def _ragged(self, workload: Ragged) -> Run:
        prompts = self._prompts(workload)

        def work() -> int:
            for prompt, limit in zip(prompts, workload.replies, strict=True):
                settings = {"max_tokens": limit, "params": GREEDY, "ignore_eos": True}
                self._llm.generate(prompt, **settings, **self._cache)
            return 0

        return self._meter.time(work)


def _heard(item: Chunk | MlxrunError) -> None:
    if isinstance(item, MlxrunError):
        raise item
