"""Caches whose first tokens are shared: sequences that begin alike hold their beginning once.

A :class:`Beginning` is what some first tokens left behind, never changed and shared by any number
of :class:`BranchCache`, each of which keeps the tokens that follow. The queries of all rows of a
cache meet the beginning in one product, so that it is read once for all of them: Hydragen (Juravsky
et al., 2024, arXiv:2402.05099). Scores of both parts lie side by side before the softmax, so that
nothing needs to be merged afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import mlx.core as mx

from mlxrun.cache.base import Mask, Named, Product, State
from mlxrun.cache.dense import DenseCache
from mlxrun.cache.formats import PLAIN, Format, Seen, reads_packed, seen
from mlxrun.cache.slots import Line
from mlxrun.cache.store import copied
from mlxrun.errors import CacheError

# Queries of a row from which its keys and values are laid side by side for MLX's fused attention.
# Fewer meet both parts where they lie; on the CPU both take as long from 16 to 64.
MANY = 32


class Beginning:
    """What the first tokens of some sequences left behind, shared by all of them.

    Attributes:
        length: how many tokens.
        parts: of each memory of a model, arrays (1, H, length, ...); none where it does not share.
    """

    def __init__(self, length: int, parts: Sequence[Named]) -> None:
        self.length, self.parts = length, tuple(parts)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for part in self.parts for array in part.values()]

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)


class BranchCache(DenseCache):
    """What follows a beginning; the token at position p lives in slot ``p - beginning.length``.

    Rows of one cache have the same beginning, and nobody goes back behind its end.

    Args:
        beginning: what its rows share.
        layer: which of the beginning's parts is this layer's.
    """

    def __init__(
        self, beginning: Beginning, layer: int, keys: Format = PLAIN, values: Format = PLAIN
    ) -> None:
        super().__init__(keys, values, Line(beginning.length))
        self.beginning, self._layer = beginning, layer
        self.offsets, self.written = [beginning.length], [beginning.length]

    @property
    def fixed(self) -> list[mx.array]:
        return list(self.beginning.parts[self._layer].values())

    def bare(self) -> Self:
        nothing = Beginning(self.beginning.length, ())
        return type(self)(nothing, self._layer, self.keys, self.values)

    def meet(
        self,
        product: Product,
        queries: mx.array,
        keys: Seen,
        values: Seen,
        mask: Mask,
        fixed: Sequence[mx.array],
    ) -> mx.array:
        return meet_both(product, queries, *self._both(keys, values, mask, fixed))

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        k, v, mask = self._both(*self._remember(keys, values), self.fixed)
        return k.plain(), v.plain(), mask

    def _both(
        self, keys: Seen, values: Seen, mask: Mask, fixed: Sequence[mx.array]
    ) -> tuple[Both, Both, Mask]:
        split = len(keys.arrays)
        return (
            Both(keys._replace(arrays=tuple(fixed[:split])), keys),
            Both(values._replace(arrays=tuple(fixed[split:])), values),
            extended(mask, self.beginning.length),
        )

    def _check_truncation(self, row: int, length: int) -> None:
        if length < self.beginning.length:
            raise CacheError(
                f"cannot go back {self.offsets[row] - length} tokens: others share the first "
                f"{self.beginning.length}"
            )

    @property
    def kind(self) -> str:
        return f"DenseCache {self.keys} {self.values}"  # tokens leave the same in both

    @property
    def row_kind(self) -> tuple[object, ...]:
        return self.kind, self.beginning

    def cut(self, start: int, stop: int) -> Named:
        length = self.beginning.length
        own = {str(i): a for i, a in enumerate(self._store.arrays)}
        if start >= length:
            return {n: copied(a, start - length, stop - length) for n, a in own.items()}
        first = self.beginning.parts[self._layer]
        if stop > length:
            first = {n: _chain([a, own[n][:, :, : stop - length]]) for n, a in first.items()}
        return {n: copied(a, start, stop) for n, a in first.items()}

    def restore(self, tokens: Sequence[Named], state: State | None, length: int) -> None:
        if state is not None:
            raise CacheError("some of its tokens saw only a part of those before them")
        start = self.beginning.length
        self.offsets, self.written = [length], [length]
        if length > start:
            self._fill(list(_after(tokens, start)), length - start)

    def follow(self, whole: DenseCache) -> None:
        """Take over from a cache that holds the beginning itself what it holds after it."""
        held = whole.cut(self.beginning.length, whole.offset)
        self.restore([self.beginning.parts[self._layer], held], None, whole.offset)
        self.prompt = whole.prompt

    def clear(self, row: int) -> None:
        self.offsets[row] = self.written[row] = self.beginning.length

    def empty(self) -> Self:
        return type(self)(self.beginning, self._layer, self.keys, self.values)


def beginning_of(caches: Iterable[object]) -> Beginning | None:
    """What the caches of a sequence's layers share with others'; None if nothing."""
    return next((cache.beginning for cache in caches if isinstance(cache, BranchCache)), None)


class Both(NamedTuple):
    """Keys or values that rows meet: those of their common beginning, then each row's own.

    Attributes:
        first: the beginning's, of one row.
        own: of each row, (R, ...).
    """

    first: Seen
    own: Seen

    @property
    def format(self) -> Format:
        return self.own.format

    @property
    def heads(self) -> int:
        return self.own.heads

    @property
    def length(self) -> int:
        """Tokens of the beginning, P."""
        return int(self.first.arrays[0].shape[2])

    def plain(self) -> mx.array:
        """Floating-point numbers, (R, H, P + S, D)."""
        first, own = self.first.plain(), self.own.plain()
        first = mx.broadcast_to(first, (own.shape[0], *first.shape[1:]))
        return mx.concatenate([first, own], axis=2)

    def dot(self, queries: mx.array) -> mx.array:
        """Products with every token: (R, H, N, D) to (R, H, N, P + S)."""
        first = unfolded(self.first.dot(folded(queries)), queries.shape[0])
        return mx.concatenate([first, self.own.dot(queries)], axis=-1)

    def mix(self, weights: mx.array) -> mx.array:
        """Sums of all tokens by weight: (R, H, N, P + S) to (R, H, N, D)."""
        first, own = mx.split(weights, [self.length], axis=-1)
        return unfolded(self.first.mix(folded(first)), weights.shape[0]) + self.own.mix(own)


def folded(x: mx.array) -> mx.array:
    """What belongs to the queries of all rows as of one row: (R, H, N, X) to (1, H, R N, X)."""
    rows, heads, count, width = x.shape
    return x.swapaxes(0, 1).reshape(1, heads, rows * count, width)


def unfolded(x: mx.array, rows: int) -> mx.array:
    """(1, H, R N, X) to (R, H, N, X)."""
    _, heads, _, width = x.shape
    return x.reshape(heads, rows, -1, width).swapaxes(0, 1)


def meet_both(
    product: Product, queries: mx.array, keys: Both, values: Both, mask: Mask
) -> mx.array:
    """Queries (R, heads, T, D) and what they see, the beginning included."""
    if not reads_packed(keys.own, values.own, queries):
        if queries.shape[2] >= MANY:
            return product(queries, keys.plain(), values.plain(), mask)
        keys, values = Both(*map(unpacked, keys)), Both(*map(unpacked, values))
    elif not reads_packed(keys.first, values.first, folded(queries)):
        keys, values = (Both(unpacked(both.first), both.own) for both in (keys, values))
    return product.stored(queries, keys, values, mask)


def unpacked(stored: Seen) -> Seen:
    """The same as plain numbers."""
    return seen(stored.plain())


def extended(mask: Mask, length: int) -> Mask:
    """A mask over rows' own tokens as one over a beginning's as well, which all of them see."""
    if mask is None or isinstance(mask, str):  # causal, from the lower right corner
        return mask
    return mx.concatenate([mx.ones((*mask.shape[:3], length), mx.bool_), mask], axis=-1)


def _after(parts: Sequence[Named], start: int) -> Iterator[Named]:
    """The tokens from one on of what lies in successive parts."""
    for part in parts:
        length = next(iter(part.values())).shape[2]
        if length > start:
            yield {name: array[:, :, start:] for name, array in part.items()}
        start = max(0, start - length)


def _chain(arrays: Sequence[mx.array]) -> mx.array:
    return mx.concatenate(list(arrays), axis=2) if len(arrays) > 1 else arrays[0]
