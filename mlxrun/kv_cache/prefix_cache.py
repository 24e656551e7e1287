"""K/V of prefixes that later sequences reuse.

Keys and values of tokens lie in a radix tree, each node with those of its tokens. What cannot be
sliced by token (a window that has evicted tokens, a recurrent state) is stored as snapshots at the
ends of nodes. Not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakValueDictionary

import mlx.core as mx

from mlxrun.errors import CacheError
from mlxrun.kv_cache.base import Arrays, KVCache, Segment, State
from mlxrun.kv_cache.dense import DenseCache, copied, joined
from mlxrun.kv_cache.shared_prefix import SharedPrefix, SharedPrefixCache, can_share

# Tokens from which a prefix is worth a copy, or a wait for another sequence that prefills it.
MIN_PREFIX_LEN = 16
# Bytes of a token in a node besides its K/V: its id, and a share of the node.
TOKEN_BYTES = 32
# Tokens that are compared at once.
STRIDE = 64


@dataclass(eq=False, slots=True)
class Node:
    """Some tokens that follow those of the parent.

    Attributes:
        tokens: at least one, but for a root.
        end: position after the last of them.
        segment: their K/V; None for a root.
        parent: None for a root.
        children: by their first token.
        states: of the caches at ``end``, if a snapshot was taken; None for a cache without one.
        users: how many sequences need the node to stay.
    """

    tokens: tuple[int, ...]
    end: int
    segment: Segment | None
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    states: Sequence[State | None] | None = None
    users: int = 0

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.end - len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the node without its descendants."""
        stored = (self.segment, *(self.states or ()))
        return TOKEN_BYTES * len(self.tokens) + sum(part.nbytes for part in stored if part)

    @property
    def arrays(self) -> list[mx.array]:
        states = [array for state in self.states or () if state for array in state.arrays.values()]
        return [*(self.segment.arrays if self.segment else ()), *states]

    def path(self) -> list[Node]:
        """The nodes from below the root to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class RadixTree:
    """Radix trees over token ids, each under a name; they share one LRU order and count of bytes.

    The order needs no clock. A use moves a node to its end, then the node's parent, and so on to
    the root: a node comes after all its descendants, and the first is a leaf.

    Attributes:
        nbytes: of all nodes.
        evicted: nodes evicted so far.
    """

    def __init__(self) -> None:
        self._roots: dict[Hashable, Node] = {}
        self._order: OrderedDict[Node, None] = OrderedDict()  # least recently used first
        self.nbytes = self.evicted = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, node: object) -> bool:
        return node in self._order

    def __iter__(self) -> Iterator[Node]:
        """All nodes but roots, the least recently used first."""
        return iter(self._order)

    def match(self, tree: Hashable, tokens: Sequence[int]) -> tuple[Node, int]:
        """The longest cached prefix; does not count as a use.

        Returns:
            The last node that shares a token with it, or a root; and the prefix's length, which may
            end within that node.
        """
        node = self._roots.get(tree) or Node((), 0, None, None)
        length, tokens = 0, tuple(tokens)
        while length < len(tokens):
            child = node.children.get(tokens[length])
            if child is None:
                break
            node = child
            same = common_prefix_len(node.tokens, tokens[length : length + len(node.tokens)])
            length += same
            if same < len(node.tokens):
                break
        return node, length

    def insert(
        self, tree: Hashable, tokens: Sequence[int], segment: Callable[[int, int], Segment]
    ) -> Node:
        """Make a node end after some tokens, at least one; counts as a use.

        Args:
            segment: makes the K/V from one position to another, for tokens that are not cached.
        """
        self._roots.setdefault(tree, Node((), 0, None, None))
        length = self.match(tree, tokens)[1]
        node = self.split_at(tree, tokens[:length])
        if length < len(tokens):
            new = Node(tuple(tokens[length:]), len(tokens), segment(length, len(tokens)), node)
            # An interrupt in between must not leave a node in the tree that is not in the order.
            self._order[new] = None
            self.nbytes += new.nbytes
            node.children[new.tokens[0]] = new
            node = new
        self.use(node)
        return node

    def split_at(self, tree: Hashable, tokens: Sequence[int]) -> Node:
        """Make a node end after some tokens, all of which are cached."""
        node, length = self.match(tree, tokens)
        return self._split(node, length) if length < node.end else node

    def merge(self, node: Node, segment: Segment) -> bool:
        """Replace a node and its ancestors by one node, unless something else needs those.

        Args:
            segment: K/V of all tokens up to the node's end.
        """
        *before, last = node.path()
        if any(len(one.children) > 1 or one.users or one.states for one in before):
            return False
        root = before[0].parent if before else None
        if root is None:
            return True
        self.nbytes -= sum(one.nbytes for one in (*before, last))
        node.tokens = tuple(token for one in (*before, last) for token in one.tokens)
        node.segment, node.parent = segment, root
        root.children[node.tokens[0]] = node
        for one in before:
            del self._order[one]
        self.nbytes += node.nbytes
        return True

    def set_snapshot(self, node: Node, states: Sequence[State | None] | None) -> None:
        self.nbytes -= node.nbytes
        node.states = states
        self.nbytes += node.nbytes

    def use(self, node: Node) -> None:
        """Count a node and its ancestors as used now."""
        for one in reversed(node.path()):
            self._order.move_to_end(one)

    def evict(self, budget: int) -> None:
        """Evict the least recently used nodes until at most ``budget`` bytes are left.

        Nodes with users stay, and so do their ancestors.
        """
        while self.nbytes > budget:
            free = (node for node in self._order if not node.children and not node.users)
            node = next(free, None)
            if node is None:
                return
            self.drop(node)

    def drop(self, node: Node) -> None:
        """Evict a node that has no children and no users."""
        assert node.parent is not None and not node.children and not node.users
        del node.parent.children[node.tokens[0]]
        del self._order[node]
        self.nbytes -= node.nbytes
        self.evicted += 1

    def _split(self, node: Node, end: int) -> Node:
        """A new parent of a node, with its tokens before ``end``; users stay with the rest."""
        assert node.parent is not None and node.segment is not None
        at = end - node.start
        before = node.nbytes
        first, second = _split_segment(node.segment, at)
        upper = Node(node.tokens[:at], end, first, node.parent)
        node.parent.children[upper.tokens[0]] = upper
        node.tokens, node.segment, node.parent = node.tokens[at:], second, upper
        upper.children[node.tokens[0]] = node
        self._order[upper] = None
        self.nbytes += upper.nbytes + node.nbytes - before
        return upper


def common_prefix_len(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences have in common."""
    most = min(len(one), len(other))
    for start in range(0, most, STRIDE):  # slices compare at the speed of C
        stop = min(start + STRIDE, most)
        if one[start:stop] != other[start:stop]:
            return next(i for i in range(start, stop) if one[i] != other[i])
    return most


class Lease:
    """The part of a prefix cache that a sequence uses; it is not evicted until released."""

    def __init__(self, node: Node, length: int) -> None:
        self._node: Node | None = node
        self.length = length
        node.users += 1

    def release(self) -> None:
        """Idempotent."""
        if self._node is not None:
            self._node.users -= 1
            self._node = None


class PrefixCacheStats(NamedTuple):
    """Counters of a prefix cache.

    Attributes:
        lookups, hits: sequences that looked for a prefix, and that found one.
        tokens: reused, summed over hits.
        nbytes, budget: bytes in use, and allowed.
        evicted: nodes evicted.
    """

    lookups: int
    hits: int
    tokens: int
    nbytes: int
    budget: int
    evicted: int


class PrefixCache:
    """K/V of prefixes, within a budget of bytes.

    Caches that are looked up, restored or inserted are those of all layers of one sequence. Where
    ``step`` is not 1, lengths are multiples of it: a prefill in chunks of that length then does the
    same operations as one from the start.

    Args:
        budget: bytes; 0 stores nothing.
        min_prefix_len: tokens from which a prefix is worth a copy, or a wait.
    """

    def __init__(self, budget: int, *, min_prefix_len: int = MIN_PREFIX_LEN) -> None:
        self._budget, self.min_prefix_len = budget, min_prefix_len
        self._tree = RadixTree()
        # Alive as long as some cache uses them.
        self._shared: WeakValueDictionary[tuple[Hashable, tuple[int, ...]], SharedPrefix]
        self._shared = WeakValueDictionary()
        self._lookups = self._hits = self._tokens = 0

    @property
    def budget(self) -> int:
        """Bytes allowed; setting it evicts what is too much."""
        return self._budget

    @budget.setter
    def budget(self, nbytes: int) -> None:
        self._budget = nbytes
        self._tree.evict(nbytes)

    @property
    def nbytes(self) -> int:
        return self._tree.nbytes

    @property
    def figures(self) -> PrefixCacheStats:
        counts, tree = (self._lookups, self._hits, self._tokens), self._tree
        return PrefixCacheStats(*counts, tree.nbytes, self.budget, tree.evicted)

    def num_reusable(self, tokens: Sequence[int], like: Sequence[KVCache], step: int = 1) -> int:
        """How many of some tokens :meth:`restore` would reuse."""
        return max((length for length, _ in self._candidates(tokens, like, step)), default=0)

    def matched_len(self, tokens: Sequence[int], like: Sequence[KVCache], step: int = 1) -> int:
        """How many of some tokens are in the tree, reusable or not."""
        return self._tree.match(_tree_of(like, step), tokens)[1]

    def restore(
        self,
        tokens: Sequence[int],
        caches: list[KVCache],
        step: int = 1,
        *,
        share_len: int = 0,
        min_len: int = 1,
    ) -> Lease | None:
        """Replace empty caches by ones with the longest reusable prefix of some tokens.

        Args:
            share_len: how many of the first tokens to share with others instead of copying.
            min_len: how many must be reusable.

        Returns:
            None if too few are.
        """
        self._lookups += 1
        for length, node in self._candidates(tokens, caches, step):
            if length < min_len:
                break
            shared = 0 < share_len <= length
            empty = self._sharing(tokens[:share_len], caches, step) if shared else caches
            try:
                caches[:] = _restored(empty, node, length)
            except CacheError:  # a state that cannot be truncated to the length
                continue
            self._tree.use(node)
            self._hits += 1
            self._tokens += length
            return Lease(node, length)
        return None

    def share(self, tokens: Sequence[int], caches: list[KVCache], step: int = 1) -> None:
        """Replace caches with some first tokens, and more, by ones that share those tokens."""
        if self.matched_len(tokens, caches, step) < len(tokens):
            return
        for i, other in enumerate(self._sharing(tokens, caches, step)):
            own = caches[i]
            if other is not own:
                assert isinstance(other, SharedPrefixCache) and isinstance(own, DenseCache)
                other.follow(own)
                caches[i] = other

    def shared_lens(
        self, tokens: Sequence[int], like: Sequence[KVCache], step: int = 1
    ) -> list[int]:
        """Lengths of prefixes of some tokens that sequences share by now, the longest first."""
        tree, given = _tree_of(like, step), tuple(tokens)
        alive = [prefix for known, prefix in self._shared if known == tree]
        return sorted((len(x) for x in alive if given[: len(x)] == x), reverse=True)

    def _sharing(self, tokens: Sequence[int], like: Sequence[KVCache], step: int) -> list[KVCache]:
        """Empty caches that share some cached tokens, for those caches that can."""
        if not any(map(can_share, like)):
            return list(like)
        tree = _tree_of(like, step)
        prefix = self._shared.get((tree, tuple(tokens)))
        if prefix is None:
            node = self._tree.split_at(tree, tokens)
            segments = zip(*_segments(node), strict=True)
            parts = tuple(
                _chain(segment) if can_share(cache) else {}
                for cache, segment in zip(like, segments, strict=True)
            )
            # With the same arrays in the tree, a shared prefix is in memory once.
            if all(map(can_share, like)):
                self._tree.merge(node, Segment(parts))
            prefix = self._shared[tree, tuple(tokens)] = SharedPrefix(parts, len(tokens))
            _evaluate(prefix.arrays)
        return [
            SharedPrefixCache(prefix, layer, cache.keys, cache.values)
            if isinstance(cache, DenseCache) and can_share(cache)
            else cache
            for layer, cache in enumerate(like)
        ]

    def insert(self, tokens: Sequence[int], caches: Sequence[KVCache], step: int = 1) -> None:
        """Store the K/V of some tokens in caches of one row.

        Args:
            tokens: all tokens of the caches; or fewer, without a snapshot. Those beyond the
                caches' ``reusable_len`` are left out.
        """
        reusable = min(len(tokens), *(cache.reusable_len for cache in caches))
        tokens = tokens[: reusable // step * step]
        if not self.budget or not tokens or not _storable(caches):
            return
        snapshot = len(tokens) == caches[0].offset and not _sliceable(caches)
        tree = _tree_of(caches, step)
        node, length = self._tree.match(tree, tokens)
        if length == len(tokens) and not snapshot:
            self._tree.use(node)
            return
        node = self._tree.insert(
            tree,
            tokens,
            lambda start, stop: Segment(tuple(c.slice_tokens(start, stop) for c in caches)),
        )
        new = snapshot and node.states is None
        if new:
            self._tree.set_snapshot(node, [cache.snapshot() for cache in caches])
        self._tree.evict(self.budget)
        if new and self._tree.nbytes > self.budget:  # all nodes are in use, this one as well
            self._tree.set_snapshot(node, None)
        if node in self._tree:
            _evaluate(node.arrays)

    def clear(self) -> None:
        """Evict everything that no sequence uses."""
        self._tree.evict(-1)

    def _candidates(
        self, tokens: Sequence[int], like: Sequence[KVCache], step: int
    ) -> Iterator[tuple[int, Node]]:
        """Lengths that could be reused and the nodes to restore from, the longest first."""
        if not _storable(like):
            return
        node, length = self._tree.match(_tree_of(like, step), tokens)
        length = length // step * step
        if not _sliceable(like):
            yield from _with_snapshot(node, length)
        elif length:
            yield length, node


def _with_snapshot(node: Node, length: int) -> Iterator[tuple[int, Node]]:
    """Nodes with a snapshot: at ``length`` or else the first after it, then those before it."""
    before = [place for place in reversed(node.path()) if place.states and place.end <= length]
    if length and not (before and before[0].end == length):
        below: Node | None = node
        while below is not None and (below.states is None or below.end < length):
            below = next(reversed(below.children.values()), None)
        if below is not None:
            yield length, below
    for place in before:
        yield place.end, place


def _restored(empty: Sequence[KVCache], node: Node, length: int) -> list[KVCache]:
    segments = _segments(node)
    states = node.states or [None] * len(empty)
    caches = [cache.fork() for cache in empty]
    for i, (cache, state) in enumerate(zip(caches, states, strict=True)):
        cache.restore([parts[i] for parts in segments], state, length)
    return caches


def _segments(node: Node) -> list[tuple[Arrays, ...]]:
    """K/V of the tokens up to the end of a node, one part per node."""
    return [one.segment.parts for one in node.path() if one.segment]


def _split_segment(segment: Segment, at: int) -> tuple[Segment, Segment]:
    """The first ``at`` tokens, and the others."""
    first, second = (
        Segment(
            tuple(
                {n: copied(a, start, stop or a.shape[2]) for n, a in part.items()}
                for part in segment.parts
            )
        )
        for start, stop in ((0, at), (at, 0))
    )
    _evaluate([*first.arrays, *second.arrays])
    return first, second


def _chain(parts: Sequence[Arrays]) -> Arrays:
    """Successive parts as one; a single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    length = sum(next(iter(part.values())).shape[2] for part in parts)
    return {name: joined(parts, name, length, length) for name in parts[0]}


def _tree_of(caches: Sequence[KVCache], step: int) -> Hashable:
    return (step, *(cache.layout_key for cache in caches))


def _storable(caches: Sequence[KVCache]) -> bool:
    return all(cache.layout_key for cache in caches)


def _sliceable(caches: Sequence[KVCache]) -> bool:
    return all(cache.sliceable for cache in caches)


def _evaluate(arrays: Iterable[mx.array]) -> None:
    """Compute copies now: until then they keep alive what they are copied from."""
    mx.async_eval(list(arrays))  # type: ignore[no-untyped-call]
