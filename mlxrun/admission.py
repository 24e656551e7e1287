"""A service for a model's requests: their caches, what each of them costs, and who fits at once.

What :mod:`mlxrun.batch` and :mod:`mlxrun.engine` share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from mlxrun.cache import sparsity
from mlxrun.cache.choice import Wanted
from mlxrun.cache.prefix import PrefixCache
from mlxrun.computing import COMPUTING
from mlxrun.errors import MemoryLimitError, ParameterError
from mlxrun.generation.blocks import IDLE_SHARE
from mlxrun.generation.parameters import Range, known
from mlxrun.generation.reply import Reply
from mlxrun.generation.request import Request
from mlxrun.generation.serving import STALL, Job, Listener, Service, most_beside
from mlxrun.memory.plan import MemoryPlan, Room, plan_loaded

if TYPE_CHECKING:
    from mlxrun.llm import LLM

# Kinds of caches whose plans are remembered.
_KINDS = 64


@dataclass(frozen=True)
class Options:
    """How requests are served.

    Attributes:
        deterministic: compute each sequence alone, so that not even rounding depends on the others.
        stall: seconds by which reading prompts may delay the tokens of others; by default a tenth,
            and any number where nobody waits for a first token.
        prefix_bytes: what beginnings of prompts may take, so that those which share them need not
            compute them again; 0 for none. By default the model's ``prefix_cache`` is used.
        cache_type_k, cache_type_v, attention: how keys and values are stored, and which of them
            drawn tokens attend to, where a request does not say; see :meth:`LLM.session`.

    Raises:
        ParameterError: a value outside its range.
    """

    deterministic: bool = False
    stall: float | None = None
    prefix_bytes: int | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    attention: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], *beside: str) -> Self:
        """Those that a caller gave by name.

        Args:
            beside: names of what else the caller might have meant.

        Raises:
            ParameterError: no option of that name, or a value outside its range.
        """
        known(options, [*beside, *(field.name for field in fields(cls))])
        return cls(**options)

    def __post_init__(self) -> None:
        if not isinstance(self.deterministic, bool):
            raise ParameterError("deterministic", self.deterministic, "True or False")
        if self.stall is not None:
            Range(0, 3600).check("stall", self.stall)

    def wanted(self, request: Request | None = None) -> Wanted:
        """What a request asks of caches, or what those do that do not say."""
        asked = [self.cache_type_k, self.cache_type_v, self.attention]
        if request is not None:
            own = (request.cache_type_k, request.cache_type_v, request.attention)
            asked = [
                usual if mine is None else mine for mine, usual in zip(own, asked, strict=True)
            ]
        keys, values, attention = asked
        window, keep, sparse = sparsity.options(attention)
        return Wanted(window, keep, keys, values, sparse)


class Accepted(NamedTuple):
    """A request that can be served.

    Attributes:
        request: it.
        wanted: what it asks of caches.
        limit: tokens that it may draw.
        cost: bytes that it takes at its longest.
    """

    request: Request
    wanted: Wanted
    limit: int
    cost: int


class Front:
    """Takes requests for a model and hands them to a service.

    Args:
        llm: the model and its tokenizer.
        parallel: the most sequences that are live at once; None for as many as ``context`` leaves
            room for, up to ``most``.
        context: tokens of each, prompt and reply; None for what there is room for.
        most: of sequences, where nobody says.
        queue: the most requests that wait.
        like: a request whose caches room is planned for; by default those of ``options``.
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
        options: Options,
        *,
        parallel: int | None,
        context: int | None = None,
        most: int,
        queue: int,
        like: Request | None = None,
        offline: bool = False,
    ) -> None:
        self._llm, self._options, self._context = llm, options, context
        self.prefixes = llm.sessions.prefixes(options.prefix_bytes)
        beside, usual = most_beside(offline=offline), math.inf if offline else STALL
        self._admission = Admission(
            llm,
            options.wanted(like),
            parallel,
            self.prefixes,
            context=context,
            most=most,
            beside=beside,
        )
        self.room = self._admission.room
        self.service = Service(
            llm.model,
            rows=parallel or self.room.parallel,
            queue=queue,
            memory=self._admission.memory,
            deterministic=options.deterministic,
            stall=usual if options.stall is None else options.stall,
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
        wanted = self._options.wanted(request)
        limit = self._llm.asker.limit(
            request, windowed=wanted.window is not None, context=self._context
        )
        cost = self._admission.cost(len(request.prompt), limit, wanted)
        return Accepted(request, wanted, limit, cost)

    def submit(self, accepted: Accepted, started: float, listener: Listener) -> int:
        """Queue a request; returns its key.

        Args:
            started: when it came, in seconds of ``time.perf_counter``; its deadline counts from
                there.
            listener: called with every chunk of its reply.
        """
        llm, (request, wanted, limit, cost) = self._llm, accepted
        reply = Reply(request, llm.tokenizer, limit, started)
        cache = llm.model.make_cache(**wanted._asdict())
        job = Job(request, llm.asker.sampler(request), reply, limit, cache, 0, listener)
        return self.service.submit(job, cost=cost, waited=time.perf_counter() - started)


class Admission:
    """Admits requests by the memory plan.

    Args:
        llm: the model.
        wanted: what requests ask of caches that do not say otherwise.
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
        wanted: Wanted,
        parallel: int | None,
        prefixes: PrefixCache,
        *,
        context: int | None = None,
        most: int = 1,
        beside: int | None = None,
    ) -> None:
        for name, size in (("parallel", parallel), ("context", context)):
            if size is not None:
                Range(1, whole=True).check(name, size)
        self._llm, self._prefixes, self._beside = llm, prefixes, beside or most_beside()
        self._plan = lru_cache(_KINDS)(self._plan_of)
        self._usual = plan = self._plan(wanted)
        self.room: Room = plan.room(parallel, context, most=most, longest=llm.context_length)
        self.memory = plan.available(self.room.context, self.room.parallel)
        self._shared = llm.model.joint and (parallel or self.room.parallel) > 1

    def cost(self, prompt_tokens: int, limit: int, wanted: Wanted | None = None) -> int:
        """Bytes that a request takes at its longest.

        Args:
            wanted: what it asks of caches, if not what the others do.

        Raises:
            MemoryLimitError: it could not run even alone.
            ParameterError, CacheError: the model cannot have such caches.
        """
        plan = self._usual if wanted is None else self._plan(wanted)
        cost = plan.cost(prompt_tokens, limit)
        if self._shared:  # idle rows keep their memory until they are this share of all
            cost += cost // (IDLE_SHARE - 1)
        if plan is not self._usual:  # whose scratch is set aside; what this one takes beyond it
            tokens = prompt_tokens + limit
            cost += max(0, plan.terms(tokens).scratch - self._usual.terms(tokens).scratch)
        if self.memory is not None and cost > self.memory:
            raise MemoryLimitError(cost, self.memory)
        return cost

    def _plan_of(self, wanted: Wanted) -> MemoryPlan:
        llm = self._llm
        with COMPUTING:
            llm.model.make_cache(**wanted._asdict())  # refuses types that do not fit
            return plan_loaded(
                llm.model,
                llm.config,
                cache=wanted,
                prefill_tokens=self._beside,
                prefix_bytes=self._prefixes.budget,
                used_prefix_bytes=self._prefixes.nbytes,
            )
