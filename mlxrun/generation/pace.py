"""How much of prompts to read in a step: as many tokens as take a time, not a number of them.

Standard library only. Who reads what of it is the scheduler's business.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from mlxrun.generation.scheduler import Budget

# The share of a step's tokens that is read however long the context.
LEAST = 4
# How many times as long as without context a step may take: the longer, the fewer steps a long
# prompt is read in, and the longer waits who comes meanwhile: half a step, on average.
LONGER = 1.5
# Steps to remember: what else uses the machine disturbs some of them, and medians forget those.
MEMORY = 9


class Pace:
    """What a step may read, learnt from how long the steps before it took.

    A step takes at most about ``LONGER`` times what ``most`` tokens without context take: so long
    waits who comes just after it has begun. What tokens of context add is measured.

    Args:
        stall: seconds by which those that decode may be delayed; infinite where nobody waits for a
            token: always ``most``, then.
        most: tokens, however short the delay.
    """

    def __init__(self, stall: float, most: int) -> None:
        self._stall, self._most = stall, most
        self._decoding = 0.0  # seconds of a step without prompts, smoothed
        self._costs: deque[float] = deque(maxlen=MEMORY)  # seconds of a token without context
        self._weights: deque[float] = deque(maxlen=MEMORY)  # of one of context, as a share of that

    @property
    def budget(self) -> Budget:
        """For the next step."""
        if math.isinf(self._stall):
            return Budget(self._most)
        weight = median(self._weights) if self._weights else 0.0
        return Budget(self._tokens, weight, max(1, self._most // LEAST), LONGER)

    @property
    def _tokens(self) -> int:
        if not self._costs:
            return self._most
        return max(1, int(min(self._most, self._stall / median(self._costs))))

    def note(self, tokens: int, behind: int, seconds: float, *, beside: bool) -> None:
        """Learn from a step.

        Args:
            tokens: of prompts that it read.
            behind: the sum over these of the context that their pieces began with.
            seconds: that it took.
            beside: whether somebody decoded beside it.
        """
        if not tokens:
            self._decoding = seconds if not self._decoding else 0.7 * self._decoding + 0.3 * seconds
            return
        seconds = max(seconds - (self._decoding if beside else 0.0), 1e-6)
        if behind < tokens * self._most:
            if 2 * tokens >= self._tokens:  # fewer tell what a step costs, not what a token does
                self._costs.append(seconds / tokens)
        elif self._costs:
            self._weights.append(max(0.0, seconds / median(self._costs) - tokens) / behind)
