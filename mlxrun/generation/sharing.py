"""What sequences that are served together take from a prefix cache, and leave in it.

Knows when: a sequence looks for its beginning when its turn comes to read, not when it arrives, so
that it finds what those before it have read meanwhile. One that would read what another is reading
just now waits for it. How beginnings are kept is in ``cache.prefix``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from mlxrun.generation.batch import Live
from mlxrun.generation.engine import PREFILL_CHUNK
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.dense import bucket
from mlxrun.kv_cache.prefix_cache import (
    Lease,
    PrefixCache,
    SharedPrefix,
    common_prefix_len,
    shared_prefix_of,
)

# Tokens of a prompt after which what has been read so far is kept.
EVERY = PREFILL_CHUNK
# Tokens from which it pays to hold a beginning together, and to meet it in a product of its own.
SHARED = 256
# What share of the tokens saved at best is enough for a beginning that others hold already.
NEARLY = 0.8


@dataclass
class _Use:
    """How one sequence uses the cache.

    Attributes:
        kinds: of its memories; only those of the same can share anything.
        lease: of what it took over.
        begun: whether it has looked.
        stops: where, besides, to keep what it has read.
        stored: up to where it has been kept.
        drawn: tokens of its reply.
        beginning: what it holds together with others.
    """

    kinds: tuple[str, ...]
    lease: Lease | None = None
    begun: bool = False
    stops: set[int] = field(default_factory=set)
    stored: int = 0
    drawn: list[int] = field(default_factory=list)
    beginning: SharedPrefix | None = None


class Sharing:
    """The sequences of one service and their prefix cache.

    Args:
        cache: where beginnings are kept.
        exact: take over only what leaves the operations of a cold start, in whole chunks.
    """

    def __init__(self, cache: PrefixCache, *, exact: bool) -> None:
        self.cache, self._step = cache, PREFILL_CHUNK if exact else 1
        self._uses: dict[Live, _Use] = {}
        self._waiting: set[Live] | None = None  # None: to be found out

    def admit(self, live: Live) -> None:
        """Note a sequence that is about to read its prompt."""
        kinds = tuple(memory.layout_key for memory in live.cache)
        self._uses[live] = _Use(kinds, begun=bool(live.read))
        self._waiting = None

    def waiting(self) -> set[Live]:
        """Sequences that had better read later: what others read now is theirs as well."""
        if self._waiting is None:
            self._waiting = {
                live for live, use in self._uses.items() if not use.begun and self._waits(live)
            }
        return self._waiting

    def reach(self, live: Live) -> int:
        """How many tokens of a prompt :meth:`begin` would take over now."""
        if self._uses[live].begun:
            return 0
        return self.cache.num_reusable(live.prompt[:-1], live.cache, self._step)

    def begin(self, live: Live) -> int:
        """Take over what is known of a prompt whose turn has come; returns the tokens."""
        use = self._uses[live]
        if use.begun:
            return 0
        use.begun, self._waiting = True, None
        prompt = live.prompt[:-1]  # the last token's logits are needed
        known = self.cache.num_cached(prompt, live.cache, self._step)
        share = self._together(live)
        use.lease = self.cache.restore(prompt, live.cache, self._step, share=share)
        use.beginning = shared_prefix_of(live.cache)
        live.read = use.stored = use.lease.length if use.lease else 0
        if known - live.read >= self.cache.min_prefix_len and self._step == 1:
            use.stops.add(known)  # seen for the second time: worth a snapshot
        return live.read

    def piece(self, live: Live, count: int) -> int:
        """How many of ``count`` tokens to read, so that no stop is passed."""
        stops = (live.read // EVERY * EVERY + EVERY, *self._uses[live].stops)
        return min(count, *(stop - live.read for stop in stops if stop > live.read))

    def read(self, live: Live) -> None:
        """Keep what a sequence has read, if it is at a stop or at the end of its prompt."""
        use = self._uses[live]
        at_stop = live.read % EVERY == 0 or live.read in use.stops
        if at_stop or live.read == len(live.prompt):
            self._keep(live, live.cache, live.prompt[: live.read])
        if live.read == len(live.prompt) and (share := self._together(live)):
            self.cache.share(live.prompt[:share], live.cache)
            use.beginning = shared_prefix_of(live.cache)

    @property
    def nbytes(self) -> int:
        """Bytes that live sequences hold together."""
        held = {use.beginning for use in self._uses.values()}
        return sum(beginning.nbytes for beginning in held if beginning)

    def spared(self, live: Live) -> int:
        """Bytes that a sequence does not need itself, since it holds its beginning with others."""
        beginning = self._uses[live].beginning
        if beginning is None:
            return 0
        slots = bucket(live.longest) - bucket(live.longest - beginning.length)
        return slots * beginning.nbytes // beginning.length

    def drew(self, live: Live, token: int) -> None:
        """Note a token of a reply."""
        self._uses[live].drawn.append(token)

    def end(self, live: Live, memories: Iterable[KVCache]) -> None:
        """Keep a sequence that has ended, its reply included."""
        use = self._uses.get(live)
        if use is None or live.read < len(live.prompt) or self._step > 1:
            return
        # The last token that was drawn may not have gone through the model.
        fed = len(live.prompt) + live.steps - 1
        known = (*live.prompt, *use.drawn)[:fed]
        self._keep(live, list(memories), known)

    def leave(self, live: Live) -> None:
        """Let go of what a sequence uses."""
        use = self._uses.pop(live, None)
        if use and use.lease:
            use.lease.release()
        self._waiting = None

    def _keep(self, live: Live, memories: list[KVCache], tokens: Iterable[int]) -> None:
        use, known = self._uses[live], tuple(tokens)
        if len(known) - use.stored >= self.cache.min_prefix_len:
            self.cache.insert(known, memories, self._step)
            use.stored, self._waiting = len(known), None

    def _together(self, live: Live) -> int:
        """How many first tokens of a prompt to hold together with others."""
        if self._step > 1:  # sums over two parts are rounded otherwise
            return 0
        prompt = cast(tuple[int, ...], live.prompt[:-1])
        common = [
            common_prefix_len(prompt, cast(tuple[int, ...], other.prompt[:-1]))
            for other, _ in self._others(live)
        ]
        known = self.cache.num_cached(prompt, live.cache, self._step)
        held = self.cache.shared_lens(prompt, live.cache, self._step)
        return together([min(n, known) for n in common], held)

    def _others(self, live: Live) -> Iterator[tuple[Live, _Use]]:
        """Those whose memories are like a sequence's."""
        kinds = self._uses[live].kinds
        for other, use in self._uses.items():
            if other is not live and use.kinds == kinds:
                yield other, use

    def _waits(self, live: Live) -> bool:
        if not self.cache.budget or not all(self._uses[live].kinds):
            return False
        prompt = live.prompt[:-1]
        reach = self.cache.num_reusable(prompt, live.cache, self._step)
        for other, use in self._others(live):
            if not use.begun or other.read >= len(other.prompt):
                continue
            common = common_prefix_len(
                cast(tuple[int, ...], prompt), cast(tuple[int, ...], other.prompt)
            )
            common = common // self._step * self._step
            if common - reach >= self.cache.min_prefix_len and other.read < common:
                use.stops.add(common)
                return True
        return False


def together(common: Sequence[int], held: Sequence[int]) -> int:
    """How many first tokens to hold together with others; none unless it pays.

    The fewer tokens, the more sequences may have them in common: what counts is how many tokens
    need not be held again. Those that are held together already are preferred to others that save
    little more, so that a group is not split by a word that some of it have in common.

    Args:
        common: how many each other sequence has in common.
        held: how many are held together already, of which any will do.
    """
    each = sorted((n for n in common if n >= SHARED), reverse=True)
    saved = {n: n * count for count, n in enumerate(each, 1)}
    if not saved:
        return 0
    best = max(saved, key=saved.__getitem__)
    again = {n: n * sum(one >= n for one in each) for n in held if n >= SHARED}
    likely = max(again, key=again.__getitem__, default=0)
    return likely if again.get(likely, 0) >= NEARLY * saved[best] else best
