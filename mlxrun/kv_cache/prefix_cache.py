"""K/V of prefixes that later sequences reuse, and K/V that sequences with one prefix share.

Keys and values of tokens lie in a radix tree, each node with those of its tokens. What cannot be
sliced by token (a window that has evicted tokens, a recurrent state) is stored as snapshots at the
ends of nodes. Not thread-safe.

Sequences that are decoded together may share a :class:`SharedPrefix` instead of copying it. The
queries of all rows attend to it in one product, so that it is read once for all of them: Hydragen
(Juravsky et al., 2024, arXiv:2402.05099). Scores of both parts are concatenated before the softmax,
so that nothing needs to be merged afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, Self, TypeVar
from weakref import WeakValueDictionary

import mlx.core as mx

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp, Mask
from mlxrun.kv_cache.base import Arrays, KVCache, State
from mlxrun.kv_cache.dense import DenseCache, Line, copied, joined
from mlxrun.kv_cache.formats import PLAIN, Format, StoredKV, as_stored, reads_packed

# Tokens from which a prefix is worth a copy, or a wait for another sequence that prefills it.
MIN_PREFIX_LEN = 16
# Bytes of a token in a node besides its K/V: its id, and a share of the node.
TOKEN_BYTES = 32
# Tokens that are compared at once.
STRIDE = 64
# Queries of a row from which the keys and values of both parts are concatenated for MLX's fused
# attention. On the CPU both ways take as long from 16 to 64.
CONCATENATE_FROM = 32


class SharedPrefix:
    """K/V of the first tokens of some sequences, shared by all of them and never changed.

    Attributes:
        length: how many tokens.
        parts: of each cache of a model, arrays (1, H, length, ...); none where it is not shared.
    """

    def __init__(self, length: int, parts: Sequence[Arrays]) -> None:
        self.length, self.parts = length, tuple(parts)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for part in self.parts for array in part.values()]

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)


class SharedPrefixCache(DenseCache):
    """The tokens after a shared prefix; the token at position p lies in slot ``p - prefix.length``.

    All rows of a cache have the same prefix, which cannot be truncated.

    Args:
        layer: which of the prefix's parts is this layer's.
    """

    def __init__(
        self, prefix: SharedPrefix, layer: int, keys: Format = PLAIN, values: Format = PLAIN
    ) -> None:
        super().__init__(keys, values, Line(prefix.length))
        self.prefix, self._layer = prefix, layer
        self.offsets, self.written = [prefix.length], [prefix.length]

    def empty(self) -> Self:
        return type(self)(self.prefix, self._layer, self.keys, self.values)

    def bare(self) -> Self:
        without = SharedPrefix(self.prefix.length, ())
        return type(self)(without, self._layer, self.keys, self.values)

    @property
    def fixed(self) -> list[mx.array]:
        return list(self.prefix.parts[self._layer].values())

    def attend_stored(
        self,
        op: AttentionOp,
        queries: mx.array,
        keys: StoredKV,
        values: StoredKV,
        mask: Mask,
        fixed: Sequence[mx.array],
    ) -> mx.array:
        k, v, mask = self._with_prefix(keys, values, mask, fixed)
        if not reads_packed(keys, values, queries):
            if queries.shape[2] >= CONCATENATE_FROM:
                return op(queries, k.unpacked(), v.unpacked(), mask)
            k, v = (PrefixedKV(_unpacked(x.prefix), _unpacked(x.own)) for x in (k, v))
        elif not reads_packed(k.prefix, v.prefix, _fold(queries)):
            k, v = (PrefixedKV(_unpacked(x.prefix), x.own) for x in (k, v))
        return op.attend_quantized(queries, k, v, mask)

    def _with_prefix(
        self, keys: StoredKV, values: StoredKV, mask: Mask, fixed: Sequence[mx.array]
    ) -> tuple[PrefixedKV, PrefixedKV, Mask]:
        split = len(keys.arrays)
        if mask is not None and not isinstance(mask, str):  # "causal" is aligned at the lower right
            every = mx.ones((*mask.shape[:3], self.prefix.length), mx.bool_)
            mask = mx.concatenate([every, mask], axis=-1)
        return (
            PrefixedKV(keys._replace(arrays=tuple(fixed[:split])), keys),
            PrefixedKV(values._replace(arrays=tuple(fixed[split:])), values),
            mask,
        )

    def _check_truncation(self, row: int, length: int) -> None:
        if length < self.prefix.length:
            raise CacheError(
                f"cannot go back {self.offsets[row] - length} tokens: others share the first "
                f"{self.prefix.length}"
            )

    @property
    def layout_key(self) -> str:
        return f"DenseCache {self.keys} {self.values}"  # tokens have the same K/V in both

    @property
    def batch_key(self) -> Hashable:
        return self.layout_key, self.prefix

    def slice_tokens(self, start: int, stop: int) -> Arrays:
        length = self.prefix.length
        own = {str(i): a for i, a in enumerate(self._store.arrays)}
        if start >= length:
            return {n: copied(a, start - length, stop - length) for n, a in own.items()}
        parts = self.prefix.parts[self._layer]
        if stop > length:
            parts = {
                n: mx.concatenate([a, own[n][:, :, : stop - length]], axis=2)
                for n, a in parts.items()
            }
        return {n: copied(a, start, stop) for n, a in parts.items()}

    def restore(self, tokens: Sequence[Arrays], state: State | None, length: int) -> None:
        if state is not None:
            raise CacheError("some of its tokens saw only a part of those before them")
        start = self.prefix.length
        self.offsets, self.written = [length], [length]
        if length > start:
            self._fill(list(_from(tokens, start)), length - start)

    def follow(self, whole: DenseCache) -> None:
        """Take the tokens after the prefix from a cache with all of them."""
        own = whole.slice_tokens(self.prefix.length, whole.offset)
        self.restore([self.prefix.parts[self._layer], own], None, whole.offset)
        self.prompt = whole.prompt

    def clear(self, row: int) -> None:
        self.offsets[row] = self.written[row] = self.prefix.length


def shared_prefix_of(caches: Iterable[object]) -> SharedPrefix | None:
    """The prefix that a sequence's caches share with other sequences; None if there is none."""
    return next((cache.prefix for cache in caches if isinstance(cache, SharedPrefixCache)), None)


class PrefixedKV(NamedTuple):
    """Keys or values of a shared prefix and of each row.

    Attributes:
        prefix: of one row, P tokens.
        own: of each row, (R, ...).
    """

    prefix: StoredKV
    own: StoredKV

    @property
    def format(self) -> Format:
        return self.own.format

    @property
    def heads(self) -> int:
        return self.own.heads

    def unpacked(self) -> mx.array:
        """Floating-point numbers, (R, H, P + S, D)."""
        prefix, own = self.prefix.unpacked(), self.own.unpacked()
        prefix = mx.broadcast_to(prefix, (own.shape[0], *prefix.shape[1:]))
        return mx.concatenate([prefix, own], axis=2)

    def dot(self, queries: mx.array) -> mx.array:
        """Products with every token: (R, H, N, D) to (R, H, N, P + S)."""
        prefix = _unfold(self.prefix.dot(_fold(queries)), queries.shape[0])
        return mx.concatenate([prefix, self.own.dot(queries)], axis=-1)

    def mix(self, weights: mx.array) -> mx.array:
        """Weighted sums of all tokens: (R, H, N, P + S) to (R, H, N, D)."""
        length = int(self.prefix.arrays[0].shape[2])
        prefix, own = mx.split(weights, [length], axis=-1)
        return _unfold(self.prefix.mix(_fold(prefix)), weights.shape[0]) + self.own.mix(own)


def _fold(x: mx.array) -> mx.array:
    """Queries of all rows as those of one row: (R, H, N, X) to (1, H, R N, X)."""
    rows, heads, count, width = x.shape
    return x.swapaxes(0, 1).reshape(1, heads, rows * count, width)


def _unfold(x: mx.array, rows: int) -> mx.array:
    """(1, H, R N, X) to (R, H, N, X)."""
    _, heads, _, width = x.shape
    return x.reshape(heads, rows, -1, width).swapaxes(0, 1)


def _unpacked(stored: StoredKV) -> StoredKV:
    return as_stored(stored.unpacked())


def _from(parts: Sequence[Arrays], start: int) -> Iterator[Arrays]:
    """The tokens from position ``start`` on of successive parts."""
    for part in parts:
        length = next(iter(part.values())).shape[2]
        if length > start:
            yield {name: array[:, :, start:] for name, array in part.items()}
        start = max(0, start - length)


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


class Splittable(Sized, Protocol):
    def split(self, at: int) -> tuple[Self, Self]:
        """The first ``at`` tokens, and the others."""


S = TypeVar("S", bound=Splittable)
K = TypeVar("K", bound=Sized)


@dataclass(eq=False, slots=True)
class Node(Generic[S, K]):
    """Some tokens that follow those of the parent.

    Attributes:
        tokens: at least one, but for a root.
        end: position after the last of them.
        segment: their K/V; None for a root.
        parent: None for a root.
        children: by their first token.
        snapshot: at ``end``, if one was taken.
        users: how many sequences need the node to stay.
    """

    tokens: tuple[int, ...]
    end: int
    segment: S | None
    parent: Node[S, K] | None
    children: dict[int, Node[S, K]] = field(default_factory=dict)
    snapshot: K | None = None
    users: int = 0

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.end - len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the node without its descendants."""
        stored = (self.segment, self.snapshot)
        return TOKEN_BYTES * len(self.tokens) + sum(part.nbytes for part in stored if part)

    def path(self) -> list[Node[S, K]]:
        """The nodes from below the root to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Match(NamedTuple, Generic[S, K]):
    """The longest cached prefix of a sequence.

    Attributes:
        node: the last that shares a token with it; a root if none does.
        length: tokens of the prefix, which may end within the node.
    """

    node: Node[S, K]
    length: int


class RadixTree(Generic[S, K]):
    """Radix trees over token ids, each under a name; they share one LRU order and count of bytes.

    The order needs no clock. A use moves a node to its end, then the node's parent, and so on to
    the root: a node comes after all its descendants, and the first is a leaf.

    Attributes:
        nbytes: of all nodes.
        evicted: nodes evicted so far.
    """

    def __init__(self) -> None:
        self._roots: dict[Hashable, Node[S, K]] = {}
        self._order: OrderedDict[Node[S, K], None] = OrderedDict()  # least recently used first
        self.nbytes = self.evicted = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, node: object) -> bool:
        return node in self._order

    def __iter__(self) -> Iterator[Node[S, K]]:
        """All nodes but roots, the least recently used first."""
        return iter(self._order)

    def match(self, tree: Hashable, tokens: Sequence[int]) -> Match[S, K]:
        """The longest cached prefix; does not count as a use."""
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
        return Match(node, length)

    def insert(
        self, tree: Hashable, tokens: Sequence[int], segment: Callable[[int, int], S]
    ) -> Node[S, K]:
        """Make a node end after some tokens, at least one; counts as a use.

        Args:
            segment: makes the K/V from one position to another, for tokens that are not cached.
        """
        self._roots.setdefault(tree, Node((), 0, None, None))
        length = self.match(tree, tokens).length
        node = self.end(tree, tokens[:length])
        if length < len(tokens):
            new = Node(tuple(tokens[length:]), len(tokens), segment(length, len(tokens)), node)
            # An interrupt in between must not leave a node in the tree that is not in the order.
            self._order[new] = None
            self.nbytes += new.nbytes
            node.children[new.tokens[0]] = new
            node = new
        self.use(node)
        return node

    def end(self, tree: Hashable, tokens: Sequence[int]) -> Node[S, K]:
        """Make a node end after some tokens, all of which are cached."""
        node, length = self.match(tree, tokens)
        return self._split(node, length) if length < node.end else node

    def merge(self, node: Node[S, K], segment: S) -> bool:
        """Replace a node and its ancestors by one node, unless something else needs those.

        Args:
            segment: K/V of all tokens up to the node's end.
        """
        *before, last = node.path()
        if any(len(one.children) > 1 or one.users or one.snapshot for one in before):
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

    def set_snapshot(self, node: Node[S, K], snapshot: K | None) -> None:
        self.nbytes -= node.nbytes
        node.snapshot = snapshot
        self.nbytes += node.nbytes

    def use(self, node: Node[S, K]) -> None:
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

    def drop(self, node: Node[S, K]) -> None:
        """Evict a node that has no children and no users."""
        assert node.parent is not None and not node.children and not node.users
        del node.parent.children[node.tokens[0]]
        del self._order[node]
        self.nbytes -= node.nbytes
        self.evicted += 1

    def _split(self, node: Node[S, K], end: int) -> Node[S, K]:
        """A new parent of a node, with its tokens before ``end``; users stay with the rest."""
        assert node.parent is not None and node.segment is not None
        at = end - node.start
        before = node.nbytes
        first, second = node.segment.split(at)
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


@dataclass(frozen=True)
class Segment:
    """K/V of a node's tokens in each cache: arrays (1, H, T, ...)."""

    parts: tuple[Arrays, ...]

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for part in self.parts for array in part.values()]

    def split(self, at: int) -> tuple[Self, Self]:
        first, second = (
            type(self)(
                tuple(
                    {n: copied(a, start, stop or a.shape[2]) for n, a in part.items()}
                    for part in self.parts
                )
            )
            for start, stop in ((0, at), (at, 0))
        )
        _evaluate([*first.arrays, *second.arrays])
        return first, second


@dataclass(frozen=True)
class Snapshot:
    """The state of each cache at one offset; None for a cache that has no state."""

    states: tuple[State | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states if state)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for state in self.states if state for array in state.arrays.values()]


Place = Node[Segment, Snapshot]


class Lease:
    """The part of a prefix cache that a sequence uses; it is not evicted until released."""

    def __init__(self, node: Place, length: int) -> None:
        self._node: Place | None = node
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
        self._tree: RadixTree[Segment, Snapshot] = RadixTree()
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

    def num_cached(self, tokens: Sequence[int], like: Sequence[KVCache], step: int = 1) -> int:
        """How many of some tokens are in the tree, reusable or not."""
        return self._tree.match(_tree_of(like, step), tokens).length

    def restore(
        self,
        tokens: Sequence[int],
        caches: list[KVCache],
        step: int = 1,
        *,
        share: int = 0,
        least: int = 1,
    ) -> Lease | None:
        """Replace empty caches by ones with the longest reusable prefix of some tokens.

        Args:
            share: how many of the first tokens to share with other sequences instead of copying.
            least: how many must be reusable.

        Returns:
            None if too few are.
        """
        self._lookups += 1
        for length, node in self._candidates(tokens, caches, step):
            if length < least:
                break
            shared = 0 < share <= length
            empty = self._sharing(tokens[:share], caches, step) if shared else caches
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
        if self.num_cached(tokens, caches, step) < len(tokens):
            return
        for i, (own, other) in enumerate(
            zip(caches, self._sharing(tokens, caches, step), strict=True)
        ):
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
        if not any(map(_can_share, like)):
            return list(like)
        tree = _tree_of(like, step)
        prefix = self._shared.get((tree, tuple(tokens)))
        if prefix is None:
            node = self._tree.end(tree, tokens)
            segments = zip(*_segments(node), strict=True)
            parts = [
                _chain(segment) if _can_share(cache) else {}
                for cache, segment in zip(like, segments, strict=True)
            ]
            # With the same arrays in the tree, what sequences share is in memory once.
            if all(map(_can_share, like)):
                self._tree.merge(node, Segment(tuple(parts)))
            prefix = self._shared[tree, tuple(tokens)] = SharedPrefix(len(tokens), parts)
            _evaluate(prefix.arrays)
        return [
            SharedPrefixCache(prefix, layer, cache.keys, cache.values)
            if isinstance(cache, DenseCache) and _can_share(cache)
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
        match = self._tree.match(tree, tokens)
        if match.length == len(tokens) and not snapshot:
            self._tree.use(match.node)
            return
        node = self._tree.insert(
            tree,
            tokens,
            lambda start, stop: Segment(tuple(c.slice_tokens(start, stop) for c in caches)),
        )
        new = snapshot and node.snapshot is None
        if new:
            self._tree.set_snapshot(node, Snapshot(tuple(cache.snapshot() for cache in caches)))
        self._tree.evict(self.budget)
        if new and self._tree.nbytes > self.budget:  # all nodes are in use, this one as well
            self._tree.set_snapshot(node, None)
        assert node.segment is not None
        if node in self._tree:
            _evaluate([*node.segment.arrays, *(node.snapshot.arrays if node.snapshot else ())])

    def clear(self) -> None:
        """Evict everything that no sequence uses."""
        self._tree.evict(-1)

    def _candidates(
        self, tokens: Sequence[int], like: Sequence[KVCache], step: int
    ) -> Iterator[tuple[int, Place]]:
        """Lengths that could be reused and the nodes to restore from, the longest first."""
        if not _storable(like):
            return
        node, length = self._tree.match(_tree_of(like, step), tokens)
        length = length // step * step
        if not _sliceable(like):
            yield from _with_snapshot(node, length)
        elif length:
            yield length, node


def _with_snapshot(node: Place, length: int) -> Iterator[tuple[int, Place]]:
    """Nodes with a snapshot: at ``length`` or else the first after it, then those before it."""
    before = [place for place in reversed(node.path()) if place.snapshot and place.end <= length]
    if length and not (before and before[0].end == length):
        below: Place | None = node
        while below is not None and (below.snapshot is None or below.end < length):
            below = next(reversed(below.children.values()), None)
        if below is not None:
            yield length, below
    for place in before:
        yield place.end, place


def _restored(empty: Sequence[KVCache], node: Place, length: int) -> list[KVCache]:
    segments = _segments(node)
    states = node.snapshot.states if node.snapshot else (None,) * len(empty)
    caches = [cache.fork() for cache in empty]
    for i, (cache, state) in enumerate(zip(caches, states, strict=True)):
        cache.restore([parts[i] for parts in segments], state, length)
    return caches


def _segments(node: Place) -> list[tuple[Arrays, ...]]:
    """K/V of the tokens up to the end of a node, one part per node."""
    return [one.segment.parts for one in node.path() if one.segment]


def _chain(parts: Sequence[Arrays]) -> Arrays:
    """Successive parts as one; a single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    length = sum(next(iter(part.values())).shape[2] for part in parts)
    return {name: joined(parts, name, length, length) for name in parts[0]}


def _can_share(cache: KVCache) -> bool:
    """Whether a cache's first tokens can be a shared prefix.

    A window, a sparse pattern or groups along tokens are not the same for all that have the
    prefix; and a cache with a shared prefix keeps to it.
    """
    return type(cache) is DenseCache


def _tree_of(caches: Sequence[KVCache], step: int) -> Hashable:
    return (step, *(cache.layout_key for cache in caches))


def _storable(caches: Sequence[KVCache]) -> bool:
    return all(cache.layout_key for cache in caches)


def _sliceable(caches: Sequence[KVCache]) -> bool:
    return all(cache.sliceable for cache in caches)


def _evaluate(arrays: Iterable[mx.array]) -> None:
    """Compute copies now: until then they keep alive what they are copied from."""
    mx.async_eval(list(arrays))  # type: ignore[no-untyped-call]
