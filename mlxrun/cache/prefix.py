"""What earlier sequences computed for beginnings that later ones share.

Keys and values of tokens live in a radix tree, each node with those of its tokens. What cannot be
told apart by token (a window that has dropped tokens, a recurrent state) is kept as snapshots at
the ends of nodes. Knows neither models nor requests; whoever calls sees to it that one thread does
so at a time.

Where ``step`` is not 1, lengths are its multiples: an engine that reads prompts in chunks of that
length computes from there what it computes from the beginning, operation for operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import mlx.core as mx

from mlxrun.cache.base import Memory, Named, State
from mlxrun.cache.beginnings import Beginnings, branches, sharing, whole
from mlxrun.cache.branch import BranchCache
from mlxrun.cache.dense import DenseCache
from mlxrun.cache.radix import Match, Node, RadixTree
from mlxrun.cache.store import copied
from mlxrun.errors import CacheError

WORTH = 16


@dataclass(frozen=True)
class Segment:
    """What the tokens of a node left behind in each memory: arrays (1, H, T, ...)."""

    parts: tuple[Named, ...]

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for part in self.parts for array in part.values()]

    def split(self, at: int) -> tuple[Self, Self]:
        first = tuple({n: copied(a, 0, at) for n, a in part.items()} for part in self.parts)
        second = tuple(
            {n: copied(a, at, a.shape[2]) for n, a in part.items()} for part in self.parts
        )
        halves = type(self)(first), type(self)(second)
        _queue(*halves)
        return halves


@dataclass(frozen=True)
class Snapshot:
    """What each memory held at a place in time; None for one that has no state."""

    states: tuple[State | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states if state)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for state in self.states if state for array in state.arrays.values()]


Place = Node[Segment, Snapshot]


class Lease:
    """What a sequence uses of a cache; it stays there until it is released."""

    def __init__(self, node: Place, length: int) -> None:
        self._node: Place | None = node
        self.length = length
        node.users += 1

    def release(self) -> None:
        """Let go of it; doing so twice does nothing."""
        if self._node is not None:
            self._node.users -= 1
            self._node = None


class Figures(NamedTuple):
    """What a cache is worth so far.

    Attributes:
        lookups, hits: sequences that asked, and those that found something.
        tokens: that need not be computed again.
        nbytes: what the cache takes now.
        budget: what it may take.
        evicted: nodes dropped.
    """

    lookups: int
    hits: int
    tokens: int
    nbytes: int
    budget: int
    evicted: int


class PrefixCache:
    """Beginnings that later sequences may share.

    Args:
        budget: bytes that it may take; 0 keeps nothing.
        worth: tokens that are worth a copy, or a wait for another sequence that reads them.
    """

    def __init__(self, budget: int, *, worth: int = WORTH) -> None:
        self._budget, self.worth = budget, worth
        self._tree: RadixTree[Segment, Snapshot] = RadixTree()
        self._beginnings = Beginnings()
        self._lookups = self._hits = self._tokens = 0

    @property
    def budget(self) -> int:
        """Bytes that it may take; what is too much when that changes is dropped."""
        return self._budget

    @budget.setter
    def budget(self, nbytes: int) -> None:
        self._budget = nbytes
        self._tree.evict(nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._tree.nbytes

    @property
    def figures(self) -> Figures:
        done, tree = (self._lookups, self._hits, self._tokens), self._tree
        return Figures(*done, tree.nbytes, self.budget, tree.evicted)

    def reach(self, tokens: Sequence[int], like: Sequence[Memory], step: int = 1) -> int:
        """How many of some tokens memories like these could take over."""
        return max((length for length, _ in self._ways(tokens, like, step)), default=0)

    def known(self, tokens: Sequence[int], like: Sequence[Memory], step: int = 1) -> int:
        """How many of some tokens are in the tree, whether they can be taken over or not."""
        return self._tree.match(_tree_of(like, step), tokens).length

    def restore(
        self,
        tokens: Sequence[int],
        memories: list[Memory],
        step: int = 1,
        *,
        share: int = 0,
        least: int = 1,
    ) -> Lease | None:
        """Put memories that hold as many of some tokens as are known in place of empty ones.

        Args:
            share: how many of the first tokens not to copy but to hold together with others.
            least: how many must be known for that.

        Returns:
            What is used of the cache; None if too little is known.
        """
        self._lookups += 1
        for length, node in self._ways(tokens, memories, step):
            if length < least:
                break
            joint = 0 < share <= length
            like = self._branches(tokens[:share], memories, step) if joint else memories
            try:
                memories[:] = _restored(like, node, length)
            except CacheError:  # a state from which there is no way back
                continue
            self._tree.use(node)
            self._hits += 1
            self._tokens += length
            return Lease(node, length)
        return None

    def share(self, tokens: Sequence[int], memories: list[Memory], step: int = 1) -> None:
        """Let memories that hold some first tokens, and more, hold them together with others."""
        if self.known(tokens, memories, step) < len(tokens):
            return
        for i, branch in enumerate(self._branches(tokens, memories, step)):
            own = memories[i]
            if isinstance(branch, BranchCache) and isinstance(own, DenseCache) and branch != own:
                branch.follow(own)
                memories[i] = branch

    def shared(self, tokens: Sequence[int], like: Sequence[Memory], step: int = 1) -> list[int]:
        """How many of some first tokens sequences hold together by now, the most first."""
        return self._beginnings.lengths(_tree_of(like, step), tokens)

    def _branches(self, tokens: Sequence[int], like: Sequence[Memory], step: int) -> list[Memory]:
        """Memories that hold some known tokens together with others, where they can."""
        if not any(map(sharing, like)):
            return list(like)
        tree = _tree_of(like, step)
        beginning = self._beginnings.get(tree, tokens)
        if beginning is None:
            node = self._tree.end(tree, tokens)
            parts = whole(_segments(node), like)
            if all(map(sharing, like)):
                self._tree.merge(node, Segment(tuple(parts)))
            beginning = self._beginnings.add(tree, tokens, parts)
        return branches(beginning, like)

    def insert(self, tokens: Sequence[int], memories: Sequence[Memory], step: int = 1) -> None:
        """Keep what memories of one row hold of some tokens.

        Args:
            tokens: all that they have seen, or less: then no snapshot is taken. Those that are not
                settled are left out.
        """
        settled = min(len(tokens), *(memory.settled for memory in memories))
        tokens = tokens[: settled // step * step]
        if not self.budget or not tokens or not _kept(memories):
            return
        whole = len(tokens) == memories[0].offset and not _by_token(memories)
        tree = _tree_of(memories, step)
        match = self._tree.match(tree, tokens)
        if match.length == len(tokens) and not whole:
            self._tree.use(match.node)
            return
        node = self._tree.insert(
            tree,
            tokens,
            lambda start, stop: Segment(tuple(memory.cut(start, stop) for memory in memories)),
        )
        new = whole and node.kept is None
        if new:
            self._tree.keep(node, Snapshot(tuple(memory.snapshot() for memory in memories)))
        self._tree.evict(self.budget)
        if new and self._tree.nbytes > self.budget:  # all is in use, the node as well
            self._tree.keep(node, None)
        assert node.segment is not None
        if node in self._tree:
            _queue(node.segment, node.kept)

    def clear(self) -> None:
        """Forget everything that no sequence uses."""
        self._tree.clear()

    def _ways(
        self, tokens: Sequence[int], like: Sequence[Memory], step: int
    ) -> Iterator[tuple[int, Place]]:
        """How many tokens could be taken over and from where, the most first."""
        if not _kept(like):
            return
        match = self._tree.match(_tree_of(like, step), tokens)
        length = match.length // step * step
        if _by_token(like):
            if length:
                yield length, match.node
            return
        yield from _snapshots(Match(match.node, length))


def _snapshots(match: Match[Segment, Snapshot]) -> Iterator[tuple[int, Place]]:
    """Places with a snapshot: at a match or else the first behind it, then those before it."""
    node, length = match
    before = [place for place in reversed(node.path()) if place.kept and place.end <= length]
    if length and not (before and before[0].end == length):
        below: Place | None = node
        while below is not None and (below.kept is None or below.end < length):
            below = next(reversed(below.children.values()), None)
        if below is not None:
            yield length, below
    for place in before:
        yield place.end, place


def _restored(empty: Sequence[Memory], node: Place, length: int) -> list[Memory]:
    parts = _segments(node)
    states = node.kept.states if node.kept else (None,) * len(empty)
    memories = [memory.fork() for memory in empty]
    for i, (memory, state) in enumerate(zip(memories, states, strict=True)):
        memory.restore([part[i] for part in parts], state, length)
    return memories


def _segments(node: Place) -> list[tuple[Named, ...]]:
    """What the tokens up to the end of a node left behind."""
    return [before.segment.parts for before in node.path() if before.segment]


def _tree_of(memories: Sequence[Memory], step: int) -> tuple[object, ...]:
    return (step, *(memory.kind for memory in memories))


def _kept(memories: Sequence[Memory]) -> bool:
    return all(memory.kind for memory in memories)


def _by_token(memories: Sequence[Memory]) -> bool:
    return all(memory.by_token for memory in memories)


def _queue(*parts: Segment | Snapshot | None) -> None:
    """Compute copies now: until then they hold on to what they are copied from."""
    mx.async_eval([a for part in parts if part for a in part.arrays])  # type: ignore[no-untyped-call]
