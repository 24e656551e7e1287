"""A service for a model's requests: their caches, what each of them costs, and who fits at once.

What :mod:`mlxrun.batch` and :mod:`mlxrun.engine` share.
"""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from mlxrun.computing import COMPUTING
from mlxrun.config import CacheConfig, EngineConfig
from mlxrun.errors import MemoryLimitError
from mlxrun.generation.blocks import IDLE_SHARE
from mlxrun.generation.reply import Reply
from mlxrun.generation.serving import STALL, Job, Listener, Service, most_beside
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.memory.plan import MemoryPlan, Room, plan_loaded
from mlxrun.outputs import Request

if TYPE_CHECKING:
    from mlxrun.llm import LLM

# Kinds of caches whose plans are remembered.
_KINDS = 64


class Accepted(NamedTuple):
    """A request that can be served.

    Attributes:
        request: it.
        cache: its own, or the engine's.
        limit: tokens that it may draw.
        cost: bytes that it takes at its longest.
    """

    request: Request
    cache: CacheConfig
    limit: int
    cost: int


class Front:
    """Takes requests for a model and hands them to a service.

    Args:
        llm: the model and its tokenizer.
        most: sequences at once if ``config`` says nothing.
        queue: the most requests that wait.
        like: a request whose caches room is planned for; by default those of ``config``.
        offline: nobody waits for a first token; only the whole counts.

    Attributes:
        service: what serves them.
        prefixes: what they share of their beginnings.
        room: sequences at once, and tokens of each.

    Raises:
        ParameterError, CacheError: the model cannot have such caches.
        MemoryLimitError: there is no room for what is asked for, or for a single token.
    """

    def __init__(
        self,
        llm: LLM,
        config: EngineConfig,
        *,
        most: int,
        queue: int,
        like: Request | None = None,
        offline: bool = False,
    ) -> None:
        self._llm, self._config = llm, config
        self.prefixes = llm.sessions.prefixes(config.prefix_bytes)
        beside, usual = most_beside(offline=offline), math.inf if offline else STALL
        self._admission = Admission(
            llm,
            config.cache if like is None else config.cache.overridden(like),
            config.parallel,
            self.prefixes,
            context=config.context,
            most=most,
            beside=beside,
        )
        self.room = self._admission.room
        self.service = Service(
            llm.model,
            rows=config.parallel or self.room.parallel,
            queue=queue,
            memory=self._admission.memory,
            deterministic=config.deterministic,
            stall=usual if config.stall is None else config.stall,
            beside=beside,
            prefixes=self.prefixes,
        )

    def accept(self, request: Request) -> Accepted:
        """Check that a request can be served, and find what it costs. From any thread.

        Raises:
            ContextLengthError: the prompt leaves no room in the context.
            MemoryLimitError: there is never room for it.
            ParameterError, CacheError: the model cannot have such caches.
        """
        cache = self._config.cache.overridden(request)
        limit = self._llm.asker.limit(
            request, windowed=cache.window is not None, context=self._config.context
        )
        cost = self._admission.cost(len(request.prompt), limit, cache)
        return Accepted(request, cache, limit, cost)

    def submit(self, accepted: Accepted, started: float, listener: Listener) -> int:
        """Queue a request; returns its key.

        Args:
            started: when it came, in seconds of ``time.perf_counter``; its deadline counts from
                there.
            listener: called with every chunk of its reply.
        """
        llm, (request, config, limit, cost) = self._llm, accepted
        reply = Reply(request, llm.tokenizer, limit, started)
        cache = llm.model.make_cache(config)
        job = Job(request, llm.asker.sampler(request), reply, limit, cache, 0, listener)
        return self.service.submit(job, cost=cost, waited=time.perf_counter() - started)


class Admission:
    """Admits requests by the memory plan.

    Args:
        llm: the model.
        cache: of requests that have none of their own.
        parallel: the most sequences that are live at once; None for those that fit.
        prefixes: beginnings of prompts, whose budget is set aside.
        context: tokens of each; None for those that fit.
        most: sequences at once, where nobody says.
        beside: tokens of prompts in a step.

    Attributes:
        memory: bytes for live sequences; None where the system does not say what there is.
        room: sequences at once, and tokens that each of them may have.

    Raises:
        ParameterError, CacheError: the model cannot have such caches.
        MemoryLimitError: there is no room for what is asked for, or for a single token.
    """

    def __init__(
        self,
        llm: LLM,
        cache: CacheConfig,
        parallel: int | None,
        prefixes: PrefixCache,
        *,
        context: int | None = None,
        most: int = 1,
        beside: int | None = None,
    ) -> None:
        self._llm, self._prefixes, self._beside = llm, prefixes, beside or most_beside()
        self._plan = lru_cache(_KINDS)(self._plan_of)
        self._usual = plan = self._plan(cache)
        self.room: Room = plan.room(parallel, context, most=most, longest=llm.context_length)
        self.memory = plan.available(self.room.context, self.room.parallel)
        self._shared = llm.model.joint and (parallel or self.room.parallel) > 1

    def cost(self, prompt_tokens: int, limit: int, cache: CacheConfig | None = None) -> int:
        """Bytes that a request takes at its longest.

        Args:
            cache: its own, if it is not that of the others.

        Raises:
            MemoryLimitError: it could not run even alone.
            ParameterError, CacheError: the model cannot have such caches.
        """
        plan = self._usual if cache is None else self._plan(cache)
        cost = plan.cost(prompt_tokens, limit)
        if self._shared:  # idle rows keep their memory until they are this share of all
            cost += cost // (IDLE_SHARE - 1)
        if plan is not self._usual:  # whose scratch is set aside; what this one takes beyond it
            tokens = prompt_tokens + limit
            cost += max(0, plan.terms(tokens).scratch - self._usual.terms(tokens).scratch)
        if self.memory is not None and cost > self.memory:
            raise MemoryLimitError(cost, self.memory)
        return cost

    def _plan_of(self, cache: CacheConfig) -> MemoryPlan:
        llm = self._llm
        with COMPUTING:
            llm.model.make_cache(cache)  # refuses types that do not fit
            return plan_loaded(
                llm.model,
                llm.config,
                cache=cache,
                prefill_tokens=self._beside,
                prefix_bytes=self._prefixes.budget,
                used_prefix_bytes=self._prefixes.nbytes,
            )
