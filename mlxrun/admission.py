"""What may be served at once: the memory for sequences, and what each of them costs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mlxrun.cache.choice import Wanted
from mlxrun.errors import MemoryLimitError
from mlxrun.generation.serving import most_beside
from mlxrun.planning.source import plan_loaded

if TYPE_CHECKING:
    from mlxrun.llm import LLM

# Rows that have become idle keep their memory until there are too many: see ``generation.blocks``.
IDLE_SHARE = 4


class Admission:
    """Admits requests by the memory plan.

    Args:
        llm: the model.
        wanted: what is asked of caches.
        parallel: the most sequences that are live at once.
        kept: bytes that beginnings of prompts may take.

    Attributes:
        memory: bytes for live sequences; None where the system does not say what there is.
        context: tokens that each of ``parallel`` sequences may have.

    Raises:
        MemoryLimitError: there is no room for a single token of each.
    """

    def __init__(self, llm: LLM, wanted: Wanted, parallel: int, kept: int) -> None:
        plan = plan_loaded(llm.model, llm.config, cache=wanted, beside=most_beside())
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
        if self.memory is not None and cost > self.memory:
            raise MemoryLimitError(cost, self.memory)
        return cost + cost // IDLE_SHARE if self._shared else cost
