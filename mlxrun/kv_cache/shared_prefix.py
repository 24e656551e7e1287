"""K/V of a prefix that several sequences share while they are decoded together.

The queries of all rows attend to it in one product, so that it is read once for all of them:
Hydragen (Juravsky et al., 2024, arXiv:2402.05099). Scores of both parts are concatenated before the
softmax, so that nothing needs to be merged afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import mlx.core as mx

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp, Mask
from mlxrun.kv_cache.base import Arrays, KVCache, Segment, State
from mlxrun.kv_cache.dense import DenseCache, Line, copied
from mlxrun.kv_cache.formats import PLAIN, Format, StoredKV, as_stored, reads_packed

# Queries of a row from which the keys and values of both parts are concatenated for MLX's fused
# attention. On the CPU both ways take as long from 16 to 64.
CONCATENATE_FROM = 32


@dataclass(frozen=True, eq=False)
class SharedPrefix(Segment):
    """K/V of the first tokens of some sequences, shared by all of them and never changed.

    Attributes:
        length: in tokens.
    """

    length: int


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
        self.offsets, self.high_water = [prefix.length], [prefix.length]

    def empty(self) -> Self:
        return type(self)(self.prefix, self._layer, self.keys, self.values)

    def template(self) -> Self:
        without = SharedPrefix((), self.prefix.length)
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
                f"cannot go back {self.offsets[row] - length} tokens: the first "
                f"{self.prefix.length} are shared"
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
            raise CacheError("some of its tokens attended to only a part of those before them")
        start = self.prefix.length
        self.offsets, self.high_water = [length], [length]
        if length > start:
            self._fill(list(_from(tokens, start)), length - start)

    def follow(self, whole: DenseCache) -> None:
        """Take the tokens after the prefix from a cache with all of them."""
        own = whole.slice_tokens(self.prefix.length, whole.offset)
        self.restore([self.prefix.parts[self._layer], own], None, whole.offset)
        self.prompt = whole.prompt

    def clear(self, row: int) -> None:
        self.offsets[row] = self.high_water[row] = self.prefix.length


def can_share(cache: KVCache) -> bool:
    """Whether a cache's first tokens can be a shared prefix.

    A window, a sparse pattern or groups along tokens are not the same for all that have the
    prefix; and a cache with a shared prefix keeps to it.
    """
    return type(cache) is DenseCache


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
