"""A service for a model's requests: their caches, what each of them costs, and who fits at once.

What :mod:`mlxrun.batch` and :mod:`mlxrun.engine` share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mlxrun.cache import sparsity
from mlxrun.cache.choice import Wanted
from mlxrun.errors import MemoryLimitError, ParameterError
from mlxrun.generation.blocks import IDLE_SHARE
from mlxrun.generation.parameters import Range
from mlxrun.generation.reply import Reply
from mlxrun.generation.request import Request
from mlxrun.generation.serving import STALL, Job, Listener, Service, most_beside
from mlxrun.planning.source import plan_loaded

if TYPE_CHECKING:
    from mlxrun.llm import LLM


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
            drawn tokens attend to; see :meth:`LLM.session`.

    Raises:
        ParameterError: a value outside its range.
    """

    deterministic: bool = False
    stall: float | None = None
    prefix_bytes: int | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.deterministic, bool):
            raise ParameterError("deterministic", self.deterministic, "True or False")
        if self.stall is not None:
            Range(0, 3600).check("stall", self.stall)


class Front:
    """Takes requests for a model and hands them to a service.

    Args:
        llm: the model and its tokenizer.
        parallel: the most sequences that are live at once.
        queue: the most requests that wait.
        offline: nobody waits for a first token; only the whole counts.

    Attributes:
        service: what serves them.

    Raises:
        ParameterError, CacheError: the model cannot have such caches.
        MemoryLimitError: there is no room for a single token.
    """

    def __init__(
        self, llm: LLM, options: Options, *, parallel: int, queue: int, offline: bool = False
    ) -> None:
        self._llm = llm
        parallel = int(Range(1, whole=True).check("parallel", parallel))
        window, keep, sparse = sparsity.options(options.attention)
        wanted = Wanted(window, keep, options.cache_type_k, options.cache_type_v, sparse)
        self._windowed = window is not None
        self._make = partial(llm.model.make_cache, **wanted._asdict())
        self._make()  # types that do not fit are refused here, not with each request
        prefixes = llm.sessions.prefixes(options.prefix_bytes)
        beside, usual = most_beside(offline=offline), math.inf if offline else STALL
        self._admission = Admission(llm, wanted, parallel, prefixes.budget, beside=beside)
        self.service = Service(
            llm.model,
            rows=parallel,
            queue=queue,
            memory=self._admission.memory,
            deterministic=options.deterministic,
            stall=usual if options.stall is None else options.stall,
            beside=beside,
            prefixes=prefixes,
        )

    def limit(self, request: Request) -> int:
        """How many tokens a request may draw.

        Raises:
            ContextLengthError: the prompt leaves no room in the model's context.
            MemoryLimitError: there is never room for it.
        """
        limit = self._llm.asker.limit(request, windowed=self._windowed)
        self._admission.cost(len(request.prompt), limit)
        return limit

    def submit(self, request: Request, limit: int, started: float, listener: Listener) -> int:
        """Queue a request; returns its key.

        Args:
            started: when it came, in seconds of ``time.perf_counter``.
            listener: called with every chunk of its reply.
        """
        llm = self._llm
        reply = Reply(request, llm.tokenizer, limit, started)
        job = Job(request, llm.asker.sampler(request), reply, limit, self._make(), 0, listener)
        return self.service.submit(job, cost=self._admission.cost(len(request.prompt), limit))


class Admission:
    """Admits requests by the memory plan.

    Args:
        llm: the model.
        wanted: what is asked of caches.
        parallel: the most sequences that are live at once.
        kept: bytes that beginnings of prompts may take.
        beside: tokens of prompts in a step.

    Attributes:
        memory: bytes for live sequences; None where the system does not say what there is.
        context: tokens that each of ``parallel`` sequences may have.

    Raises:
        MemoryLimitError: there is no room for a single token of each.
    """

    def __init__(
        self, llm: LLM, wanted: Wanted, parallel: int, kept: int, *, beside: int | None = None
    ) -> None:
        beside = beside or most_beside()
        plan = plan_loaded(llm.model, llm.config, cache=wanted, beside=beside)
        plan = self._plan = replace(plan, kept=kept)
        if not plan.context_for(parallel):  # fewer at once, then, or none
            parallel = plan.parallel_for(1)
            plan.check(1, max(1, parallel))
        self.context = min(llm.context_length, plan.context_for(parallel))
        self.memory = plan.available(self.context, parallel)
        self._shared = llm.model.joint and parallel > 1

    def cost(self, prompt_tokens: int, limit: int) -> int:
        """Bytes that a request takes at its longest.

        Raises:
            MemoryLimitError: it could not run even alone.
        """
        cost = self._plan.cost(prompt_tokens, limit)
        if self._shared:  # idle rows keep their memory until they are this share of all
            cost += cost // (IDLE_SHARE - 1)
        if self.memory is not None and cost > self.memory:
            raise MemoryLimitError(cost, self.memory)
        return cost
