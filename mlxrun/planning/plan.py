"""The memory plan: weights, keys and values of every sequence, scratch, a reserve; against a limit.

Knows bytes; where they come from is the business of :mod:`mlxrun.planning.native` and of mlx-lm's
counterpart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mlxrun.errors import MemoryLimitError
from mlxrun.footprint import Footprint

# What is left to the system and to Python besides the plan: a share of the rest, and a least.
RESERVE_SHARE, RESERVE_LEAST = 0.05, 64 << 20
# Tokens of a prompt in a pass of one sequence alone, as the engine reads it.
ALONE = 512
# The longest context that is looked for.
LONGEST = 1 << 24


@dataclass(frozen=True)
class Terms:
    """A plan's terms, in bytes.

    Attributes:
        weights: of the model.
        sequence: keys and values of one sequence, in the capacity that its tokens need.
        parallel: sequences at once.
        scratch: what a pass computes at once, copies of caches that grow among it.
        kept: what beginnings of prompts that are kept for later ones may take.
        reserve: left free on purpose.
        limit: what there is; 0 where the system does not say.
    """

    weights: int
    sequence: int
    parallel: int
    scratch: int
    kept: int
    reserve: int
    limit: int

    @property
    def peak(self) -> int:
        """What weights and sequences are expected to allocate at most."""
        return self.weights + self.sequence * self.parallel + self.scratch

    @property
    def needed(self) -> int:
        """The peak and the reserve."""
        return self.peak + self.reserve

    @property
    def total(self) -> int:
        """What is needed, and what may be kept."""
        return self.needed + self.kept

    @property
    def fits(self) -> bool:
        """Whether there is room for it; yes where the system does not say."""
        return not self.limit or self.total <= self.limit


class Room(NamedTuple):
    """What is served at once.

    Attributes:
        parallel: sequences at once.
        context: tokens that each of them may have, prompt and reply.
    """

    parallel: int
    context: int


@dataclass(frozen=True)
class MemoryPlan:
    """What running a model takes, for any number of sequences of any length.

    Attributes:
        footprint: what it takes besides its weights.
        weights: bytes.
        limit: bytes that there are for it; 0 where the system does not say.
        beside: tokens of prompts in a pass beside others that decode.
        kept: bytes that beginnings of prompts may take which are kept for later ones.
    """

    footprint: Footprint
    weights: int
    limit: int
    beside: int = ALONE
    kept: int = 0

    def terms(self, context: int, parallel: int = 1, *, prompt: int | None = None) -> Terms:
        """The terms for sequences of ``context`` tokens.

        Args:
            context: tokens of each sequence, prompt and reply.
            parallel: sequences at once.
            prompt: tokens of it that are read as a prompt; by default all but the last.
        """
        prompt = max(1, context - 1) if prompt is None else prompt
        chunk = ALONE if parallel == 1 else self.beside
        peak = self.footprint.peak(prompt, context, parallel, chunk=chunk)
        sequence = self.footprint.stored(context)
        reserve = max(RESERVE_LEAST, int(RESERVE_SHARE * (self.weights + peak)))
        scratch = peak - sequence * parallel
        return Terms(self.weights, sequence, parallel, scratch, self.kept, reserve, self.limit)

    def context_for(self, parallel: int = 1) -> int:
        """The most tokens that each of several sequences may have; 0 if none fits."""
        return _most(lambda n: self.terms(n, parallel).fits)

    def parallel_for(self, context: int) -> int:
        """The most sequences of ``context`` tokens that fit at once; 0 if none does."""
        return _most(lambda n: self.terms(context, n).fits)

    def room(
        self, parallel: int | None = None, context: int | None = None, *, most: int, longest: int
    ) -> Room:
        """How many sequences of how many tokens to serve at once: what is not given, as fits.

        Args:
            parallel, context: what is asked for. Where only ``parallel`` is and there is not a
                token for each of so many, fewer are planned for: the others wait.
            most: sequences at once where none are asked for.
            longest: the model's context.

        Raises:
            MemoryLimitError: there is no room for what is asked for, or for a single token.
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

    def cost(self, prompt_tokens: int, max_tokens: int) -> int:
        """Bytes that the caches of one request take at its longest."""
        return self.footprint.stored(prompt_tokens + max_tokens)

    def available(self, context: int, parallel: int) -> int | None:
        """Bytes that the caches of all live sequences may take; None where there is no limit.

        Args:
            context, parallel: the longest and the most sequences, which the scratch is planned for.
        """
        if not self.limit:
            return None
        terms = self.terms(context, parallel)
        rest = terms.weights + terms.scratch + terms.kept + terms.reserve
        return max(0, self.limit - rest)

    def check(self, context: int, parallel: int = 1) -> Terms:
        """The terms of what is to be run.

        Raises:
            MemoryLimitError: there is not that much memory.
        """
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
