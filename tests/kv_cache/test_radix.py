"""The radix tree against a list of inserted sequences, in any order of use."""

from __future__ import annotations

import mlx.core as mx
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.kv_cache.base import Segment, State
from mlxrun.kv_cache.prefix_cache import TOKEN_BYTES, Node, RadixTree, common_prefix_len

SIZE = 4  # bytes of a token's K/V


def segment_of(tokens: tuple[int, ...]) -> Segment:
    """Stands for keys and values: the tokens themselves."""
    return Segment(({"0": mx.array(tokens, mx.int32).reshape(1, 1, -1, 1)},))


sequences = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)


def insert(tree: RadixTree, tokens: tuple[int, ...], name: str = "") -> Node:
    return tree.insert(name, tokens, lambda start, stop: segment_of(tokens[start:stop]))


def spelled(node: Node) -> tuple[int, ...]:
    return tuple(t for one in node.path() for t in one.tokens)


def check(tree: RadixTree) -> None:
    """What must hold at any time."""
    assert tree.nbytes == sum(node.nbytes for node in tree)
    order = {node: place for place, node in enumerate(tree)}
    for node in tree:
        assert node.tokens and node.segment is not None
        (part,) = node.segment.parts
        assert tuple(part["0"].reshape(-1).tolist()) == node.tokens  # type: ignore[arg-type]
        assert node.parent is not None
        assert node.parent.children[node.tokens[0]] is node
        assert node.end == node.parent.end + len(node.tokens) == len(spelled(node))
        assert node.parent.parent is None or order[node] < order[node.parent]
        assert all(first == child.tokens[0] for first, child in node.children.items())


@given(st.lists(sequences), sequences)
def test_a_match_is_the_longest_inserted_prefix(
    known: list[tuple[int, ...]], wanted: tuple[int, ...]
) -> None:
    tree: RadixTree = RadixTree()
    for tokens in known:
        assert spelled(insert(tree, tokens)) == tokens
        check(tree)
    node, length = tree.match("", wanted)
    assert length == max((common_prefix_len(wanted, tokens) for tokens in known), default=0)
    assert spelled(node)[:length] == wanted[:length]
    assert node.start <= length <= node.end
    distinct = {tokens[: n + 1] for tokens in known for n in range(len(tokens))}
    assert tree.nbytes == len(distinct) * (SIZE + TOKEN_BYTES)


@given(st.data())
def test_the_least_recently_used_node_without_users_is_evicted(data: st.DataObject) -> None:
    tree: RadixTree = RadixTree()
    used: list[Node] = []
    for _ in range(data.draw(st.integers(1, 12))):
        tokens = data.draw(sequences)
        node = insert(tree, tokens)
        action = data.draw(st.sampled_from(["hold", "let go", "evict", "nothing", "snapshot"]))
        if action == "hold":
            node.users += 1
            used.append(node)
        elif action == "let go" and used:
            used.pop().users -= 1
        elif action == "snapshot":
            tree.set_snapshot(node, [State({}, {}), None])
        elif action == "evict":
            leaves = [n for n in tree if not n.children and not n.users]
            budget = data.draw(st.integers(0, tree.nbytes))
            tree.evict(budget)
            assert tree.nbytes <= budget or not any(not n.children and not n.users for n in tree)
            gone = [leaf for leaf in leaves if leaf not in tree]
            assert gone == leaves[: len(gone)] or len(gone) == len(leaves)
        assert all(one in tree for node in used for one in node.path())
        check(tree)
    for node in used:
        node.users = 0
    tree.evict(-1)
    assert tree.nbytes == len(tree) == 0
    assert tree.match("", (0, 1, 2))[1] == 0


def test_trees_of_other_names_share_the_order_but_no_tokens() -> None:
    tree: RadixTree = RadixTree()
    insert(tree, (1, 2, 3), "one")
    insert(tree, (1, 2, 4), "other")
    assert tree.match("one", (1, 2, 4))[1] == 2
    assert tree.match("none", (1, 2, 4))[1] == 0
    tree.evict(3 * (SIZE + TOKEN_BYTES))
    assert tree.match("one", (1,))[1] == 0
    assert tree.match("other", (1, 2, 4))[1] == 3
    assert tree.evicted == 1


def test_nodes_merge_unless_their_ancestors_have_users() -> None:
    tree: RadixTree = RadixTree()
    first, last = insert(tree, (1, 2)), insert(tree, (1, 2, 3, 4))
    whole = segment_of((1, 2, 3, 4))
    first.users += 1
    assert not tree.merge(last, whole)
    first.users -= 1
    tree.set_snapshot(first, [State({}, {})])
    assert not tree.merge(last, whole)
    tree.set_snapshot(first, None)
    other = insert(tree, (1, 2, 0))
    assert not tree.merge(last, whole)
    tree.drop(other)
    assert [*tree] == [last, first] and spelled(last) == (1, 2, 3, 4)
    check(tree)
    assert tree.merge(last, whole)
    assert [*tree] == [last] and last.tokens == (1, 2, 3, 4)
    check(tree)


@given(sequences, sequences)
def test_shared_counts_first_tokens(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    count = common_prefix_len(one, other)
    assert one[:count] == other[:count]
    assert count == min(len(one), len(other)) or one[count] != other[count]
