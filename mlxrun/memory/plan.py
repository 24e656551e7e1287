"""The memory plan: weights, KV caches, scratch and a reserve against a limit.

It refuses models before their weights are read, sizes engines, and tells ``mlxrun inspect`` what
fits (docs/memory.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlxrun.config import DEFAULT_CACHE, CacheConfig
from mlxrun.errors import MemoryLimitError
from mlxrun.kernels.device import device
from mlxrun.loader import DTYPES, Checkpoint, definition
from mlxrun.memory.device import LIMIT, bound_cache, machine_memory, room
from mlxrun.memory.footprint import Execution, Footprint, footprint
from mlxrun.model import Model, WeightStorage
from mlxrun.models.config import ModelConfig

# Left to the system and to Python besides the plan: a share of the rest, and a least.
RESERVE_SHARE, RESERVE_LEAST = 0.05, 64 << 20
# Prompt tokens in a pass of one sequence alone: mlxrun.engine.prefix_reuse.PREFILL_CHUNK.
ALONE = 512
# The longest context that is looked for.
LONGEST = 1 << 24
# Tokens of a conversation that a model should have room for.
USUAL = 4096


@dataclass(frozen=True)
class Terms:
    """A plan's terms, in bytes.

    Attributes:
        weights: of the model.
        sequence: KV cache of one sequence, in the capacity that its tokens need.
        parallel: sequences at once.
        scratch: of a pass, copies of caches that grow included.
        prefix_bytes: budget of the prefix cache.
        reserve: left free on purpose.
        limit: available bytes; 0 where the system does not say.
    """

    weights: int
    sequence: int
    parallel: int
    scratch: int
    prefix_bytes: int
    reserve: int
    limit: int

    @property
    def peak(self) -> int:
        """Allocated at most by weights and sequences."""
        return self.weights + self.sequence * self.parallel + self.scratch

    @property
    def needed(self) -> int:
        return self.peak + self.reserve

    @property
    def total(self) -> int:
        return self.needed + self.prefix_bytes

    @property
    def fits(self) -> bool:
        return not self.limit or self.total <= self.limit


class Room(NamedTuple):
    """What is served at once.

    Attributes:
        parallel: sequences at once.
        context: tokens that each of them may have, prompt and completion.
    """

    parallel: int
    context: int


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a model takes, for any number of sequences of any length.

    Attributes:
        footprint: besides its weights.
        weights: bytes.
        limit: available bytes; 0 where the system does not say.
        prefill_tokens: prompt tokens in a pass in which other sequences decode.
        prefix_bytes: budget of the prefix cache, bytes.
    """

    footprint: Footprint
    weights: int
    limit: int
    prefill_tokens: int = ALONE
    prefix_bytes: int = 0

    def terms(self, context: int, parallel: int = 1, *, prompt: int | None = None) -> Terms:
        """The terms for ``parallel`` sequences of ``context`` tokens.

        Args:
            prompt: tokens of each that are its prompt; by default all but the last.
        """
        prompt = max(1, context - 1) if prompt is None else prompt
        chunk = ALONE if parallel == 1 else self.prefill_tokens
        peak = self.footprint.peak(prompt, context, parallel, chunk=chunk)
        sequence = self.footprint.stored(context)
        reserve = max(RESERVE_LEAST, int(RESERVE_SHARE * (self.weights + peak)))
        scratch = peak - sequence * parallel
        return Terms(
            self.weights, sequence, parallel, scratch, self.prefix_bytes, reserve, self.limit
        )

    def context_for(self, parallel: int = 1) -> int:
        """The most tokens that each of several sequences may have; 0 if none fits."""
        return _most(lambda n: self.terms(n, parallel).fits)

    def parallel_for(self, context: int) -> int:
        """The most sequences of ``context`` tokens that fit at once; 0 if none does."""
        return _most(lambda n: self.terms(context, n).fits)

    def room(
        self, parallel: int | None = None, context: int | None = None, *, most: int, longest: int
    ) -> Room:
        """How many sequences of how many tokens to serve at once.

        Args:
            parallel, context: as requested; None for as many as fit. Where only ``parallel`` is
                given and there is not a token for each, fewer are planned for: the others wait.
            most: sequences at once where none are requested.
            longest: the model's context.

        Raises:
            MemoryLimitError: there is no room for the request, or for a single token.
        """
        if context is not None:
            fitting = parallel or min(most, self.parallel_for(context)) or 1
            self.check(context, fitting)
            return Room(fitting, min(context, longest))
        fitting = parallel or most
        if not self.context_for(fitting):
            fitting = max(1, self.parallel_for(1))
            self.check(1, fitting)
        return Room(fitting, min(longest, self.context_for(fitting)))

    def cost(self, tokens: int) -> int:
        """Bytes of the KV cache of one request at its longest."""
        return self.footprint.stored(tokens)

    def available(self, context: int, parallel: int) -> int | None:
        """Bytes for the KV caches of all running sequences; None where there is no limit.

        Args:
            context, parallel: the longest and the most sequences, which the scratch is planned for.
        """
        if not self.limit:
            return None
        terms = self.terms(context, parallel)
        return max(
            0, self.limit - (terms.weights + terms.scratch + terms.prefix_bytes + terms.reserve)
        )

    def check(self, context: int, parallel: int = 1) -> Terms:
        """The terms of sequences that are to run."""
        terms = self.terms(context, parallel)
        if not terms.fits:
            raise MemoryLimitError(terms.total, terms.limit)
        return terms


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number up to LONGEST that fits, given that all below one that fits do."""
    if fits(LONGEST):
        return LONGEST
    low, high = 0, LONGEST  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plan_source(
    source: Checkpoint,
    storage: WeightStorage,
    *,
    cache: CacheConfig = DEFAULT_CACHE,
    prefill_tokens: int = ALONE,
) -> MemoryPlan:
    """The plan of a model that is not loaded."""
    taken = footprint_of(source.definition, source.config, storage, cache)
    return MemoryPlan(taken, storage.nbytes, room(), prefill_tokens)


def plan_loaded(
    model: Model[Any],
    config: Mapping[str, Any],
    storage: WeightStorage,
    *,
    cache: CacheConfig = DEFAULT_CACHE,
    prefill_tokens: int = ALONE,
    prefix_bytes: int = 0,
    used_prefix_bytes: int = 0,
) -> MemoryPlan:
    """The plan of a loaded model: other models and sessions that MLX holds are no room for it.

    Args:
        config: its ``config.json``.
        storage: of its weights.
        cache: of its KV caches.
        prefill_tokens: prompt tokens in a pass in which other sequences decode.
        prefix_bytes: budget of the prefix cache, bytes.
        used_prefix_bytes: bytes in the prefix cache.
    """
    limit = room()
    if limit:
        limit = max(1, limit - _others(model.nbytes - model.mapped + used_prefix_bytes))
    taken = footprint_of(definition(config), config, storage, cache)
    return MemoryPlan(taken, model.nbytes, limit, prefill_tokens, prefix_bytes)


def _others(ours: int) -> int:
    """Bytes that MLX holds besides so many."""
    return max(0, mx.get_active_memory() - ours)


def footprint_of(
    defined: Any,
    config: Mapping[str, Any],
    storage: WeightStorage,
    cache: CacheConfig = DEFAULT_CACHE,
) -> Footprint:
    """The footprint of a model, ours or mlx-lm's, by its :func:`mlxrun.loader.definition`."""
    dtype = DTYPES[storage.dtype]
    if isinstance(defined, ModelConfig):
        return footprint(defined, Execution(dtype, device(), storage.packed, storage.fused, cache))
    from mlxrun.models.mlx_lm import sketch

    return sketch(defined, config, dtype).footprint(device())


def preflight(source: Checkpoint, storage: WeightStorage) -> None:
    """Refuse a model whose weights alone exceed memory; warn on stderr of one that barely fits.

    Also bounds the buffers that MLX keeps for reuse (:func:`mlxrun.memory.device.bound_cache`).
    """
    most = machine_memory()
    if most and storage.nbytes > most:
        raise MemoryLimitError(
            storage.nbytes,
            most,
            "to hold the weights alone",
            f"Use a smaller model or quantization; {LIMIT}=none in the environment tries it",
        )
    plan = plan_source(source, storage)
    trained = source.config.get("max_position_embeddings")
    context = min(USUAL, trained) if isinstance(trained, int) and trained > 0 else USUAL
    terms = plan.terms(context)
    if not terms.fits:
        longest = plan.context_for()
        holds = f"a context of about {longest} tokens" if longest else "hardly any context"
        print(
            f"warning: memory is tight: {terms.total / 1e9:.1f} GB for a context of {context} "
            f"tokens, and {plan.limit / 1e9:.1f} GB are free; there is room for {holds}",
            file=sys.stderr,
        )
    bound_cache(plan.weights)
