"""Bytes of KV caches, and how many sequences of how many tokens fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxrun.config import CacheConfig, Range
from mlxrun.engine.blocks import MAX_IDLE
from mlxrun.errors import MemoryLimitError
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.lock import device_lock
from mlxrun.memory.plan import MemoryPlan, Room, plan_loaded
from mlxrun.model import Model, WeightStorage

# Kinds of caches, and their costs, to cache.
_MAX_PLANS, _MAX_COSTS = 64, 1024


class KVBudget:
    """The memory plan of one engine.

    Args:
        model: the model.
        config: its ``config.json``.
        storage: of its weights.
        cache_config: of requests that do not say otherwise.
        prefix_cache: its budget is set aside.
        parallel: the most sequences that run at once; None for as many as fit, up to ``most``.
        context: tokens of each; None for as many as fit.
        chunk: prompt tokens of a step.

    Attributes:
        memory: bytes for KV caches; None where the system does not say.
        room: sequences at once, and tokens of each.

    Raises:
        ParameterError, CacheError: the model cannot have such caches.
        MemoryLimitError: ``parallel`` and ``context`` do not fit, or not a single token does.
    """

    def __init__(
        self,
        model: Model[Any],
        config: Mapping[str, Any],
        storage: WeightStorage,
        cache_config: CacheConfig,
        prefix_cache: PrefixCache,
        *,
        parallel: int | None,
        context: int | None,
        most: int,
        chunk: int,
    ) -> None:
        for name, size in (("parallel", parallel), ("context", context)):
            if size is not None:
                Range(1, whole=True).check(name, size)
        self._model, self._config, self._storage, self._chunk = model, config, storage, chunk
        self._prefix_cache = prefix_cache
        self._plans: dict[CacheConfig, MemoryPlan] = {}
        self._costs: dict[tuple[int, CacheConfig], int] = {}
        self._default_plan = plan = self._plan(cache_config)
        self.room: Room = plan.room(parallel, context, most=most, longest=model.context_length)
        self.memory = plan.available(self.room.context, self.room.parallel)
        self._has_idle_rows = model.joint and (parallel or self.room.parallel) > 1

    def check(self, tokens: int, cache_config: CacheConfig) -> None:
        """Refuse a request that could not run alone.

        Args:
            tokens: of its prompt and its longest output.

        Raises:
            MemoryLimitError: its KV cache does not fit.
            ParameterError, CacheError: the model cannot have such caches.
        """
        cost = self.cost(tokens, cache_config)
        if self.memory is not None and cost > self.memory:
            raise MemoryLimitError(cost, self.memory)

    def cost(self, tokens: int, cache_config: CacheConfig) -> int:
        """Bytes of the KV cache of a sequence of so many tokens."""
        key = tokens, cache_config
        if (cost := self._costs.get(key)) is None:  # another thread may clear them
            if len(self._costs) >= _MAX_COSTS:
                self._costs.clear()
            cost = self._costs[key] = self._cost(*key)
        return cost

    def _cost(self, tokens: int, cache_config: CacheConfig) -> int:
        plan = self._plan(cache_config)
        cost = plan.cost(tokens)
        if self._has_idle_rows:  # at most so many of all
            cost += int(cost * MAX_IDLE / (1 - MAX_IDLE))
        if plan is not self._default_plan:  # whose scratch is set aside
            cost += max(0, plan.terms(tokens).scratch - self._default_plan.terms(tokens).scratch)
        return cost

    def _plan(self, cache_config: CacheConfig) -> MemoryPlan:
        if (plan := self._plans.get(cache_config)) is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            with device_lock:
                self._model.make_cache(cache_config)  # refuses types that do not fit
                plan = self._plans[cache_config] = plan_loaded(
                    self._model,
                    self._config,
                    self._storage,
                    cache=cache_config,
                    prefill_tokens=self._chunk,
                    prefix_bytes=self._prefix_cache.budget,
                    used_prefix_bytes=self._prefix_cache.nbytes,
                )
        return plan
