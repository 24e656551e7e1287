"""A radix tree over token ids: which beginnings are known, who uses them, which go first.

Standard library only: what a node holds is told by its bytes and can be split. Several trees share
one order of use and one count of bytes, each under a name of its own.

The order needs no clock. A use moves a node to the end of it, then its parent, and so on to the
root: an ancestor is always behind all its descendants, and the front is a leaf.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, Self, TypeVar


class Splits(Protocol):
    """What the tokens of a node left behind.

    Attributes:
        nbytes: what it takes.
    """

    @property
    def nbytes(self) -> int: ...

    def split(self, at: int) -> tuple[Self, Self]:
        """What the first ``at`` tokens left, and what the others did."""


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


# Bytes that a token of a node takes besides what it left behind: its id, and a share of the node.
TOKEN = 32
# Tokens that are compared at once.
STRIDE = 64

S = TypeVar("S", bound=Splits)
K = TypeVar("K", bound=Sized)


@dataclass(eq=False, slots=True)
class Node(Generic[S, K]):
    """Some tokens that follow those of the parent.

    Attributes:
        tokens: at least one, but for a root.
        end: position behind the last of them.
        segment: what they left behind; None for a root.
        parent: None for a root.
        children: by their first token.
        kept: what was the case at the end, if it was kept.
        users: how many need it to stay.
    """

    tokens: tuple[int, ...]
    end: int
    segment: S | None
    parent: Node[S, K] | None
    children: dict[int, Node[S, K]] = field(default_factory=dict)
    kept: K | None = None
    users: int = 0

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.end - len(self.tokens)

    @property
    def nbytes(self) -> int:
        """What the node takes, its descendants apart."""
        held = (self.segment, self.kept)
        return TOKEN * len(self.tokens) + sum(part.nbytes for part in held if part)

    def path(self) -> list[Node[S, K]]:
        """The nodes from below the root to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Match(NamedTuple, Generic[S, K]):
    """How far a tree knows a sequence.

    Attributes:
        node: the last that shares a token with it; a root if none does.
        length: tokens shared, which may end within the node.
    """

    node: Node[S, K]
    length: int


class RadixTree(Generic[S, K]):
    """Known sequences.

    Attributes:
        nbytes: what all nodes take.
        evicted: nodes dropped so far.
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
        """How far one of the trees knows some tokens; uses nothing."""
        node = self._roots.get(tree) or Node((), 0, None, None)
        length, tokens = 0, tuple(tokens)
        while length < len(tokens):
            child = node.children.get(tokens[length])
            if child is None:
                break
            node = child
            same = shared(node.tokens, tokens[length : length + len(node.tokens)])
            length += same
            if same < len(node.tokens):
                break
        return Match(node, length)

    def insert(
        self, tree: Hashable, tokens: Sequence[int], segment: Callable[[int, int], S]
    ) -> Node[S, K]:
        """Make a node end behind some tokens, at least one; it counts as used.

        Args:
            segment: what the tokens from one position to another left behind, for those that are
                not known.
        """
        self._roots.setdefault(tree, Node((), 0, None, None))
        length = self.match(tree, tokens).length
        node = self.end(tree, tokens[:length])
        if length < len(tokens):
            new = Node(tuple(tokens[length:]), len(tokens), segment(length, len(tokens)), node)
            # An interrupt in between must not leave a node that can be found and is in no order.
            self._order[new] = None
            self.nbytes += new.nbytes
            node.children[new.tokens[0]] = new
            node = new
        self.use(node)
        return node

    def end(self, tree: Hashable, tokens: Sequence[int]) -> Node[S, K]:
        """Make a node end behind some tokens, all of which are known."""
        node, length = self.match(tree, tokens)
        return self._split(node, length) if length < node.end else node

    def merge(self, node: Node[S, K], segment: S) -> bool:
        """Let a node hold all tokens up to its end, if nothing else needs those before it.

        Args:
            segment: what they left behind.
        """
        *before, last = node.path()
        if any(len(one.children) > 1 or one.users or one.kept for one in before):
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

    def keep(self, node: Node[S, K], kept: K | None) -> None:
        """Note what is the case at the end of a node."""
        self.nbytes -= node.nbytes
        node.kept = kept
        self.nbytes += node.nbytes

    def use(self, node: Node[S, K]) -> None:
        """Count a node and all before it as used now."""
        for one in reversed(node.path()):
            self._order.move_to_end(one)

    def evict(self, budget: int) -> None:
        """Drop what was used least recently until no more than ``budget`` bytes are left.

        What somebody uses stays, and what lies before it.
        """
        while self.nbytes > budget:
            free = (node for node in self._order if not node.children and not node.users)
            node = next(free, None)
            if node is None:
                return
            self.drop(node)

    def drop(self, node: Node[S, K]) -> None:
        """Forget a node that has no children and no users."""
        assert node.parent is not None and not node.children and not node.users
        del node.parent.children[node.tokens[0]]
        del self._order[node]
        self.nbytes -= node.nbytes
        self.evicted += 1

    def clear(self) -> None:
        """Forget everything that nobody uses."""
        self.evict(-1)

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


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many first tokens two sequences share."""
    most = min(len(one), len(other))
    for start in range(0, most, STRIDE):  # whole strides compare at the speed of C
        stop = min(start + STRIDE, most)
        if one[start:stop] != other[start:stop]:
            return next(i for i in range(start, stop) if one[i] != other[i])
    return most
